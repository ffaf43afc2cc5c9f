"""Hybrid: missing physics is named, a perfect prior is left alone, increments lose their gain, files keep the prior."""

import dataclasses

import pytest
import torch

from learneddyn.core import generator
from learneddyn.models import AbstractDynamics, Hybrid
from learneddyn.models.assimilation import enkf_increments
from learneddyn.models.terms import evaluate_terms
from learneddyn.reproduce.medida import TERMS, TRUTH, pairs

PRIOR = {"prior": "learneddyn.reproduce.medida.prior", "prior_arguments": {"dt": 0.02}, "dt": 0.02, "columns": [1]}


def test_missing_friction_gain_and_drag_are_named_within_a_percent(tmp_path):
    model = Hybrid(**PRIOR, terms=TERMS)
    model.fit(pairs(125, 0.02, 0.0, 0), rng=generator(0))
    found = {term: value for term, value in zip(TERMS, model.coefficients[:, 0].tolist(), strict=True) if value}
    assert found == pytest.approx(TRUTH, rel=0.01)
    assert model.equations()[0].startswith("residual of x1 = (-0.3")
    model.save(tmp_path / "model")
    again = AbstractDynamics.load(tmp_path / "model")
    obs, action = torch.randn(4, 2, generator=generator(1)), torch.ones(4, 1)
    assert torch.equal(again.predict(obs, action).mean, model.predict(obs, action).mean)


def test_noise_brings_no_term_in_and_what_is_dropped_distorts_nothing():
    """Evidence alone keeps a cube of the speed beside drag; what stays is as if only that had been offered."""
    noisy = pairs(16_000, 0.06, 0.01, 15)
    prior = PRIOR | {"prior_arguments": {"dt": 0.06}, "dt": 0.06}
    evidence, model = Hybrid(**prior, terms=TERMS, certainty=0.0), Hybrid(**prior, terms=TERMS)
    alone = Hybrid(**prior, terms=list(TRUTH))
    for one in (evidence, model, alone):
        one.fit(noisy, rng=generator(15))
    kept = [{t for t, c in zip(TERMS, m.coefficients[:, 0].tolist(), strict=True) if c} for m in (evidence, model)]
    assert kept == [{*TRUTH, "x1^3"}, {*TRUTH}]
    assert torch.equal(model.coefficients[model.coefficients != 0], alone.coefficients[:, 0])
    assert torch.equal(model.deviations[model.deviations != 0], alone.deviations[:, 0])
    assert (model.coefficients.abs() >= 3 * model.deviations).all()


def test_increments_that_are_noise_name_nothing():
    still = pairs(500, 0.06, 0.01, 0)
    rng = generator(0)
    data = dataclasses.replace(still, next_obs=still.obs + 0.1 * torch.randn(still.obs.shape, generator=rng))
    model = Hybrid(terms=["1", "x1", "u0", "x1^3"])
    model.fit(data, rng=rng)
    assert not model.coefficients.any(), model.equations()


def test_the_kinematic_column_stays_the_priors():
    model = Hybrid(**PRIOR, terms=TERMS)
    data = pairs(125, 0.02, 0.0, 0)
    model.fit(data, rng=generator(0))
    before = model._prior(data.obs, data.action, dt=0.02)
    after = model.predict(data.obs, data.action).mean[0]
    assert torch.equal(after[:, 0], before[:, 0])
    assert not torch.allclose(after[:, 1], before[:, 1], atol=1e-3)


def test_a_neural_residual_starts_at_the_prior_and_improves_on_it():
    data = pairs(1500, 0.1, 0.0, 0)
    prior = PRIOR | {"prior_arguments": {"dt": 0.1}, "dt": 0.1}
    model = Hybrid(**prior, residual="neural", epochs=20, hidden=[32])
    assert data.spaces is not None
    model._build(data.spaces)
    model.spaces = data.spaces
    before = model._prior(data.obs, data.action, dt=0.1)
    torch.nn.init.zeros_(model.network[-1].weight)
    torch.nn.init.zeros_(model.network[-1].bias)
    assert torch.equal(model.predict(data.obs, data.action).mean[0], before)
    model = Hybrid(**prior, residual="neural", epochs=20, hidden=[32])
    error = model.fit(data, rng=generator(0)).metrics["holdout_mse"]
    assert error < 0.1 * float((before - data.next_obs).square().mean())
    with pytest.raises(ValueError, match="no equations"):
        model.equations()


