"""Small dynamics with closed forms, for the tests of a World."""

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from learneddyn.core import Outcome, Prediction, Task
from learneddyn.spaces import Spaces


def box_spaces(obs_dim: int, action_dim: int) -> Spaces:
    return Spaces(
        gym.spaces.Box(-np.inf, np.inf, (obs_dim,), np.float32), gym.spaces.Box(-1.0, 1.0, (action_dim,), np.float32)
    )


class Shifts:
    """next_obs = obs + gain * action + shift[member] (+ std * noise), with as many actions as observations."""

    def __init__(self, shift, *, std: float = 0.0, gain: float = 0.0, elites=None, reward=None, terminated=None):
        self.shift = torch.as_tensor(shift, dtype=torch.float32)
        self.num_members, columns = self.shift.shape
        self.spaces = box_spaces(columns, columns)
        self.std, self.gain = std, gain
        self._elites = torch.arange(self.num_members) if elites is None else torch.as_tensor(elites)
        self.reward, self.terminated = reward, terminated

    @property
    def elites(self) -> Tensor:
        return self._elites

    def predict(self, obs, action, memory=None) -> Prediction:
        mean = obs + self.gain * action + self.shift[:, None]
        heads = {}
        if self.reward is not None:
            heads["reward_mean"] = self.reward[:, None].expand(-1, len(obs))
        if self.terminated is not None:
            heads["terminated"] = self.terminated[:, None].expand(-1, len(obs))
        return Prediction(mean, torch.full_like(mean, self.std), self.elites, **heads)

    def sample(self, obs, action, member, rng, memory=None, *, noise=True) -> Outcome:
        next_obs = obs + self.gain * action + self.shift[member]
        if noise and self.std:
            next_obs = next_obs + self.std * torch.randn(obs.shape, generator=rng)
        reward = None if self.reward is None else self.reward[member]
        terminated = None if self.terminated is None else self.terminated[member] > 0.5
        return Outcome(next_obs, reward, terminated)


def first_column(obs: Tensor, action: Tensor, next_obs: Tensor) -> Tensor:
    return next_obs[:, 0]


def never(next_obs: Tensor) -> Tensor:
    return torch.zeros(len(next_obs), dtype=torch.bool)


def task(**changes) -> Task:
    return Task("Double-v0", **({"reward": first_column, "terminated": never} | changes))


def still(obs: Tensor) -> Tensor:
    """A policy that does nothing, for doubles with as many actions as observations."""
    return torch.zeros_like(obs)
