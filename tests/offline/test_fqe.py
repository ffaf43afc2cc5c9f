"""Fitted Q evaluation on a ring whose values are known, and what it says of policies far from the log."""

from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch

from learneddyn.core import DataError, Transitions, generator
from learneddyn.offline.fqe import bootstrapped_rows, fqe
from learneddyn.spaces import Spaces

STATES, GAMMA = 5, 0.9
SPACES = Spaces(gym.spaces.Discrete(STATES), gym.spaces.Box(-1.0, 3.0, (1,), np.float32))
PAY = np.array([1.0, -0.5, 0.0, 2.0, 0.3])
QUICK = {"gamma": GAMMA, "hidden": (32,), "members": 3, "updates": 500, "learning_rate": 5e-3, "tau": 0.1}


class Mover:
    """Steps one state on (an action above 1) or back, by a table."""

    def __init__(self, on: list[bool]) -> None:
        self.on = np.array(on)

    def predict(self, observation, state=None, episode_start=None, deterministic=False):
        return np.where(self.on[observation], 2.5, -0.5).astype(np.float32)[:, None], state


def ring(seed: int, episodes: int = 120, steps: int = 12, *, ends: bool = True) -> Transitions:
    """A random walk on a ring: s + 1 where the action is above 1, else s - 1; reaching state 3 ends an episode."""
    rng, rows = np.random.default_rng(seed), []
    for number in range(episodes):
        at = int(rng.choice([0, 1, 2, 4]))
        for _ in range(steps):
            action = rng.uniform(-1, 3)
            after = (at + (1 if action > 1 else -1)) % STATES
            rows.append((np.eye(STATES)[at], [action], PAY[after], np.eye(STATES)[after], ends and after == 3, number))
            at = after
            if ends and after == 3:
                break
    return Transitions.from_numpy(*(np.array(column) for column in zip(*rows, strict=True)), spaces=SPACES)


def exact(on: list[bool], *, ends: bool = True) -> np.ndarray:
    """Values of the ring's states by the linear equations."""
    move, pay = np.zeros((STATES, STATES)), np.zeros(STATES)
    for at in range(STATES):
        after = (at + (1 if on[at] else -1)) % STATES
        pay[at] = PAY[after]
        move[at, after] = 0.0 if ends and after == 3 else GAMMA
    return np.linalg.solve(np.eye(STATES) - move, pay)


@pytest.mark.parametrize("on", [[True] * 5, [False, True, True, True, False]])
def test_values_of_a_ring(on):
    """Any policy, whoever wrote the log: a random walk."""
    log = ring(0)
    found = fqe(Mover(on), log, start=torch.eye(STATES)[[0, 1, 2, 4]], **QUICK)
    wanted = exact(on)[[0, 1, 2, 4]]
    np.testing.assert_allclose(found.values.mean(0), wanted, atol=0.12)
    assert found.value.value == pytest.approx(wanted.mean(), abs=0.08)
    assert found.value.low <= found.value.value <= found.value.high
    assert abs(found.residual) < 0.03


def test_a_time_out_is_no_end():
    log = ring(0, ends=False)
    found = fqe(Mover([True] * 5), log, start=torch.eye(STATES), **QUICK)
    np.testing.assert_allclose(found.values.mean(0), exact([True] * 5, ends=False), atol=0.5)  # else below 3


def test_start_states_come_from_the_log_and_seeds_repeat():
    log = ring(1, episodes=30)
    some = QUICK | {"updates": 40}
    one, same, other = (fqe(Mover([True] * 5), log, seed=seed, **some) for seed in (0, 0, 1))
    assert one.values.shape == (3, 30)
    assert np.array_equal(one.values, same.values)
    assert not np.array_equal(one.values, other.values)
    assert set(one.to_json()) == {"value", "residual", "gamma"}


def test_values_stay_within_what_rewards_allow():
    """A policy that the log never shows: the critic may be wrong, not endless."""
    log = ring(2, episodes=30)
    log = log[log.action[:, 0] < 1]
    found = fqe(Mover([True] * 5), log, **QUICK | {"updates": 200, "tau": 1.0, "learning_rate": 3e-2})
    assert np.abs(found.values).max() < 2 * 2.0 / (1 - GAMMA)


def test_bootstraps_are_of_whole_episodes():
    log = ring(3, episodes=8)
    rows, lengths = bootstrapped_rows(log, 3, generator(0))
    assert rows[0, : lengths[0]].tolist() == list(range(len(log)))
    for pool, length in zip(rows[1:], lengths[1:], strict=True):
        number, counts = log.episode[pool[:length]].unique(return_counts=True)
        sizes = torch.tensor([int((log.episode == each).sum()) for each in number])
        assert not bool((counts % sizes).any())
        assert int((counts // sizes).sum()) == 8


def test_bad_input_is_named():
    log = ring(4, episodes=4)
    policy = Mover([True] * 5)
    with pytest.raises(ValueError, match=r"gamma must be in \[0, 1\), got 1"):
        fqe(policy, log, gamma=1.0)
    with pytest.raises(DataError, match="all rewards of the log are 0"):
        fqe(policy, replace(log, reward=torch.zeros(len(log))))
    with pytest.raises(DataError, match="holds no action"):
        fqe(policy, replace(log, action=torch.full_like(log.action, torch.nan)))
    with pytest.raises(DataError, match="one episode"):
        fqe(policy, log[log.episode == 0])

    class Broken(Mover):
        def predict(self, observation, state=None, episode_start=None, deterministic=False):
            return np.full((len(observation), 1), np.nan, np.float32), state

    with pytest.raises(ValueError, match="Broken returned actions that are not finite"):
        fqe(Broken([True] * 5), log)