def test_far_from_the_data_a_neural_residual_fades_and_its_reward_does_not():
    """Inside the border nothing changes, beyond it the correction falls with the square, far away the prior is left."""
    data = pairs(300, 0.1, 0.0, 0)
    data = dataclasses.replace(data, reward=data.obs[:, 1])
    prior = PRIOR | {"prior_arguments": {"dt": 0.1}, "dt": 0.1, "residual": "neural", "epochs": 3, "hidden": [8]}
    fading, plain = (Hybrid(**prior, learn_reward=True, fade=fade) for fade in (0.9, None))
    for model in (fading, plain):
        model.fit(data, rng=generator(0))
    midway, action = fading._midway(data.obs, data.next_obs), data.action
    with torch.no_grad():
        share = fading._answered(midway, action) / plain._answered(midway, action)
    untouched = (share[:, 0] == 1).float().mean()
    assert 0.85 < untouched < 0.95
    out = torch.tensor([30.0, 100.0])
    away, still = out[:, None] * torch.tensor([1.0, 0.5]), torch.zeros(2, 1)
    with torch.no_grad():
        share = fading._answered(away, still) / plain._answered(away, still)
    assert float(share[1, 0] / share[0, 0]) == pytest.approx(0.09, rel=0.05)
    assert (share[:, 0] < 0.05).all()
    assert torch.equal(share[:, 1], torch.ones(2))
    mean = fading.shift[None].clone().requires_grad_()
    fading._answered(mean[:, :2], mean[:, 2:]).sum().backward()
    assert mean.grad is not None
    assert mean.grad.isfinite().all()


def test_a_column_that_was_constant_does_not_fade_the_residual():
    """Its units would decide how far a move along it is; moves along the others count as they did."""
    data = pairs(300, 0.1, 0.0, 0)
    data = dataclasses.replace(data, action=torch.full_like(data.action, 0.3))
    model = Hybrid(**PRIOR | {"prior_arguments": {"dt": 0.1}, "dt": 0.1}, residual="neural", epochs=1, hidden=[8])
    model.fit(data, rng=generator(0))
    x = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 500.0], [9.0, 9.0, 0.0]])
    distance = model._distance(x)
    assert distance[1] == distance[0]
    assert distance[2] > 50 * distance[0]
    assert not model.precision[2].any()
    assert not model.precision[:, 2].any()
    assert torch.linalg.matrix_rank(model.precision) == 2


def test_increments_are_corrected_for_the_gain():
    """A model that lacks a constant drift: the corrected increments average to the drift, the raw ones to half."""
    rng, drift, noise = generator(0), torch.tensor([0.3, -0.2]), torch.tensor([0.1, 0.1])
    truth = torch.randn(4000, 2, generator=rng)
    obs, next_obs = (part + noise * torch.randn(part.shape, generator=rng) for part in (truth, truth + drift))
    found = enkf_increments(lambda s, a: s, obs, torch.zeros(4000, 1), next_obs, noise, rng)
    assert torch.allclose(found.mean(dim=0), drift, atol=0.02)
    # One gain for all rows would cancel: rows that the model stretches more must trust it less.
    stretched = enkf_increments(lambda s, a: s + s**2, obs, torch.zeros(4000, 1), next_obs, noise, rng)
    plain = next_obs - (obs + obs**2)
    assert (stretched - plain).square().mean() > 0.1 * plain.square().mean()
    with pytest.raises(ValueError, match="noise positive"):
        enkf_increments(lambda s, a: s, obs, torch.zeros(4000, 1), next_obs, torch.zeros(2), rng)


