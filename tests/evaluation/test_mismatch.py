"""Likelihoods in closed form, correlations of known sign, and an adversary where one exists and where none does."""

import math

import numpy as np
import pytest
import torch

from learneddyn.core import generator
from learneddyn.evaluation.mismatch import (
    _moved,
    _round_axes,
    adversarial_model,
    correlated,
    likelihood_study,
    log_likelihood,
)
from learneddyn.models import ProbabilisticEnsemble
from learneddyn.testing import example_transitions

DATA = example_transitions()


def fitted(seed=0, **options):
    model = ProbabilisticEnsemble(**{"num_members": 2, "num_elites": 2, "hidden": (8,), "max_epochs": 15} | options)
    model.fit(DATA, rng=generator(seed))
    return model


@pytest.fixture(scope="module")
def model():
    return fitted()


def test_likelihood_is_the_mixtures(model):
    with torch.no_grad():
        said = model.predict(DATA.obs, DATA.action)
    density = torch.distributions.Normal(said.mean.double(), said.std.double()).log_prob(DATA.next_obs).sum(dim=2)
    expected = density.exp().mean(dim=0).log().mean()
    assert log_likelihood(model, DATA) == pytest.approx(float(expected), abs=1e-5)
    assert log_likelihood(model, DATA, chunk=7) == pytest.approx(log_likelihood(model, DATA), abs=1e-6)


def test_correlations_of_known_sign():
    likelihoods = {"same": np.arange(12.0), "opposite": -np.arange(12.0), "none": np.tile([0.0, 1.0, 0.0], 4)}
    study = correlated(likelihoods, np.arange(12.0))
    assert study.pearson["same"].value == pytest.approx(1)
    assert study.pearson["opposite"].value == pytest.approx(-1)
    assert study.pearson["none"].low < 0 < study.pearson["none"].high
    assert study.to_json()["models"] == 12


def test_failed_models_alone_make_a_correlation_that_the_top_half_lacks():
    rng = np.random.default_rng(0)
    likelihood = np.concatenate([rng.normal(0, 1, 20), rng.normal(-50, 1, 20)])
    study = correlated({"all": likelihood}, np.concatenate([rng.normal(100, 1, 20), rng.normal(0, 1, 20)]))
    assert study.pearson["all"].low > 0.9
    assert study.top["all"].low < 0 < study.top["all"].high
    flat = correlated({"all": likelihood}, np.repeat([1.0, 0.0], 20))
    assert flat.top["all"] is None


def test_the_study_asks_every_model_once(model):
    models = [model, fitted(1), fitted(2, max_epochs=1)]
    played = []

    def judge(one):
        played.append(one)
        return float(len(played))

    study = likelihood_study(models, {"train": DATA, "part": DATA[:40]}, judge)
    assert played == models
    assert study.returns.tolist() == [1.0, 2.0, 3.0]
    assert study.likelihoods["part"][1] == pytest.approx(log_likelihood(models[1], DATA[:40]))


def bias(model):
    """A return that falls with one bias, which the likelihood feels, and one that it hardly feels."""
    return -float(model.biases[-1].detach()[:, 0, :3].sum())


def test_the_adversary_stays_likely_and_earns_less(model):
    before = [parameter.clone() for parameter in model.parameters()]
    found = adversarial_model(model, DATA, bias, delta=0.5, generations=4, population=6)
    assert found.returned < found.original_return == pytest.approx(bias(model))
    assert found.returned == pytest.approx(bias(found.model))
    assert found.likelihood == pytest.approx(log_likelihood(found.model, DATA))
    assert found.likelihood >= found.original_likelihood - 0.5
    assert found.history == sorted(found.history, reverse=True)
    assert len(found.history) == 4
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    changed = [not torch.equal(a, b) for a, b in zip(before, found.model.parameters(), strict=True)]
    assert sum(changed) == 2
    again = adversarial_model(model, DATA, bias, delta=0.5, generations=4, population=6)
    assert again.to_json() == found.to_json()


def test_candidates_lose_about_delta_on_average(model):
    losses, delta = [], 0.02
    axes, rng = _round_axes(model, DATA, delta), np.random.default_rng(0)
    for _ in range(40):
        point = rng.normal(size=axes.shape[:3].numel())
        losses.append(log_likelihood(model, DATA) - log_likelihood(_moved(model, axes, point), DATA))
    assert 0.2 * delta < np.mean(losses) < 2 * delta


def test_models_outside_the_bound_are_not_played(model):
    found = adversarial_model(model, DATA, bias, delta=0.0, generations=2, population=4, step=1e4)
    assert found.played == 1
    assert found.returned == found.original_return
    assert found.model is not model


def test_bad_input(model):
    with pytest.raises(ValueError, match="delta is out of range: -1"):
        adversarial_model(model, DATA, bias, delta=-1.0)
    with pytest.raises(ValueError, match="population is out of range: 1"):
        adversarial_model(model, DATA, bias, population=1)
    with pytest.raises(ValueError, match="at least three pairs"):
        correlated({"x": [1.0, 2.0]}, [1.0, 2.0])
    with pytest.raises(ValueError, match="NaN or infinite"):
        correlated({"x": [1.0, math.nan, 2.0]}, [1.0, 2.0, 3.0])
