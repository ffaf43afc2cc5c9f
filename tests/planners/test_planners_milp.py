"""MILP: the program is the network, its optimum is the best plan, and a time limit never costs more than no search."""

import sys

import gymnasium as gym
import numpy as np
import pytest
import torch

from learneddyn.core import generator
from learneddyn.planners import MILP
from learneddyn.spaces import Spaces


def spaces(o, a, bound=1.0):
    box = gym.spaces.Box
    return Spaces(box(-np.inf, np.inf, (o,), np.float32), box(-bound, bound, (a,), np.float32))


def network(widths, o=2, a=1, seed=0):
    """A double integrator with a random ReLU network on top, as a cascade."""
    rng, pairs, stack = generator(seed), [], o + a
    for width in widths:
        inner = torch.randn(width, stack, generator=rng, dtype=torch.float64)
        pairs.append((inner, 0.3 * torch.randn(width, generator=rng, dtype=torch.float64)))
        stack += width
    last = 0.15 * torch.randn(o, stack, generator=rng, dtype=torch.float64)
    last[:, :o] += torch.tensor([[1.0, 0.3], [0.0, 1.0]], dtype=torch.float64)
    last[1, o] += 0.3
    return [*pairs, (last, torch.zeros(o, dtype=torch.float64))]


def planner(cascade, horizon=4, **arguments):
    settings = {"goal": [0.0, 0.0], "weights": [1.0, 0.1], "effort": 0.01, "time_limit": 60.0, "gap": 1e-6}
    return MILP(cascade, spaces(2, 1), horizon=horizon, **(settings | arguments))


@pytest.mark.parametrize("tighten", [True, False])
def test_the_program_allows_exactly_what_the_network_says(tighten):
    milp, rng = planner(network([4, 3]), horizon=3, tighten=tighten), np.random.default_rng(0)
    for _ in range(15):
        obs, plan = rng.uniform(-2, 2, 2), rng.uniform(-1, 1, (3, 1))
        assert np.abs(milp.encoded(obs, plan) - milp.replay(obs, plan)[0]).max() < 1e-6


def test_the_replay_is_the_cascade():
    cascade = network([3])
    (inner, constant), (last, bias) = cascade
    v = torch.tensor([0.4, -0.2, 0.7], dtype=torch.float64)
    wanted = last @ torch.cat([v, (inner @ v + constant).relu()]) + bias
    states, inputs = planner(cascade, horizon=1).replay(v[:2].numpy(), v[2:, None].numpy())
    assert np.allclose(states[0], wanted)
    assert np.allclose(inputs[0][0], inner @ v + constant)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_optimum_is_that_of_brute_force(seed):
    milp, obs = planner(network([5], seed=seed), horizon=2), np.array([1.0, -0.3])
    grid = np.linspace(-1, 1, 81)
    costs = {(u, w): milp.cost(obs, np.array([[u], [w]])) for u in grid for w in grid}
    solved, least = milp.plan(obs), min(costs.values())
    assert solved.optimal
    assert solved.cost <= least + 1e-9
    assert solved.cost == pytest.approx(least, abs=0.02), "the grid is 0.025 wide"
    assert solved.cost == pytest.approx(solved.bound, abs=1e-4)
    assert solved.cost == pytest.approx(milp.cost(obs, solved.actions))


def test_bounds_by_linear_programs_leave_fewer_binaries_and_the_same_optimum():
    obs, cascade = np.array([1.0, 0.5]), network([4], seed=4)
    tight, loose = (planner(cascade, horizon=4, tighten=tighten).plan(obs) for tighten in (True, False))
    assert tight.cost == pytest.approx(loose.cost, abs=1e-5)
    assert tight.binaries < loose.binaries


def test_an_integrator_goes_straight_to_its_goal():
    cascade = [(torch.tensor([[1.0, 1.0]]).double(), torch.zeros(1).double())]
    settings = {"goal": [0.5], "weights": [1.0], "effort": 0.01, "horizon": 5}
    solved = MILP(cascade, spaces(1, 1), **settings).plan(np.array([3.0]))
    assert np.allclose(solved.actions[:, 0], [-1, -1, -0.5, 0, 0], atol=1e-6)
    assert solved.cost == pytest.approx(1.5 + 0.5 + 0.01 * 2.5)
    assert solved.binaries == 0
    later = MILP(cascade, spaces(1, 1), final=10.0, **settings | {"horizon": 1}).plan(np.array([3.0]))
    assert later.cost == pytest.approx(15.01)


def test_a_time_limit_gives_a_plan_no_worse_than_the_one_it_began_from():
    milp = planner(network([16], seed=3), horizon=12, time_limit=0.02)
    obs, warm = np.array([1.5, 0.2]), np.full((12, 1), -0.3)
    solved = milp.plan(obs, warm)
    assert not solved.optimal
    assert solved.cost <= milp.cost(obs, warm) + 1e-12
    assert (np.abs(solved.actions) <= 1).all()


def test_it_is_a_policy_that_shifts_its_plans():
    milp = planner(network([3]), horizon=3)
    obs = np.array([[1.0, 0.0], [-1.0, 0.2]], np.float32)
    action, state = milp.predict(obs)
    plans = [milp.plan(row).actions for row in obs.astype(np.float64)]
    assert action.shape == (2, 1)
    assert action.dtype == np.float32
    assert np.allclose(action[:, 0], [plan[0, 0] for plan in plans], atol=1e-5)
    assert np.allclose(state[0][0][:, 0], [*plans[0][1:, 0], plans[0][-1, 0]], atol=1e-5)
    again, _ = milp.predict(obs, state, np.array([True, False]))
    assert np.allclose(again[0], action[0], atol=1e-5)
    one, _ = milp.predict(obs[0])
    assert one.shape == (1,)


def test_bad_input_is_named():
    cascade = network([3])
    for arguments, message in (
        ({"goal": [0.0]}, "goal needs 2 finite numbers"),
        ({"weights": [1.0, -1.0]}, "weights must not be negative"),
        ({"time_limit": 0.0}, "time_limit must lie between"),
        ({"horizon": 0}, "horizon must lie between"),
    ):
        with pytest.raises(ValueError, match=message):
            planner(cascade, **arguments)
    with pytest.raises(ValueError, match=r"pair 1 of the cascade must have shapes \(2, 6\)"):
        planner([cascade[0], (torch.zeros(2, 3), torch.zeros(2))])
    with pytest.raises(ValueError, match="bounded Box"):
        MILP(cascade, spaces(2, 1, np.inf), goal=[0.0, 0.0], weights=[1.0, 1.0])
    with pytest.raises(ValueError, match="the observation must be finite"):
        planner(cascade).plan(np.array([np.nan, 0.0]))
    with pytest.raises(ValueError, match=r"the plan must be finite numbers of shape \(4, 1\)"):
        planner(cascade).plan(np.zeros(2), np.zeros((3, 1)))


def test_a_missing_solver_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "highspy", None)
    with pytest.raises(ImportError, match=r"learneddyn\[models\]"):
        planner(network([3]))
