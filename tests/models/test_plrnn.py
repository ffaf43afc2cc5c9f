"""Piecewise-linear RNNs: exact linear limits, bounded orbits, Jacobians, forcing, symbolic codes."""

import gymnasium as gym
import numpy as np
import pytest
import torch

from learneddyn.core import Transitions, generator
from learneddyn.evaluation.regions import fixed_points, symbolic_code
from learneddyn.models import PLRNN
from learneddyn.models.forcing import AdaptiveForcing, forced_loss, needed_forcing
from learneddyn.spaces import Spaces

QUICK = {"updates": 60, "window": 6, "batch_size": 8}


def oscillator(episodes=8, length=30, action=False):
    """A rotation by 0.2 rad a step with a push on the first column."""
    rng = generator(0)
    turn = torch.tensor(0.2)
    matrix = torch.stack([torch.stack([turn.cos(), -turn.sin()]), torch.stack([turn.sin(), turn.cos()])])
    state = torch.randn(episodes, 2, generator=rng)
    obs, pushes, after = [], [], []
    for _ in range(length):
        push = torch.randn(episodes, 1, generator=rng) * action
        then = state @ matrix.T + 0.1 * push * torch.tensor([1.0, 0.0])
        obs.append(state)
        pushes.append(push)
        after.append(then)
        state = then
    flat = [torch.stack(part, dim=1).flatten(0, 1) for part in (obs, pushes, after)]
    box = gym.spaces.Box
    spaces = Spaces(*(box(-np.inf, np.inf, (width,), np.float32) for width in (2, 1)))
    rows = episodes * length
    episode = torch.arange(episodes).repeat_interleave(length)
    return Transitions(flat[0], flat[1], flat[2][:, 0], flat[2], torch.zeros(rows).bool(), episode, spaces, "circle")


@pytest.fixture(scope="module")
def model():
    """An almost-linear model with hidden units."""
    model = PLRNN("almost-linear", latent=5, relus=2, learn_reward=True, **QUICK)
    model.fit(oscillator(action=True), rng=generator(0))
    return model


@pytest.mark.parametrize("kind", ["shallow", "clipped", "almost-linear"])
def test_a_linear_system_is_learned(kind):
    data = oscillator(action=True)
    quick = QUICK | {"updates": 700, "window": 2}
    model = PLRNN(kind, hidden=30, relus=0, alpha=1.0, learning_rate=0.02, **quick)
    metrics = model.fit(data, rng=generator(0)).metrics
    assert metrics["holdout_mse"] < 0.5 * float((data.next_obs - data.obs).square().mean())


def test_without_rectified_units_the_almost_linear_model_is_linear():
    model = PLRNN("almost-linear", relus=0, **QUICK)
    model.fit(oscillator(), rng=generator(0))
    z, u = torch.randn(2, 6, 2, generator=generator(1)), torch.zeros(6, 1)
    both = model.advance(z[0] + z[1], u) - model.bias
    assert torch.allclose(both, model.advance(z[0], u) + model.advance(z[1], u) - 2 * model.bias, atol=1e-5)
    assert model.regions(z[0], u).shape == (6, 0)


def test_the_jacobian_is_the_regions_linear_map(model):
    z, u = torch.randn(5, generator=generator(2)), torch.zeros(1)
    jacobian = torch.func.jacrev(lambda state: model.advance(state[None], u[None])[0])(z)
    on = torch.ones(5)
    on[3:] = (z[3:] > 0).float()
    assert torch.allclose(jacobian, model.diagonal.diag() + model.mixing * on, atol=1e-6)


def test_clipped_orbits_stay_bounded():
    model = PLRNN("clipped", hidden=30, **QUICK)
    model.fit(oscillator(), rng=generator(0))
    with torch.no_grad():
        model.diagonal.fill_(0.95)
        model.outer.mul_(20)
        z = 100 * torch.randn(10, 2, generator=generator(3))
        for _ in range(400):
            z = model.advance(z, torch.zeros(10, 1))
        bound = (model.outer.abs() @ model.threshold.abs() + model.bias.abs()).max() / 0.05
        assert z.abs().max() <= bound * 1.01 + 1


