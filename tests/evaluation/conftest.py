import gymnasium as gym
import numpy as np
import pytest
import torch

from learneddyn.core import Outcome, Prediction, Task
from learneddyn.spaces import Spaces


class Linear:
    """obs' = obs A + action B + std * noise, every member with its own A: error growth is known in closed form."""

    def __init__(self, matrices, gain=None, std=0.0):
        self.matrices = torch.as_tensor(matrices, dtype=torch.float32)
        self.num_members, width, _ = self.matrices.shape
        self.gain = torch.zeros(1, width) if gain is None else torch.as_tensor(gain, dtype=torch.float32)
        self.std = std
        box = lambda n: gym.spaces.Box(-np.inf, np.inf, (n,), np.float32)  # noqa: E731
        self.spaces = Spaces(box(width), gym.spaces.Box(-1.0, 1.0, (len(self.gain),), np.float32))
        self.elites = torch.arange(self.num_members)

    def predict(self, obs, action, memory=None):
        mean = torch.einsum("bo,eop->ebp", obs, self.matrices) + action @ self.gain
        return Prediction(mean, torch.full_like(mean, self.std), self.elites)

    def sample(self, obs, action, member, rng, memory=None, *, noise=True):
        after = torch.einsum("bo,bop->bp", obs, self.matrices[member]) + action @ self.gain
        return Outcome(after + self.std * noise * torch.randn(after.shape, generator=rng))


class Constant:
    """A policy that always does the same."""

    def __init__(self, action):
        self.action = np.asarray(action, np.float32)
        self.calls = 0

    def predict(self, observation, state=None, episode_start=None, deterministic=False):
        self.calls += 1
        return np.repeat(self.action[None], len(observation), axis=0), state


@pytest.fixture(scope="session")
def linear():
    return Linear


@pytest.fixture
def constant():
    return Constant


@pytest.fixture
def line_task():
    """Reward 1 a step; ends above 10; starts at one."""

    def make(width=1, limit=100, above=10.0):
        return Task(
            "Line-v0",
            reward=lambda obs, action, after: torch.ones(len(obs)),
            terminated=lambda after: after[:, 0] > above,
            initial=lambda lanes, rng: torch.ones(lanes, width),
            max_episode_steps=limit,
        )

    return make
