"""Neural ODEs: known flows, held actions, second order, solvers that agree, regularisation at the solver's own step."""

import builtins
import copy
import math

import gymnasium as gym
import numpy as np
import pytest
import torch

from learneddyn.core import DataError, Transitions, generator
from learneddyn.models import NeuralODE
from learneddyn.models.forcing import CausalWeights, forced_loss, stepwise_loss
from learneddyn.models.neural_ode import _Watched
from learneddyn.spaces import Spaces

DT = 0.1


def log(episodes=20, length=20, actions=1, seed=0):
    """An oscillator x'' = -x + u, solved exactly; the reward of a step is its mean position."""
    rng = generator(seed)
    turn = torch.linalg.matrix_exp(DT * torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)).float()
    state, rows = torch.randn(episodes, 2, generator=rng), []
    for _ in range(length):
        push = torch.rand(episodes, actions, generator=rng) * 2 - 1
        rest = torch.cat([push.sum(dim=1, keepdim=True), torch.zeros(episodes, 1)], dim=1)
        after = (state - rest) @ turn.T + rest
        # x = -x'' + u, so that the mean position is the mean push minus the change of velocity.
        rows.append((state, push, rest[:, 0] - (after - state)[:, 1] / DT, after))
        state = after
    obs, push, reward, after = (torch.stack(part, dim=1).flatten(0, 1) for part in zip(*rows, strict=True))
    box, n = gym.spaces.Box, episodes * length
    spaces = Spaces(box(-np.inf, np.inf, (2,), np.float32), box(-1.0, 1.0, (actions,), np.float32))
    episode = torch.arange(episodes).repeat_interleave(length)
    return Transitions(obs, push, reward, after, torch.zeros(n).bool(), episode, spaces, "oscillator")


def fitted(data, **arguments):
    model = NeuralODE(**{"dt": DT, "hidden": [16], "updates": 3, "batch_size": 8, "learn_reward": True} | arguments)
    report = model.fit(data, rng=generator(0))
    return model, report


@pytest.fixture(scope="module")
def trained():
    """Second order, with a reward, on windows."""
    return fitted(
        log(),
        positions=[0],
        velocities=[1],
        window=2,
        updates=300,
        batch_size=64,
        learning_rate=0.02,
        final_learning_rate=1e-3,
    )


def test_an_oscillator_is_learned_from_windows(trained):
    model, report = trained
    assert report.metrics["holdout_mse"] < 5e-3, "most of it is the reward's, whose variance is 1"
    assert report.history[-1]["loss"] < 0.01 * report.history[0]["loss"]
    test = log(4, 20, seed=1)
    obs, actions = test.obs.view(4, 20, 2), test.action.view(4, 20, 1)
    state = obs[:, 0]
    for step in range(20):
        prediction = model.predict(state, actions[:, step])
        state = prediction.mean[0]
    assert (state - test.next_obs.view(4, 20, 2)[:, -1]).abs().max() < 0.15
    assert prediction.reward_mean is not None
    assert (prediction.reward_mean[0] - test.reward.view(4, 20)[:, -1]).abs().max() < 0.15


def test_the_position_moves_by_the_velocity(trained):
    model, _ = trained
    y = model.embed(torch.randn(6, 2, generator=generator(2)))
    slope = model.slope(y, torch.randn(6, 1, generator=generator(3)))
    speed = y[:, 1] * model.obs_std[1] + model.obs_mean[1]
    assert torch.allclose(slope[:, 0] * model.obs_std[0], speed, atol=1e-6)


def test_the_solvers_agree_and_the_evaluations_are_counted(trained):
    model, _ = trained
    data = log(seed=4)
    obs, action = data.obs[:5], data.action[:5]
    found = model.solve(obs, action, torch.tensor([DT, 2 * DT]))
    assert found.obs.shape == (2, 5, 2)
    once = model.predict(obs, action).mean[0]
    assert torch.allclose(found.obs[0], once, atol=1e-4)
    assert torch.allclose(found.obs[1], model.predict(once, action).mean[0], atol=1e-4)
    costs = []
    for model.tolerance in (1e-3, 1e-7):
        costs.append(model.solve(obs, action, torch.tensor([2.0])).evaluations)
    model.tolerance = 1e-5
    assert costs[0] < costs[1]
    assert (costs[0] - 2) % 6 == 0, "two before the first step, six a step: the last stage of one begins the next"


def pull(obs, action, stiffness):
    """The oscillator's own equations."""
    return torch.stack([obs[:, 1], action[:, 0] - stiffness * obs[:, 0]], dim=1)


def exact_pull(obs, action):
    """The same in float64, as constants of NumPy would make it."""
    return pull(obs.double(), action.double(), 1.0)


