"""Hidden columns: the same environment, and the same log, seen with fewer sensors.

    log = collect(lambda: HideColumns(gym.make("Pendulum-v1")), steps=20_000)     # without its velocity
    log = without_columns(load("mujoco/hopper/medium-v0"), velocity_columns("Hopper-v5"))

An environment that everything here knows by name, MuJoCo's judgement and Minari's data sets included, is an id::

    gym.register("mine/PendulumAngle-v1", "gymnasium.envs.classic_control.pendulum:PendulumEnv", max_episode_steps=200,
                 additional_wrappers=(HideColumns.wrapper_spec(columns=[2]),))

and its task is `learneddyn.tasks.partial.partially_observed`. A model of what is left needs a memory, such as
`learneddyn.models.RecurrentDynamics` has.
"""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray

from learneddyn.core import Transitions

_VELOCITIES: dict[str, tuple[range, ...]] = {
    "Ant-v5": (range(13, 27),),
    "CartPole-v1": (range(1, 2), range(3, 4)),
    "HalfCheetah-v5": (range(8, 17),),
    "Hopper-v5": (range(5, 11),),
    "Humanoid-v5": (range(22, 45), range(175, 253)),
    "HumanoidStandup-v5": (range(22, 45), range(175, 253)),
    "InvertedDoublePendulum-v5": (range(5, 8),),
    "InvertedPendulum-v5": (range(2, 4),),
    "MountainCarContinuous-v0": (range(1, 2),),
    "Pendulum-v1": (range(2, 3),),
    "Pusher-v5": (range(7, 14),),
    "Reacher-v5": (range(6, 8),),
    "Swimmer-v5": (range(3, 8),),
    "Walker2d-v5": (range(8, 17),),
    "learneddyn/CartPoleSwingUp-v0": (range(2, 4),),
    "learneddyn/HeavyPendulum-v0": (range(2, 4),),
}


def velocity_columns(env_id: str) -> tuple[int, ...]:
    """Return the observation columns that hold velocities, in an environment made with its default arguments.

    Raises:
        LookupError: they are not known for this id.
    """
    if env_id not in _VELOCITIES:
        raise LookupError(f"the velocities of {env_id!r} are not known, only of {sorted(_VELOCITIES)}: name columns")
    return tuple(column for part in _VELOCITIES[env_id] for column in part)


class HideColumns(gym.ObservationWrapper[Any, Any, Any], gym.utils.RecordConstructorArgs):
    """Leave columns out of what an environment shows; everything else stays as it is.

    Args:
        env: with a Box of one axis as its observation space.
        columns: to hide; None hides the velocities.

    Raises:
        ValueError: observations that are no such Box, a column that is none of theirs, or nothing left to show.
        LookupError: the velocities are not known for this environment, or for the columns that it was made to show.
    """

    def __init__(self, env: gym.Env[Any, Any], columns: Sequence[int] | None = None) -> None:
        gym.utils.RecordConstructorArgs.__init__(self, columns=None if columns is None else list(columns))
        super().__init__(env)
        if columns is None:
            name = env.spec.id if env.spec else type(env.unwrapped).__name__
            columns = velocity_columns(name)
            with closing(gym.make(name)) as usual:
                if env.observation_space.shape != usual.observation_space.shape:
                    raise LookupError(f"{name} does not show its usual columns here: name columns")
        self.observation_space = _fewer(env.observation_space, columns)
        self.hidden = tuple(sorted(set(columns)))
        """The columns left out, in order."""
        self.shown = tuple(_kept(env.observation_space, columns).tolist())
        """The other columns, in order."""
        self._index = list(self.shown)

    def observation(self, observation: NDArray[Any]) -> NDArray[Any]:
        """Return the columns that are shown."""
        return observation[self._index]


def without_columns(data: Transitions, columns: Sequence[int]) -> Transitions:
    """Return the same rows with fewer observation columns.

    Raises:
        ValueError: the data names no spaces, its observations are no Box of one axis, a column is none of theirs, or
            nothing is left.
    """
    if data.spaces is None:
        raise ValueError("transitions without spaces cannot lose columns: give them spaces=Spaces(...)")
    space = _fewer(data.spaces.observation, columns)
    kept = torch.from_numpy(_kept(data.spaces.observation, columns)).to(data.device)
    return replace(
        data,
        obs=data.obs.index_select(1, kept),
        next_obs=data.next_obs.index_select(1, kept),
        spaces=data.spaces._replace(observation=space),
        source=f"{data.source} without columns {sorted(set(columns))}",
    )


def _kept(space: gym.Space[Any], columns: Sequence[int]) -> NDArray[np.int64]:
    """Return the columns that stay.

    Raises:
        ValueError: no Box of one axis, a column that is none of its, or nothing left.
    """
    if not (isinstance(space, gym.spaces.Box) and len(space.shape) == 1):
        raise ValueError(f"columns can be hidden in a Box of one axis, got {space}; wrap it with FlattenObservation")
    count = space.shape[0]
    if not columns or any(not 0 <= column < count for column in columns):
        raise ValueError(f"columns must name some of the observation columns 0 to {count - 1}, got {list(columns)}")
    if len(set(columns)) == count:
        raise ValueError(f"all {count} observation columns would be hidden: leave one at least")
    return np.setdiff1d(np.arange(count), list(columns))


def _fewer(space: gym.Space[Any], columns: Sequence[int]) -> gym.spaces.Box:
    kept = _kept(space, columns)
    assert isinstance(space, gym.spaces.Box)
    return gym.spaces.Box(space.low[kept], space.high[kept], dtype=space.dtype.type)
