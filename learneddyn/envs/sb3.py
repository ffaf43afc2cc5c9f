"""Many lanes of a World as a Stable-Baselines3 VecEnv: any SB3 algorithm trains in it as it is."""

import time
from collections.abc import Iterable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import concatenate, create_empty_array
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecEnv

from learneddyn.envs.start import Start
from learneddyn.envs.vector import LearnedVectorEnv
from learneddyn.envs.worlds import load_world
from learneddyn.world import World

Indices = None | int | Iterable[int]


class LearnedVecEnv(VecEnv):
    """``num_envs`` lanes of a World with the interface of SB3's DummyVecEnv over monitored environments.

    A lane that ends is reset in the same step; its info then holds ``terminal_observation``, ``TimeLimit.truncated``
    (True for the horizon and for distrust: SB3 bootstraps the value there), ``trusted`` where it was truncated, and
    ``episode`` (``r`` return, ``l`` length, ``t`` seconds since construction), so no VecMonitor is needed.

    Args:
        world: what to step.
        num_envs: lanes, any number from 1.
        horizon: steps until truncation; None takes the task's time limit, or 1000 where it has none.
        start: where episodes begin, see `learneddyn.envs.start`.
        render_mode: None or ``"rgb_array"``.
        width: of a lane's frame, pixels.
        height: of a lane's frame, pixels.

    Raises:
        ValueError: discrete actions that do not begin at 0, which Stable-Baselines3 cannot name.
    """

    def __init__(
        self,
        world: World,
        num_envs: int = 1,
        *,
        horizon: int | None = None,
        start: Start = None,
        render_mode: str | None = None,
        width: int = 480,
        height: int = 480,
    ) -> None:
        action = world.spaces.action
        if isinstance(action, gym.spaces.Discrete) and action.start != 0:
            raise ValueError(
                f"Stable-Baselines3 numbers discrete actions from 0, this world has {action}: shift the actions of the "
                "data (for logs: discrete=n), or wrap the real environment before collecting"
            )
        self.env = LearnedVectorEnv(
            world,
            num_envs,
            horizon=horizon,
            start=start,
            autoreset_mode=AutoresetMode.SAME_STEP,
            render_mode=render_mode,
            width=width,
            height=height,
        )
        super().__init__(num_envs, *world.spaces)
        self._actions: Any = None
        self._returns = np.zeros(num_envs)
        self._clock, self._begun = 0, np.zeros(num_envs, np.int64)
        self._born = time.time()

    @classmethod
    def from_name(cls, world: str, num_envs: int = 1, *, device: str = "cpu", **kwargs: Any) -> "LearnedVecEnv":
        """Return the environment of a shipped world, a world folder or ``"truth:<id>"``; see `LearnedVecEnv`."""
        loaded = load_world(world, device)
        return cls(loaded.world, num_envs, **{"horizon": loaded.horizon, "start": loaded.starts(None)} | kwargs)

    def reset(self) -> Any:
        """Begin episodes in all lanes, with the seed and the options set by `seed` and `set_options`."""
        starts = [options["obs"] for options in self._options if "obs" in options]
        if len(starts) not in (0, self.num_envs):
            raise ValueError(f"set_options must give 'obs' to all {self.num_envs} lanes or to none, got {len(starts)}")
        space = self.observation_space
        empty: Any = create_empty_array(space, len(starts))
        options = {"obs": concatenate(space, starts, empty)} if starts else None
        obs, _ = self.env.reset(seed=self._seeds[0], options=options)
        self._reset_seeds()
        self._reset_options()
        self._returns[:], self._begun[:] = 0.0, self._clock
        return obs

    def step_async(self, actions: Any) -> None:
        """Take the actions of the next `step_wait`."""
        self._actions = actions

    def step_wait(self) -> tuple[Any, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        """Advance every lane; returns observations, rewards (float32), dones and one info per lane."""
        obs, reward, terminated, truncated, ends = self.env.step(self._actions)
        self._clock += 1
        self._returns += reward
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        done = terminated | truncated
        if ends:
            self._describe_ends(infos, np.flatnonzero(done), terminated, ends)
        return obs, reward.astype(np.float32), done, infos

    def close(self) -> None:
        """Release the renderer."""
        self.env.close()

    def get_images(self) -> Sequence[np.ndarray | None]:
        """Return one frame per lane."""
        return self.env.render() or [None] * self.num_envs

    def get_attr(self, attr_name: str, indices: Indices = None) -> list[Any]:
        """Return an attribute, once per lane asked for: the lanes share one environment."""
        return [getattr(self.env, attr_name) for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: Indices = None) -> None:
        """Set an attribute of all lanes.

        Raises:
            ValueError: only some lanes are asked for; they share one environment.
        """
        if len(list(self._get_indices(indices))) != self.num_envs:
            raise ValueError(
                f"the lanes share one environment: set {attr_name!r} for all of them, got indices {indices}"
            )
        setattr(self.env, attr_name, value)

    def env_method(
        self, method_name: str, *method_args: Any, indices: Indices = None, **method_kwargs: Any
    ) -> list[Any]:
        """Call a method of the shared environment once; its result is returned once per lane asked for."""
        result = getattr(self.env, method_name)(*method_args, **method_kwargs)
        return [result for _ in self._get_indices(indices)]

    def env_is_wrapped(
        self, wrapper_class: type[gym.Wrapper[Any, Any, Any, Any]], indices: Indices = None
    ) -> list[bool]:
        """Say True for Monitor, whose ``episode`` infos this class gives, and False for every other wrapper."""
        return [issubclass(wrapper_class, Monitor) for _ in self._get_indices(indices)]

    def _describe_ends(
        self, infos: list[dict[str, Any]], lanes: np.ndarray, terminated: np.ndarray, ends: dict[str, Any]
    ) -> None:
        seconds = round(time.time() - self._born, 6)
        reasons = ends["final_info"]
        for lane in lanes.tolist():
            info = infos[lane]
            info["terminal_observation"] = ends["final_obs"][lane]
            info["TimeLimit.truncated"] = not terminated[lane]
            if reasons and reasons["_trusted"][lane]:
                info["trusted"] = bool(reasons["trusted"][lane])
            length = int(self._clock - self._begun[lane])
            info["episode"] = {"r": round(float(self._returns[lane]), 6), "l": length, "t": seconds}
        self._returns[lanes], self._begun[lanes] = 0.0, self._clock
