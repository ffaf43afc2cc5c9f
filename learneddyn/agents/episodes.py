"""Play the running episodes of a vector environment again, so that a resumed run stands where the killed one stood.

An episode is a function of the random state its reset drew from and of the actions taken since. That needs nothing from
the environment but ``np_random``, and holds for every environment that draws random numbers only when it is reset
(MuJoCo and classic control do); whether it held is checked when the episodes are played again.
"""

from typing import Any

import numpy as np
import torch
from gymnasium.utils import seeding
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor

from learneddyn.core import Json


class Episodes:
    """What the running episode of every lane began with, and its actions since.

    Call `resetting` before and `reset` after ``env.reset()``, and `stepped` after every ``env.step``.
    """

    def __init__(self, env: VecEnv) -> None:
        self.env = env
        self.actions: list[list[np.ndarray]] = [[] for _ in range(env.num_envs)]
        self._began: list[Json | None] = [None] * env.num_envs
        self._after: list[Json | None] = [None] * env.num_envs

    def resetting(self) -> None:
        """Note what ``env.reset()`` is about to draw from."""
        seeds = self.env.unwrapped._seeds
        self._began = [
            _random_state(self.env, lane) if seed is None else dict(seeding.np_random(seed)[0].bit_generator.state)
            for lane, seed in enumerate(seeds)
        ]

    def reset(self) -> None:
        """Note that every lane has just begun an episode."""
        self.actions = [[] for _ in self.actions]
        self._after = [_random_state(self.env, lane) for lane in range(len(self.actions))]

    def stepped(self, actions: np.ndarray, dones: np.ndarray) -> None:
        """Note one action per lane, as ``env.step`` got it; lanes that are done have begun another episode."""
        for lane, (action, done) in enumerate(zip(actions, dones, strict=True)):
            if done:
                self.actions[lane] = []
                self._began[lane], self._after[lane] = self._after[lane], _random_state(self.env, lane)
            else:
                self.actions[lane].append(np.array(action))

    def state(self) -> tuple[Json, dict[str, Tensor]]:
        """Return what `restore` needs, as JSON and tensors."""
        lanes = range(len(self.actions))
        now = [_random_state(self.env, lane) for lane in lanes]
        tensors = {
            f"actions.{lane}": torch.from_numpy(np.stack(taken)) for lane, taken in enumerate(self.actions) if taken
        }
        return {"began": self._began, "after": self._after, "now": now}, tensors

    def restore(self, state: Json, tensors: dict[str, Tensor], last_obs: np.ndarray) -> bool:
        """Bring every lane to where it was; False where its observation or random state comes out differently."""
        same = True
        for lane, began in enumerate(state["began"]):
            if began is None:
                return False
            rng = seeding.np_random(0)[0]
            rng.bit_generator.state = began
            self.env.set_attr("np_random", rng, indices=lane)
            obs = self.env.env_method("reset", indices=lane)[0][0]
            taken = tensors.get(f"actions.{lane}")
            self.actions[lane] = [] if taken is None else [*taken.numpy()]
            for action in self.actions[lane]:
                obs = self.env.env_method("step", action, indices=lane)[0][0]
            now = _random_state(self.env, lane)
            same &= np.array_equal(np.asarray(obs, last_obs.dtype), last_obs[lane]) and now == state["now"][lane]
        self._began, self._after = state["began"], state["after"]
        return same


def _random_state(env: VecEnv, lane: int) -> Json | None:
    """Return the state of a lane's generator, or None where the environment has none to show."""
    try:
        rng: Any = env.get_attr("np_random", indices=lane)[0]
        return rng.bit_generator.state
    except (AttributeError, NotImplementedError):
        return None
