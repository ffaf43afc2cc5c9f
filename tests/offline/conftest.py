from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3.common.logger import KVWriter, Logger

from learneddyn.core import Transitions, generator
from learneddyn.spaces import Spaces
from learneddyn.testing import example_transitions


class Lines(KVWriter):
    """What an agent logs, a dictionary every time."""

    def __init__(self) -> None:
        self.lines: list[dict] = []

    def write(self, key_values, key_excluded, step=0):
        self.lines.append(dict(key_values))

    def close(self):
        pass


@pytest.fixture
def listen():
    """Give an agent a logger, and return the list that what it logs is appended to."""

    def to(agent) -> list[dict]:
        notes = Lines()
        agent.set_logger(Logger(None, [notes]))
        return notes.lines

    return to


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def log() -> Transitions:
    """3 observation columns, 2 actions in [-1, 1], many short episodes, some of them terminated."""
    return example_transitions(400)


@pytest.fixture(scope="session")
def endless(log) -> Transitions:
    """The same rows of episodes that are cut, not terminated."""
    return replace(log, terminated=torch.zeros_like(log.terminated))


@pytest.fixture(scope="session")
def bandit() -> Transitions:
    """One step per episode; the reward -(a - b/2)² peaks at half the observation's sign, actions are uniform."""
    rng = generator(1)
    obs = torch.randint(2, (600, 1), generator=rng).float() * 2 - 1
    action = 2 * torch.rand(600, 1, generator=rng) - 1
    reward = -(action - obs / 2).square()[:, 0]
    spaces = Spaces(gym.spaces.Box(-np.inf, np.inf, (1,), np.float32), gym.spaces.Box(-1.0, 1.0, (1,), np.float32))
    return Transitions(obs, action, reward, obs, torch.ones(600, dtype=torch.bool), torch.arange(600), spaces)
