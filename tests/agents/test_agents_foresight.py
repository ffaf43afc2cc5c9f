"""Imagination along real actions: exact for the truth, wrong by what the model is wrong."""

import gymnasium as gym
import pytest
import torch

from learneddyn import tasks
from learneddyn.agents.foresight import relive
from learneddyn.core import Outcome, Prediction, Task, Transitions, generator
from learneddyn.data import collect
from learneddyn.spaces import Spaces
from learneddyn.world import World
from learneddyn.world.truth import TruthDynamics

SPACES = Spaces(gym.spaces.Box(-9, 9, (1,)), gym.spaces.Box(-1, 1, (1,)))


class Slope:
    """next_obs = obs + gain * action."""

    num_members, spaces, elites = 1, SPACES, torch.zeros(1, dtype=torch.long)

    def __init__(self, gain):
        self.gain = gain

    def sample(self, obs, action, member, rng, memory=None, *, noise=True):
        return Outcome(obs + self.gain * action)

    def predict(self, obs, action, memory=None):
        mean = (obs + self.gain * action)[None]
        return Prediction(mean, torch.zeros_like(mean), self.elites)


def position(obs, action, next_obs):
    return next_obs[:, 0]


def walk(lengths, terminated=False):
    """Episodes of +1 steps from 0."""
    time = torch.cat([torch.arange(n, dtype=torch.float32) for n in lengths])[:, None]
    ends = torch.cat([torch.arange(n) == n - 1 for n in lengths]) & terminated
    episode = torch.cat([torch.full((n,), k) for k, n in enumerate(lengths)])
    return Transitions(time, torch.ones_like(time), time[:, 0] + 1, time + 1, ends, episode, SPACES)


def world(gain, limit=100.0):
    return World(Slope(gain), Task("Walk-v0", position, lambda next_obs: next_obs[:, 0] >= limit))


def test_the_truth_promises_what_happened():
    data = collect("Pendulum-v1", steps=400, lanes=2, progress=False)
    truth = TruthDynamics("Pendulum-v1", threads=1)
    figures, rows = relive(World(truth, tasks.get("Pendulum-v1")), data, 10, generator(0))
    assert figures["imagined/return"] == pytest.approx(figures["real/return"], abs=1e-3)
    assert len(rows) == 2 * (200 - 10 + 1) * 10
    truth.close()


def test_windows_stay_within_their_episode_and_returns_are_sums_by_hand():
    figures, rows = relive(world(2.0), walk([4, 2]), 3, generator(0))
    # Windows of three steps begin at rows 0 and 1 of the first episode: 1+2+3 and 2+3+4; imagined 2+4+6 and 3+5+7.
    assert figures == {"imagined/return": 13.5, "real/return": 7.5}
    assert len(rows) == 6
    assert torch.equal(rows.next_obs, rows.obs + 2 * rows.action)


def test_a_horizon_beyond_the_longest_episode_is_cut():
    figures, _ = relive(world(1.0), walk([3, 2]), 25, generator(0))
    assert figures == {"imagined/return": 6.0, "real/return": 6.0}


def test_windows_do_not_bridge_a_row_that_was_dropped():
    whole = walk([6])
    figures, rows = relive(world(1.0), whole[torch.arange(6) != 2], 2, generator(0))
    # What is left are the stretches 0, 1 and 3, 4, 5: windows begin at rows 0, 3 and 4.
    assert figures == pytest.approx({"imagined/return": 23 / 3, "real/return": 23 / 3})
    assert rows.episode.bincount().tolist().count(2) == 3
    assert relive(world(1.0), whole[torch.arange(6) != 2], 25, generator(0)).figures["real/return"] == 4 + 5 + 6


def test_an_imagined_termination_ends_the_window():
    figures, rows = relive(world(1.0, limit=2.0), walk([4]), 4, generator(0))
    assert figures == {"imagined/return": 3.0, "real/return": 10.0}
    assert rows.terminated.tolist() == [False, True]