@pytest.mark.parametrize("residual", ["sparse", "neural"])
def test_a_prior_or_a_log_that_wraps_an_angle_changes_nothing(residual):
    """The log of the pendulum wrapped at pi beside the prior that goes on: increments stay those of a step."""
    whole = pairs(400, 0.1, 0.0, 0)
    seam = dataclasses.replace(whole, next_obs=at_home(whole.next_obs))
    assert ((seam.next_obs - seam.obs)[:, 0].abs() > 6).any(), "some steps cross the seam"
    prior = PRIOR | {"prior_arguments": {"dt": 0.1}, "dt": 0.1, "columns": [0, 1], "angles": [0]}
    models = [Hybrid(**prior, residual=residual, epochs=3, hidden=[8]) for _ in range(2)]
    reports = [model.fit(data, rng=generator(0)) for model, data in zip(models, (whole, seam), strict=True)]
    assert reports[1].metrics["holdout_mse"] == pytest.approx(reports[0].metrics["holdout_mse"], rel=1e-3)
    said = [model.predict(whole.obs, whole.action).mean for model in models]
    assert torch.allclose(*said, atol=1e-4)


def at_home(obs):
    turned = obs.clone()
    turned[:, 0] = (obs[:, 0] + torch.pi).remainder(2 * torch.pi) - torch.pi
    return turned


def test_the_filter_takes_angles_the_short_way_round():
    rng = generator(0)
    truth = torch.tensor([[3.1, 0.0]]).expand(500, 2)
    noise = torch.tensor([0.05, 0.05])
    obs, after = (at_home(truth + noise * torch.randn(500, 2, generator=rng)) for _ in range(2))
    found = enkf_increments(lambda s, a: at_home(s), obs, torch.zeros(500, 1), after, noise, rng, angles=[0])
    assert found.abs().max() < 0.5
    assert found.mean(dim=0).abs().max() < 0.02


def test_a_prior_that_lacks_nothing_is_left_alone():
    """What a pendulum's own prior leaves is the rounding of float32, in whatever units."""
    for unit in (1.0, 1e-4):
        data = pairs(300, 0.02, 0.0, 0)
        data = dataclasses.replace(data, obs=unit * data.obs, next_obs=unit * scaled(data.obs, data.action))
        prior = {"prior": f"{__name__}.rescaled", "prior_arguments": {"unit": unit}, "dt": 0.02}
        model = Hybrid(**prior, terms=["1", "x1", "u0"])
        model.fit(data, rng=generator(0))
        assert not model.coefficients.any(), model.equations()
        assert (model.noise > 0).all()
        assert (model.noise < 1e-4 * unit).all()


def scaled(obs, action):
    return torch.stack([obs[:, 0] + 0.02 * obs[:, 1], 0.9 * obs[:, 1] + action[:, 0]], dim=1)


def rescaled(obs, action, unit):
    return unit * scaled(obs / unit, action)


def test_terms_read_as_written():
    obs, action = torch.tensor([[0.5, -2.0]]), torch.tensor([[3.0]])
    values = evaluate_terms(["1", "x1^2", "|x1| x1", "u0 cos(x0)", "tanh(x1/0.5)"], obs, action)[0]
    expected = torch.tensor([1.0, 4.0, -4.0, 3 * torch.tensor(0.5).cos(), torch.tensor(-4.0).tanh()])
    assert torch.allclose(values, expected)
    for wrong, told in (("exp(x0)", "no factor"), ("x2", "no column x2"), ("__import__('os')", "no factor")):
        with pytest.raises(ValueError, match=told):
            evaluate_terms([wrong], obs, action)


def test_bad_arguments():
    with pytest.raises(ValueError, match="certainty must be at least 0, got -1"):
        Hybrid(certainty=-1.0)
    with pytest.raises(ValueError, match="fade must be None, or above 0 and at most 1, got 0"):
        Hybrid(fade=0.0)
    with pytest.raises(ValueError, match="dotted path"):
        Hybrid(prior="nowhere.to.be_found")
    with pytest.raises(ValueError, match="columns must name"):
        Hybrid(columns=[7]).fit(pairs(20, 0.02, 0.0, 0), rng=generator(0))
    with pytest.raises(ValueError, match="angles must name"):
        Hybrid(angles=[2]).fit(pairs(20, 0.02, 0.0, 0), rng=generator(0))
