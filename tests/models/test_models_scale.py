"""What columns are divided by, angles, and fits that fail: relative to the data, and nothing left behind."""

import dataclasses
import math

import gymnasium as gym
import pytest
import torch

from learneddyn.core import DataError, generator
from learneddyn.models import Hybrid, Koopman, ProbabilisticEnsemble, SINDy
from learneddyn.models.angles import apart, gathered, near
from learneddyn.models.attempt import attempt, require_pair
from learneddyn.models.scale import gaussian_nll, or_one, spread
from learneddyn.spaces import Spaces
from learneddyn.testing import example_transitions


@pytest.mark.parametrize("unit", [1e-12, 1.0, 1e9])
def test_the_spread_is_relative_to_the_column(unit):
    columns = unit * torch.randn(500, 2, generator=generator(0))
    assert torch.allclose(spread(columns), columns.std(dim=0, correction=0), rtol=1e-5)
    assert spread(torch.full((500, 1), unit * math.pi)).item() == 1.0
    flicker = torch.full((500, 1), unit * math.pi)
    flicker[::7] = flicker[::7] * (1 + torch.finfo(torch.float32).eps)
    assert spread(flicker).item() == 1.0, "rounding is no spread"


def test_no_columns_have_no_spread():
    assert spread(torch.zeros(5, 0)).shape == (0,)
    assert or_one(torch.zeros(0), torch.zeros(5, 0)).shape == (0,)


@pytest.mark.parametrize("unit", [1e-11, 1.0, 1e6])
def test_models_divide_by_what_a_column_spreads_in_any_unit(unit):
    """One column varies, in whatever unit, and one does not, however large it is."""
    data = example_transitions()
    obs, after = (
        unit * torch.stack([part[:, 0], torch.full((len(data),), math.pi)], 1) for part in (data.obs, data.next_obs)
    )
    spaces = Spaces(gym.spaces.Box(-math.inf, math.inf, (2,)), data.spaces.action)
    seen = dataclasses.replace(data, obs=obs, next_obs=after, spaces=spaces)
    ensemble, koopman = ProbabilisticEnsemble(1, 1, hidden=[4], max_epochs=1), Koopman("linear")
    for model, scale in ((ensemble, lambda: ensemble.input_std[:2]), (koopman, lambda: koopman.scale)):
        model.fit(seen, rng=generator(0))
        assert 0.5 < float(scale()[0] / obs[:, 0].std()) < 2, type(model).__name__
        assert scale()[1] == 1, type(model).__name__


def test_the_likelihood_is_that_of_the_normal_distribution():
    error, std = torch.randn(50, 3, generator=generator(0)), torch.rand(3, generator=generator(1)) + 0.1
    wanted = -torch.distributions.Normal(torch.zeros(3), std).log_prob(error).mean()
    assert torch.allclose(gaussian_nll(error, std), wanted)


def test_angles_are_apart_the_short_way_round():
    before, after = torch.tensor([[3.1, 3.1], [-3.1, 0.0]]), torch.tensor([[-3.1, -3.1], [3.0, 20.0]])
    short = 2 * math.pi - 6.2
    assert torch.allclose(
        apart(after, before, [0]), torch.tensor([[short, -6.2], [6.1 - 2 * math.pi, 20.0]]), atol=1e-5
    )
    assert torch.equal(apart(after, before, []), after - before)
    moved = near(after, before, [0, 1])
    assert ((moved - before).abs() <= math.pi).all()
    assert torch.allclose(moved.sin(), after.sin(), atol=1e-5)
    small = before + 0.1
    assert torch.equal(near(small, before, [0, 1]), small), "what is near is not touched"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_angle_that_has_diverged_stays_absurd(dtype):
    far = torch.tensor([[1e7], [-1e7], [1e20], [-torch.inf], [torch.nan]], dtype=dtype)
    assert torch.equal(near(far, torch.zeros_like(far), [0])[:4], far[:4])
    assert torch.equal(gathered(far[:, None], [0], torch.zeros(1, 1, dtype=dtype))[:4, 0], far[:4])
    assert apart(far, torch.zeros_like(far), [0])[4].isnan()
    many = torch.tensor([[2 * math.pi * 8000 + 0.5]], dtype=dtype)
    assert torch.allclose(near(many, torch.zeros_like(many), [0]), many.new_tensor([[0.5]]), atol=0.01)


def test_angles_are_gathered_about_their_mean_direction():
    many, by = torch.tensor([[[3.0, 3.0]], [[-3.0, -3.0]], [[torch.inf, 1.0]]]), torch.tensor([[2.9, 0.0]])
    got = gathered(many, [0], by)
    assert torch.allclose(got[:2, 0, 0], torch.tensor([3.0, 2 * math.pi - 3.0]))
    assert got[2, 0, 0] == torch.inf
    assert torch.equal(got[..., 1], many[..., 1])
    assert torch.allclose(gathered(many, [0], -by)[:2, 0, 0], torch.tensor([3.0 - 2 * math.pi, -3.0]))
    assert gathered(many, [], by) is many


def test_an_ensemble_learns_the_change_of_an_angle_and_not_the_seam():
    data, model = example_transitions(40), ProbabilisticEnsemble(2, 1, hidden=[4], angles=[1], max_epochs=1)
    model.fit(data, rng=generator(0))
    change = model._targets(data)
    turned = dataclasses.replace(data, next_obs=data.next_obs + torch.tensor([0.0, 2 * math.pi, 2 * math.pi]))
    assert torch.allclose(model._targets(turned)[:, :2], change[:, :2], atol=1e-5)
    assert torch.allclose(model._targets(turned)[:, 2], change[:, 2] + 2 * math.pi, atol=1e-5), "no angle"


def test_a_fit_that_fails_leaves_nothing_behind():
    data, model = example_transitions(), SINDy(bootstraps=2, dropped=0)
    with pytest.raises(KeyboardInterrupt), attempt(model, data):
        model.noise.fill_(3.0)
        raise KeyboardInterrupt
    assert model.spaces is None
    assert model.source == ""
    model.fit(data, rng=generator(0))
    kept = model.noise.clone()
    with pytest.raises(KeyboardInterrupt), attempt(model, data):
        model.noise.fill_(3.0)
        raise KeyboardInterrupt
    assert torch.equal(model.noise, kept)
    assert model.spaces == data.spaces
    with pytest.raises(DataError, match="at least 2 transitions"):
        require_pair(data[:1])


def test_a_regressions_noise_has_a_floor_in_units_of_its_column():
    """The same exact system in metres and in nanometres: the same likelihood but for the change of units."""
    said = []
    for unit in (1.0, 1e-9):
        data = example_transitions()
        exact = torch.stack([data.obs[:, 0], 0.5 * data.obs[:, 1], 0.25 * data.obs[:, 2]], dim=1)
        data = type(data)(
            unit * data.obs, data.action, data.reward, unit * exact, data.terminated, data.episode, data.spaces
        )
        model = Hybrid()
        nll = model.fit(data, rng=generator(0)).metrics["holdout_nll"]
        assert (model.noise > 0).all()
        said.append(nll - math.log(unit))
    assert said[1] == pytest.approx(said[0], abs=0.05)