def test_memory_carries_the_hidden_units(model):
    data = oscillator(action=True)
    first = model.predict(data.obs[:3], data.action[:3])
    second = model.predict(first.mean[0], data.action[:3], first.memory)
    forgetful = model.predict(first.mean[0], data.action[:3])
    assert first.memory.shape == (3, 5)
    assert not torch.allclose(second.mean, forgetful.mean)


def test_forcing_of_strength_one_is_one_step_training(model):
    data = oscillator(action=True)
    x, u, target = (part.view(8, 30, -1) for part in model._sequences(data))
    free = PLRNN(**QUICK)
    free.fit(data, rng=generator(0))
    x2, u2, target2 = (part.view(8, 30, -1) for part in free._sequences(data))
    forced = forced_loss(free, x2, u2, target2, 1.0)
    steps = free.observe(free.advance(x2.flatten(0, 1), u2.flatten(0, 1)))
    assert torch.allclose(forced, (steps - target2.flatten(0, 1)).square().mean(), atol=1e-6)
    assert not torch.allclose(forced_loss(model, x, u, target, 0.0), forced_loss(model, x, u, target, 1.0))


def test_needed_forcing_follows_the_jacobians_norm():
    model = PLRNN("almost-linear", relus=0, **QUICK)
    model.fit(oscillator(), rng=generator(0))
    x, u = torch.randn(4, 5, 2, generator=generator(4)), torch.zeros(4, 5, 1)
    with torch.no_grad():
        model.mixing.zero_()
        model.diagonal.fill_(1.25)
    assert needed_forcing(model, x, u) == pytest.approx(0.2, abs=1e-5)
    forcing = AdaptiveForcing(0.5, start=1.0)
    assert forcing.update(model, x, u) == pytest.approx(0.6, abs=1e-5), "down by half the way"
    with torch.no_grad():
        model.diagonal.fill_(0.5)
    assert needed_forcing(model, x, u) == 0.0


@pytest.mark.parametrize("forcing", ["adaptive", "sparse"])
def test_other_forcings_train(forcing):
    model = PLRNN(forcing=forcing, interval=3, **QUICK)
    report = model.fit(oscillator(), rng=generator(0))
    assert report.history[-1]["free_run"] < report.history[0]["free_run"] * 1.5


def test_symbols_count_regions_and_their_moves(model):
    bits = torch.tensor([[0, 1], [0, 1], [1, 1], [0, 1], [1, 0]]).bool()
    code = symbolic_code(bits)
    assert code.symbols.tolist()[:2] == [0, 0]
    assert code.dwell.tolist() == pytest.approx([0.6, 0.2, 0.2])
    assert float(code.transitions[0, 0]) == pytest.approx(1 / 3)
    points = fixed_points(model, code)
    for point, on in zip(points, code.bits, strict=True):
        if point.real:
            stays = model.advance(point.state[None], torch.zeros(1, 1) - 0.0)[0]
            assert torch.allclose(stays, point.state, atol=1e-3)
        assert point.real == bool(((point.state[3:] > 0) == on).all())
    with pytest.raises(ValueError, match="almost-linear"):
        fixed_points(PLRNN(), code)


def test_forcing_out_of_range(model):
    x, u, target = (part.view(8, 30, -1) for part in model._sequences(oscillator(action=True)))
    with pytest.raises(ValueError, match=r"alpha must be between 0 and 1, got 1.5"):
        forced_loss(model, x, u, target, 1.5)
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        forced_loss(model, x, u, target, 1.0, every=0)
    for arguments, message in (
        ({"decay": 1.0}, "decay must be at least 0 and below 1, got 1.0"),
        ({"decay": 0.5, "interval": 0}, "interval must be at least 1, got 0"),
        ({"decay": 0.5, "start": -0.1}, "start must be between 0 and 1, got -0.1"),
    ):
        with pytest.raises(ValueError, match=message):
            AdaptiveForcing(**arguments)


def test_bad_arguments():
    with pytest.raises(ValueError, match="alpha must be between 0 and 1"):
        PLRNN(alpha=2.0)
    with pytest.raises(ValueError, match="latent must be at least"):
        PLRNN(latent=1).fit(oscillator(), rng=generator(0))