def reward_only(obs, action):
    return action


@pytest.mark.parametrize("order", [{}, {"positions": [0], "velocities": [1]}])
@pytest.mark.parametrize("learn_reward", [False, True])
def test_what_is_known_need_not_be_learned(order, learn_reward, tmp_path):
    still = {"updates": 1, "learning_rate": 1e-9, "final_learning_rate": 1e-9, "learn_reward": learn_reward} | order
    data = log()
    model, _ = fitted(data, known=f"{__name__}.pull", known_arguments={"stiffness": 1.0}, **still)
    assert torch.allclose(model.predict(data.obs, data.action).mean[0], data.next_obs, atol=1e-5)
    model.save(tmp_path / "model")
    again = NeuralODE.load(tmp_path / "model").predict(data.obs, data.action).mean
    assert torch.equal(again, model.predict(data.obs, data.action).mean)


@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
def test_a_known_part_may_answer_in_float64(solver):
    model, _ = fitted(log(4, 5), known=f"{__name__}.exact_pull", solver=solver)
    assert model.predict(torch.ones(2, 2), torch.zeros(2, 1)).mean.dtype == torch.float32


def test_the_network_learns_what_is_not_known():
    data, budget = log(), {"updates": 100, "batch_size": 64, "learning_rate": 0.02, "learn_reward": False}
    wrong, _ = fitted(data, known=f"{__name__}.pull", known_arguments={"stiffness": 0.5}, **(budget | {"updates": 1}))
    model, _ = fitted(data, known=f"{__name__}.pull", known_arguments={"stiffness": 0.5}, **budget)
    errors = [(m.predict(data.obs, data.action).mean[0] - data.next_obs).square().mean() for m in (wrong, model)]
    assert errors[1] < 0.1 * errors[0]


def test_a_known_part_has_the_shape_of_the_observations():
    with pytest.raises(ValueError, match=r"known must return the shape \[b, 2\] of the observations, got \(2, 1\)"):
        fitted(log(2, 3), known=f"{__name__}.reward_only")


def test_gradients_are_clipped_over_windows_alone(monkeypatch):
    norms, real = [], torch.optim.Adam.step

    def step(self, *arguments):
        gradients = [p.grad.flatten() for group in self.param_groups for p in group["params"]]
        norms.append(float(torch.cat(gradients).norm()))
        return real(self, *arguments)

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    fitted(log(), window=4, clip=0.01)
    assert norms == pytest.approx([0.01] * 3, rel=1e-3)
    norms.clear()
    fitted(log(), window=1, clip=0.01)
    assert min(norms) > 0.02


def test_a_flow_that_the_solver_cannot_follow(trained):
    model, _ = trained
    steep = copy.deepcopy(model)
    with torch.no_grad():
        steep.network[-1].weight.fill_(1e30)
    with pytest.raises(
        FloatingPointError, match=r"dopri5 gave up after .* at tolerance 1e-05: .*: lower learning_rate"
    ):
        steep.solve(torch.randn(3, 2, generator=generator(5)), torch.zeros(3, 1), torch.tensor([DT]))
    for times in ([0.0, 1.0], [1.0, 1.0], [2.0, 1.0]):
        with pytest.raises(ValueError, match="times must increase, the first one above 0"):
            model.solve(torch.zeros(1, 2), torch.zeros(1, 1), torch.tensor(times))


def test_a_fit_that_explodes_leaves_the_model_as_it_was():
    data = log(actions=0)
    model, _ = fitted(data, solver="dopri5", window=4)
    before = model.predict(data.obs, data.action).mean
    model.learning_rate = model.final_learning_rate = 1e25
    with pytest.raises(FloatingPointError, match="dopri5 gave up"):
        model.fit(data, rng=generator(0))
    assert torch.equal(model.predict(data.obs, data.action).mean, before)


@pytest.mark.parametrize("actions", [0, 1])
@pytest.mark.parametrize("regularisation", ["none", "error", "stiffness"])
@pytest.mark.parametrize("draw", ["accepted", "uniform"])
def test_adaptive_training_follows_the_data(actions, regularisation, draw):
    data = log(6, 12, actions)
    model, report = fitted(data, solver="dopri5", window=4, regularisation=regularisation, draw=draw)
    entry = report.history[-1]
    assert entry["evaluations"] > 7 * (1 if actions == 0 else 4)
    assert entry.get("regularised", 1.0) > 0
    assert ("regularised" in entry) == (regularisation != "none")
    x, u, target = (part[:4][None] for part in model._sequences(data))
    said, _, _ = model._solved(x[:, 0], u, generator(0))
    assert said.shape == target.shape
    assert torch.allclose(stepwise_loss(said / model.change, target), forced_loss(model, x, u, target, 0.0), rtol=1e-3)


