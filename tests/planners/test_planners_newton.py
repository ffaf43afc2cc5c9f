"""NewtonPlanner: one step solves linear models, barriers hold, and it tracks better than a PID controller."""

import math

import gymnasium as gym
import numpy as np
import pytest
import torch

from learneddyn.agents import MPC
from learneddyn.core import Task, Transitions, generator
from learneddyn.models import Koopman
from learneddyn.planners import NewtonPlanner
from learneddyn.spaces import Spaces
from learneddyn.world import World

DT = 0.1


def searched(planner, score, low, high, lanes=1):
    state = planner.start(lanes, low, high)
    return planner.plan(score, state, low, high, generator(0))


def test_one_step_reaches_the_optimum_of_a_linear_model():
    advance = torch.tensor([[1.0, 0.1], [-0.1, 0.9]], dtype=torch.float64)
    push = torch.tensor([0.0, 0.1], dtype=torch.float64)

    def score(plans):
        state = torch.tensor([[0.4, -1.0], [1.0, 0.3]], dtype=torch.float64)[:, None].expand(-1, plans.shape[1], -1)
        total = 0
        for action in plans.unbind(dim=2):
            state = state @ advance.T + action * push
            total = total - (state[..., 0] - 0.3).square()
        return total

    wide = torch.tensor([1e4], dtype=torch.float64)
    planner = NewtonPlanner(horizon=8, moves=3, iterations=1, effort=0.01, damping=1e-12)
    plan, _ = searched(planner, score, -wide, wide, lanes=2)
    free = plan[:, :3].clone().requires_grad_()
    whole = torch.cat([free, free[:, -1:].expand(-1, 5, -1)], dim=1)
    moves = torch.cat([free[:, :1], free[:, 1:] - free[:, :-1]], dim=1)
    cost = 0.01 * moves.square().sum() - score(whole[:, None]).sum()
    assert torch.autograd.grad(cost, free)[0].abs().max() < 1e-8
    assert torch.equal(plan[:, 3:], plan[:, 2:3].expand(-1, 5, -1)), "the last free action is held"


def test_the_barrier_keeps_off_the_bounds_and_is_stationary():
    low, high = torch.tensor([-1.0], dtype=torch.float64), torch.tensor([1.0], dtype=torch.float64)
    planner = NewtonPlanner(horizon=1, moves=1, iterations=12, barrier=1e-3)
    plan, _ = searched(planner, lambda plans: 10 * plans.sum(dim=(2, 3)), low, high)
    u = plan.item()
    assert 0.98 < u < 1.0
    assert -10 + 1e-3 * (1 / (1 - u) ** 2 - 1 / (1 + u) ** 2) == pytest.approx(0.0, abs=1e-6)
    plan, _ = searched(NewtonPlanner(horizon=1, moves=1), lambda plans: 10 * plans.sum(dim=(2, 3)), low, high)
    assert plan.item() == 1.0


def test_a_saddle_does_not_hold_it():
    low, high = torch.full((1,), -2.0), torch.full((1,), 2.0)
    planner = NewtonPlanner(horizon=1, moves=1, iterations=15)

    def score(plans):
        x = plans[:, :, 0, 0] + 0.05
        return 2 * x.square() - x.pow(4)

    plan, _ = searched(planner, score, low, high)
    assert abs(abs(plan.item() + 0.05) - 1.0) < 1e-3


def test_a_score_without_a_gradient_is_refused():
    one = torch.ones(1)
    with pytest.raises(ValueError, match="needs a score with a gradient"):
        searched(NewtonPlanner(), lambda plans: plans.detach().sum(dim=(2, 3)), -one, one)
    with pytest.raises(ValueError, match="moves must lie between 1 and 8"):
        NewtonPlanner(horizon=8, moves=9)


def plant(obs, force):
    """Return (position, velocity, reference, its cosine) of mass = spring = damper = 1 a step later, exactly."""
    generator_matrix = torch.tensor([[0.0, 1.0, 0.0], [-1.0, -1.0, 1.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    step = torch.linalg.matrix_exp(DT * generator_matrix)[:2]
    moved = torch.cat([obs[:, :2], force], dim=1) @ step.T
    c, s = math.cos(0.5 * DT), math.sin(0.5 * DT)
    reference = obs[:, 2:] @ torch.tensor([[c, -s], [s, c]], dtype=torch.float64)
    return torch.cat([moved, reference], dim=1)


def tracking_error(act):
    """Return the root mean squared distance to sin(t / 2) from 2 s to 8 s."""
    obs, off = torch.tensor([[0.0, 0.0, 0.0, 1.0]], dtype=torch.float64), []
    for step in range(80):
        obs = plant(obs, torch.tensor([[act(obs[0].tolist(), step)]], dtype=torch.float64).clamp(-3, 3))
        off.append(float(obs[0, 0] - obs[0, 2]))
    return float(np.sqrt(np.square(off[20:]).mean()))


def test_it_tracks_better_than_pid_on_a_learned_model():
    rng = generator(0)
    obs = 4 * torch.rand(4000, 4, generator=rng, dtype=torch.float64) - 2
    force = 6 * torch.rand(4000, 1, generator=rng, dtype=torch.float64) - 3
    box = gym.spaces.Box
    spaces = Spaces(box(-np.inf, np.inf, (4,), np.float32), box(-3.0, 3.0, (1,), np.float32))
    nothing = torch.zeros(4000)
    columns = (obs.float(), force.float(), nothing, plant(obs, force).float(), nothing.bool(), torch.arange(4000))
    model = Koopman(lift="linear", control="linear")
    model.fit(Transitions(*columns, spaces, "springs"), rng=rng)
    task = Task(
        "Spring-v0",
        lambda o, a, after: -(after[:, 0] - after[:, 2]).square(),
        lambda after: torch.zeros(len(after), dtype=torch.bool),
    )
    planner = NewtonPlanner(horizon=8, moves=3, iterations=1, effort=1e-4, barrier=1e-6, halvings=3)
    mpc, state = MPC(World(model, task, sampler="mean"), planner), None

    def newton(obs, step):
        nonlocal state
        action, state = mpc.predict(np.array(obs, np.float32), state, np.array([step == 0]), deterministic=True)
        return float(action[0])

    total, last = 0.0, 0.0

    def pid(obs, step):
        nonlocal total, last
        error = obs[2] - obs[0]
        total, slope, last = total + DT * error, (error - last) / DT, error
        return 8 * error + 4 * total + 2 * slope

    assert tracking_error(newton) < 0.5 * tracking_error(pid)
