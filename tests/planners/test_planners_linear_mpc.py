"""Linear MPC: its program is the model, its optimum is the known one, and it balances a pole it has only data of."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from scipy.linalg import solve_discrete_are
from scipy.optimize import lsq_linear

from learneddyn.core import Task, Transitions, generator
from learneddyn.data import collect
from learneddyn.evaluation.fidelity import open_loop
from learneddyn.models import Koopman
from learneddyn.planners import LinearMPC
from learneddyn.planners.quadratic import box_minimum
from learneddyn.spaces import Spaces
from learneddyn.testing import check_policy
from learneddyn.world import World

A = torch.tensor([[1.0, 0.0], [0.2, 1.0]], dtype=torch.float64)
"""Rows: (place, speed) after 0.2 s."""
B = torch.tensor([[0.02, 0.2]], dtype=torch.float64)
WEIGHTS, EFFORT = [1.0, 0.1], 0.05


def spaces(o=2, bound=1.0, a=1):
    box = gym.spaces.Box
    return Spaces(box(-np.inf, np.inf, (o,), np.float32), box(-bound, bound, (a,), np.float32))


def cart(bound=1.0, growth=1.0, a=1, **arguments):
    settings = {"goal": [0.0, 0.0], "weights": WEIGHTS, "effort": EFFORT, "horizon": 10} | arguments
    return LinearMPC(growth * A, B, torch.eye(2).double(), lambda obs: obs, spaces(bound=bound, a=a), **settings)


@pytest.mark.parametrize("seed", range(6))
def test_the_minimum_on_a_box_is_that_of_an_independent_solver(seed):
    rng, n = np.random.default_rng(seed), 12
    root = rng.normal(size=(n + seed, n))  # from barely to well determined
    targets = 3 * rng.normal(size=(7, n + seed))
    low, high = -rng.uniform(0.1, 1, n), rng.uniform(0.1, 1, n)
    found = box_minimum(*(torch.as_tensor(part) for part in (root.T @ root, -targets @ root, low, high)))
    assert float(found.gap.max()) < 1e-8
    for x, target in zip(found.x.numpy(), targets, strict=True):
        other = lsq_linear(root, target, (low, high), method="bvls").x
        costs = [0.5 * np.square(root @ each - target).sum() for each in (x, other)]
        assert costs[0] <= costs[1] + 1e-9
        assert np.allclose(x, other, atol=1e-6)
        assert ((low <= x) & (x <= high)).all()
    assert found.iterations < 40


def test_flat_and_steep_directions_are_solved_for_together():
    """Curvatures ten orders of magnitude apart: the certificate says that each of the minima is one."""
    rng, n = generator(1), 30
    for seed in range(6):
        axes = torch.linalg.qr(torch.randn(n, n, generator=generator(seed), dtype=torch.float64)).Q
        hessian = (axes * 10 ** (10 * torch.rand(n, generator=rng, dtype=torch.float64) - 5)) @ axes.T
        linear = 100 * torch.randn(50, n, generator=rng, dtype=torch.float64)
        found = box_minimum(0.5 * (hessian + hessian.T), linear, *(torch.full((n,), side).double() for side in (-1, 1)))
        assert float((found.gap / (1 + linear.abs().amax(dim=1))).max()) < 1e-8
        assert found.iterations < 40


def riccati(horizon):
    """Yield the gains of the finite-horizon regulator, first step first."""
    a, b, q = A.T.numpy(), B.T.numpy(), np.diag(WEIGHTS)
    value, gains = q, []
    for step in range(horizon):
        # The cost counts states from the first step on, so the last gain meets the last weight alone.
        gains.append(np.linalg.solve(EFFORT * np.eye(1) + b.T @ value @ b, b.T @ value @ a))
        value = a.T @ value @ (a - b @ gains[-1]) + q * (step < horizon)
    return gains[::-1]


@pytest.mark.parametrize("horizon", [1, 4, 15])
def test_far_from_the_bounds_the_plan_is_the_regulators(horizon):
    obs = torch.tensor([[1.0, -0.5], [0.3, 2.0]])
    actions = cart(bound=100.0, horizon=horizon).plan(obs).actions
    state = obs.double().numpy()
    for step, gain in enumerate(riccati(horizon)):
        wanted = -state @ gain.T
        assert np.allclose(actions[:, step].numpy(), wanted, atol=1e-6)
        state = state @ A.numpy() + wanted @ B.numpy()


def test_a_long_horizon_is_the_infinite_one():
    a, b = A.T.numpy(), B.T.numpy()
    value = solve_discrete_are(a, b, np.diag(WEIGHTS), EFFORT * np.eye(1))
    gain = np.linalg.solve(EFFORT * np.eye(1) + b.T @ value @ b, b.T @ value @ a)
    action, _ = cart(bound=100.0, horizon=80).predict(np.array([1.0, -0.5], np.float32))
    assert action == pytest.approx(-gain @ [1.0, -0.5], abs=1e-5)


def test_the_cost_is_what_the_system_pays_and_no_other_plan_pays_less():
    mpc, obs = cart(goal=[0.5, 0.0], final=3.0), torch.tensor([[2.0, 0.4], [-1.0, 0.0]])
    found = mpc.plan(obs)
    assert float(found.actions.abs().max()) == 1.0, "the bounds are met"

    def cost(actions):
        state, total = obs.double(), torch.zeros(2, dtype=torch.float64)
        for step in range(10):
            state = state @ A + actions[:, step] @ B
            off = (state - torch.tensor([0.5, 0.0])).square() @ torch.tensor(WEIGHTS).double()
            total = total + off * (3.0 if step == 9 else 1.0) + EFFORT * actions[:, step].square().sum(dim=1)
        return total, state

    total, last = cost(found.actions)
    assert torch.allclose(total, found.cost)
    assert torch.allclose(last, found.outputs[:, -1])
    rng = generator(0)
    for size in (1e-3, 0.1, 1.0):
        other = found.actions + size * torch.randn(2, 10, 1, generator=rng, dtype=torch.float64)
        assert (cost(other.clamp(-1, 1))[0] > total).all()


def test_a_lane_is_planned_for_as_if_alone():
    mpc, obs = cart(), np.array([[2.0, 0.4], [-1.0, 0.0], [0.1, 0.1]], np.float32)
    together, _ = mpc.predict(obs)
    for lane in range(3):
        assert mpc.predict(obs[lane])[0] == pytest.approx(together[lane], abs=1e-6)
    check_policy(mpc, mpc.spaces)


def test_entries_of_very_different_effect_are_solved_for():
    """An unstable system, whose first actions count far more than its last."""
    mpc = cart(growth=1.2, horizon=40)
    found = mpc.plan(torch.randn(50, 2, generator=generator(0)))
    assert float((found.gap / (1 + found.cost)).max()) < 1e-6
    assert float(mpc.plan(torch.tensor([[0.3, -0.2]])).outputs[0, -1].abs().max()) < 0.05


def swings(rows=3000):
    """A damped pendulum with a motor, in (angle, speed), every row an episode of its own."""
    rng = generator(0)
    obs = (2 * torch.rand(rows, 2, generator=rng) - 1) * torch.tensor([3.0, 4.0])
    action = 2 * torch.rand(rows, 1, generator=rng) - 1
    speed = obs[:, 1:] - 0.1 * (obs[:, :1].sin() + 0.2 * obs[:, 1:]) + 0.2 * action
    after = torch.cat([obs[:, :1] + 0.1 * speed, speed], dim=1)
    nothing = torch.zeros(rows)
    columns = (obs, action, nothing, after, nothing.bool(), torch.arange(rows))
    return Transitions(*columns, spaces(), "swings")


@pytest.mark.parametrize("angles", [[], [0]])
def test_outputs_are_the_free_run_of_the_koopman_model(angles):
    data = swings()
    model = Koopman(degree=3, control="linear", relift=False, angles=angles)
    model.fit(data, rng=generator(0))
    goal = [0.0, 1.0, 0.0] if angles else [0.0, 0.0]
    mpc = LinearMPC(*model.linear_system(), model.spaces, goal=goal, weights=[1.0] * len(goal), horizon=6)
    found = mpc.plan(data.obs[:5])
    task = Task("Swing-v0", lambda s, a, n: n[:, 0], lambda n: torch.zeros(len(n), dtype=torch.bool))
    run = open_loop(World(model, task, sampler="mean"), data.obs[:5], found.actions.float(), generator(0)).obs
    if not angles:
        assert torch.allclose(run.double(), found.outputs, atol=1e-3)
        return
    # Columns without angles come first, then cosines and sines, which the model's answers turn back into angles.
    assert torch.allclose(run[..., 1].double(), found.outputs[..., 0], atol=1e-3)
    read = torch.atan2(found.outputs[..., 2], found.outputs[..., 1])
    assert torch.allclose((run[..., 0].double() - read).cos(), torch.ones_like(read), atol=1e-3)


@pytest.mark.parametrize("lift", ["polynomial", "learned"])
def test_the_exported_system_is_a_copy(lift):
    data = swings()
    model = Koopman(lift, degree=2, centres=5, epochs=1, control="linear")
    model.fit(data, rng=generator(0))
    before, system = model.predict(data.obs, data.action).mean.clone(), model.linear_system()
    lifted = system.lift(data.obs).clone()
    for part in system[:3]:
        part.zero_()
    assert torch.equal(model.predict(data.obs, data.action).mean, before), "a changed export leaves the model alone"
    model.fit(swings(50), rng=generator(1))
    with torch.no_grad():
        for part in [*model.parameters(), *model.buffers()]:
            part.zero_()
    assert torch.equal(system.lift(data.obs), lifted), "and a changed model the export"


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e38])
def test_a_lane_that_is_not_finite_is_alone_with_it(bad):
    mpc = cart(weights=[1e300, 0.1] if bad == 1e38 else WEIGHTS)
    obs = torch.randn(4, 2, generator=generator(0))
    alone = mpc.plan(obs)
    obs[2, 0] = bad
    found = mpc.plan(obs)
    others = [0, 1, 3]
    assert torch.equal(found.actions[others], alone.actions[others])
    assert torch.equal(found.cost[others], alone.cost[others])
    assert (found.actions[2] == 0).all(), "the middle of the range"
    assert found.cost[2] == found.gap[2] == torch.inf
    assert found.outputs[2].isnan().all()
    action, _ = mpc.predict(obs.numpy())
    assert (action[2] == 0).all()
    assert np.isfinite(action).all()


def test_it_balances_a_pole_that_it_has_only_random_steps_of():
    data = collect("InvertedPendulum-v5", steps=1000, seed=0, progress=False)
    model = Koopman("linear", control="linear")
    model.fit(data, rng=generator(0))
    mpc = LinearMPC(
        *model.linear_system(), model.spaces, goal=[0.0] * 4, weights=[1.0, 10.0, 0.1, 0.1], effort=0.01, horizon=25
    )
    with gym.make("InvertedPendulum-v5") as env:
        obs, state = env.reset(seed=1)[0] + [0.3, 0.0, 0.0, 0.0], None
        for _ in range(100):
            action, state = mpc.predict(obs, state)
            obs, _, fallen, *_ = env.step(action)
            assert not fallen
    assert np.abs(obs).max() < 0.02


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"goal": [0.0]}, "goal needs 2 finite numbers"),
        ({"weights": [1.0, -1.0]}, "weights must not be negative"),
        ({"effort": 0.0}, "effort must lie between"),
        ({"horizon": 0}, "horizon must lie between"),
        ({"bound": np.inf}, "a bounded Box"),
        ({"bound": 0.0}, "every action needs room between its bounds"),
        ({"a": 2}, "inputs must have 2 rows"),
        ({"growth": 1e300}, "leaves the finite numbers within 10 steps"),
        ({"growth": 3.0, "horizon": 60}, "than float64 can hold"),
    ],
)
def test_bad_arguments(arguments, told):
    with pytest.raises(ValueError, match=told):
        cart(**arguments)


def test_models_that_are_no_linear_system():
    for model in (Koopman(degree=2), Koopman(degree=1, control="linear", delays=2)):
        model.fit(swings(50), rng=generator(0))
        with pytest.raises(ValueError, match="a linear system needs control='linear' and delays=1"):
            model.linear_system()
