"""The share of targets at the edge of reach: exact chains in one dimension, and the line of the log."""

from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch

from learneddyn.core import Outcome, Prediction, Task, Transitions, generator
from learneddyn.offline import RAVL
from learneddyn.offline.reach import edge_of_reach_share
from learneddyn.spaces import Spaces
from learneddyn.tasks.endless import never
from learneddyn.world import World

SPACES = Spaces(gym.spaces.Box(-np.inf, np.inf, (1,), np.float32), gym.spaces.Box(-1.0, 1.0, (1,), np.float32))
TASK = Task("Line-v0", reward=lambda obs, action, after: after[:, 0], terminated=never)


class Plant:
    """Moves by an amount of its own, then shrinks, whatever the action."""

    num_members, elites, spaces = 1, torch.zeros(1, dtype=torch.long), SPACES

    def __init__(self, step: float, shrink: float = 1.0) -> None:
        self.step, self.shrink = step, shrink

    def predict(self, obs, action, memory=None):
        after = (obs + self.step) * self.shrink
        return Prediction(after[None], torch.zeros_like(after)[None], self.elites)

    def sample(self, obs, action, member, rng, memory=None, *, noise=True):
        return Outcome((obs + self.step) * self.shrink)


def line(rows: int, most: float) -> Transitions:
    """Logged states spread over [0, most]."""
    obs = most * torch.rand(rows, 1, generator=generator(0))
    number = torch.arange(rows)
    return Transitions(obs, torch.zeros_like(obs), obs[:, 0], obs, number < 0, number, SPACES)


def share(plant: Plant, horizon: int, task: Task = TASK) -> float:
    log = line(2000, 1.0)
    rows = World(plant, task).rollout(log.obs, torch.zeros_like, horizon, generator(0))
    return edge_of_reach_share(rows, log)


def test_what_nobody_passes_is_at_the_edge():
    """Steps of 1 from [0, 1]: of k cut rollouts all end in (k, k + 1], where no rollout has been."""
    for horizon in (1, 2, 5):
        assert share(Plant(1.0), horizon) == pytest.approx(1 / horizon, rel=0.05)


def test_what_others_pass_is_not():
    """Steps of 0.1 leave the states visited with a probability of 0.1; towards the middle none does."""
    assert share(Plant(0.1), 1) == pytest.approx(0.1, abs=0.03)
    assert share(Plant(0.0, shrink=0.7), 3) < 0.03 / 3
    assert share(Plant(0.0), 4) < 0.03 / 4


def test_rollouts_that_end_are_not_cut():
    """A terminated state is bootstrapped from by nobody, and a lone state has no neighbours to be judged by."""
    ends = replace(TASK, terminated=lambda obs: obs[:, 0] > 2)
    assert share(Plant(1.0), 2, ends) == 0.0
    one = line(1, 1.0)
    assert edge_of_reach_share(one, one) == 0.0


def test_agents_log_it(listen):
    """Beside the pessimism that holds it down."""
    small = {"policy_kwargs": {"net_arch": (8,)}, "batch_size": 20, "rollout_batch": 400, "n_critics": 2, "seed": 0}
    agent = RAVL("MlpPolicy", line(500, 1.0), task=TASK, model=Plant(1.0), horizon=2, device="cpu", **small)
    told = listen(agent)
    agent.learn(1)
    assert told[0]["imagined/edge_of_reach"] == pytest.approx(0.5, abs=0.05)
    assert told[0]["train/spread"] >= 0