def test_the_regularisation_sees_the_solvers_own_step():
    data = log(actions=0)
    model, _ = fitted(data, solver="dopri5", window=4, regularisation="error", learn_reward=False)
    with torch.no_grad():
        model.network[-1].weight.normal_(generator=generator(1))
    x, u, _ = (part[:4][None] for part in model._sequences(data))
    watched = _Watched(model._under(u[:, 0]))
    model._adaptive(watched, x[:, 0], torch.tensor([0.4], dtype=torch.float64))
    begin, state, h = watched.accepted[-1]
    assert begin < 0.4 <= begin + h
    own, short = (model._local(watched.slope, state, length).detach() for length in (h, h / 6))
    assert own > 100 * short, "the estimate falls with the sixth power of the step"
    local = model._local(watched.slope, state, h)
    (gradient,) = torch.autograd.grad(local, model.network[-1].weight)
    assert gradient.abs().max() > 0
    with torch.no_grad():  # a drift has no error, at any length
        model.network[-1].weight.zero_()
        model.network[-1].bias.fill_(0.3)
    assert model._local(watched.slope, state, h).detach() < 1e-3 * own
    model.regularisation = "stiffness"
    assert model._local(watched.slope, state, h).detach() == 0.0


def test_causal_weights_wait_for_the_steps_before():
    weigh = CausalWeights([1.0, 10.0], learned=0.9)
    losses = torch.tensor([0.5, 0.2, 0.0], requires_grad=True)
    weights = weigh(losses)
    assert weights.tolist() == pytest.approx([1.0, np.exp(-0.5), np.exp(-0.7)])
    assert not weights.requires_grad
    assert weigh.sharpness == 1.0
    weigh(torch.tensor([0.05, 0.05, 9.0]))
    assert weigh.sharpness == 10.0, "the last step's own loss does not hold it back"
    weigh(torch.zeros(3))
    assert weigh.sharpness == 10.0
    said, target = torch.randn(2, 4, 3, 2, generator=generator(0)).unbind()
    assert float(stepwise_loss(said, target, torch.ones_like)) == pytest.approx(float(stepwise_loss(said, target)))
    for wrong in ([], [1.0, 0.0]):
        with pytest.raises(ValueError, match="sharpnesses must be positive"):
            CausalWeights(wrong)


def test_causal_training_reports_its_sharpness():
    _, report = fitted(log(), window=4, causal=[1e-6, 2.0])
    assert report.history[-1]["sharpness"] == 2.0


def test_windows_hold_out_the_last_rows():
    model, report = fitted(log(5, 10), window=10)
    assert report.metrics["holdout_rows"] == 10
    assert model._held_out(50, 10, generator(0)).tolist() == list(range(40, 50))
    with pytest.raises(DataError):
        model.fit(log(5, 10)[:1], rng=generator(0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dt": 0.0}, "dt must be above 0"),
        ({"solver": "euler"}, "solver must be 'rk4' or 'dopri5', got 'euler'"),
        ({"regularisation": "error"}, "solver must be 'dopri5' with a regularisation, got 'rk4'"),
        ({"positions": [0]}, "velocities must be one per position"),
        ({"final_strength": 1.0}, "final_strength must be above 0 and at most strength"),
        ({"hidden": [16, 0]}, r"hidden must be widths of at least 1, got \[16, 0\]"),
        ({"causal": [1.0, -2.0]}, r"causal must be positive numbers, or none, got \[1.0, -2.0\]"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0, got 0.0"),
        ({"final_learning_rate": 0.5}, "final_learning_rate must be above 0 and at most learning_rate, got 0.5"),
        ({"clip": 0.0}, "clip must be above 0, got 0.0"),
        ({"known": "nowhere.to.be_found"}, "known must be the dotted path of a function, got 'nowhere.to.be_found'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        NeuralODE(**arguments)


def test_columns_that_do_not_exist():
    model = NeuralODE(positions=[0], velocities=[2], updates=1)
    with pytest.raises(ValueError, match="distinct observation columns 0 to 1"):
        model.fit(log(2, 3), rng=generator(0))


def test_the_extra_is_named_where_it_is_missing(monkeypatch):
    real = builtins.__import__

    def missing(name, *rest):
        if name == "torchdiffeq":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match=r"learneddyn\[models\]"):
        NeuralODE(solver="dopri5").fit(log(2, 4), rng=generator(0))


def test_steps_after_an_explosion_weigh_nothing():
    weights = CausalWeights([100.0])(torch.tensor([0.5, 0.3, 1e9, torch.inf, 2e9]))
    torch.testing.assert_close(weights, torch.tensor([1.0, math.exp(-50), math.exp(-80), 0.0, 0.0]))
