"""Weights of the model's loss: their closed forms, and what they do to gradients and fits."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box

from learneddyn.core import Transitions, generator
from learneddyn.models import ProbabilisticEnsemble
from learneddyn.models.gradients import Gradients
from learneddyn.models.weighting import FLOOR, distance_weights, distances, value_weights
from learneddyn.spaces import Spaces
from learneddyn.testing import example_transitions

HEADS = {"learn_reward": True, "learn_termination": True}


def rows_at(obs, action=None):
    obs = torch.as_tensor(obs, dtype=torch.float32)
    n = len(obs)
    action = torch.zeros(n, 1) if action is None else action
    return Transitions(obs, action, torch.zeros(n), obs, torch.zeros(n, dtype=torch.bool), torch.arange(n))


LINE = rows_at([[-1.0], [-1.0], [1.0], [1.0]])  # mean 0, standard deviation 1
MARK = rows_at([[1.0]])


@pytest.mark.parametrize(("form", "far"), [("exp", math.exp(-2 / 3)), ("inverse", 1 / (1 + 2 / 3)), ("nearest", FLOOR)])
def test_closed_forms(form, far):
    weights = distance_weights(LINE, MARK, form=form, length=3.0, share=0.5)
    torch.testing.assert_close(weights / weights[2], torch.tensor([far, far, 1.0, 1.0]))
    assert weights.sum() == pytest.approx(4)


def test_a_floor_holds_and_relevant_rows_weigh_most():
    data, rng = example_transitions(), generator(0)
    relevant = data[torch.randperm(len(data), generator=rng)[:20]]
    weights = distance_weights(data, relevant, length=0.05)
    on = distances(data, relevant) == 0
    assert on.sum() == 20
    assert (weights[on] == weights.amax()).all()
    assert weights.amin() == pytest.approx(FLOOR * float(weights.amax()), rel=1e-5)
    assert weights.sum() == pytest.approx(len(data), rel=1e-5)


def test_an_endless_length_weighs_all_rows_alike():
    data = example_transitions()
    assert torch.equal(distance_weights(data, data[:1], length=math.inf), torch.ones(len(data)))


def test_chunks_change_nothing(monkeypatch):
    data = example_transitions()
    whole = distances(data, data[:50])
    brute = torch.stack([(standard(data) - mark).norm(dim=1) for mark in standard(data)[:50]]).amin(dim=0)
    torch.testing.assert_close(whole, brute)
    monkeypatch.setattr("learneddyn.models.weighting._CHUNK", 130)
    assert torch.equal(distances(data, data[:50]), whole)


def standard(data):
    columns = torch.cat([data.obs, data.action], dim=1)
    return (columns - columns.mean(dim=0)) / columns.std(dim=0, correction=0)


def test_angles_are_measured_on_the_circle():
    data = rows_at([[-3.1], [0.0], [3.1]])
    mark = rows_at([[math.pi]])
    plain, round_ = distances(data, mark), distances(data, mark, angles=(0,))
    assert plain[0] > 10 * plain[2]
    assert round_[0] == pytest.approx(float(round_[2]), rel=1e-3)


def test_value_weights_are_the_squared_slope():
    data = example_transitions()
    slopes = torch.tensor([2.0, 0.0, 0.0])
    spread = (data.next_obs - data.obs).std(dim=0, correction=0)
    weights = value_weights(data, lambda obs: obs.square() @ slopes, floor=1e-6, cut=1.0)
    expected = (4.0 * data.next_obs[:, 0] * spread[0]).square()
    torch.testing.assert_close(weights, expected * len(data) / expected.sum(), rtol=1e-4, atol=1e-4)
    assert value_weights(data, lambda obs: obs.sum(dim=1) * 0).eq(1).all()
    cut = value_weights(data, lambda obs: obs.square() @ slopes, cut=0.9)
    assert (cut == cut.amax()).sum() >= 0.1 * len(data)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"form": "gauss"}, "form must be one of"),
        ({"length": 0.0}, "length must be positive, got 0.0"),
        ({"share": 0.0}, "share must be above 0"),
        ({"floor": 0.0}, "floor must be above 0"),
        ({"angles": (3,)}, "angles must name observation columns 0 to 0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        distance_weights(LINE, MARK, **arguments)


def test_bad_rows_and_values():
    with pytest.raises(ValueError, match="must have obs and action of 1 and 1 columns, got 0 rows"):
        distance_weights(LINE, MARK[:0])
    with pytest.raises(ValueError, match="got 1 rows of 2 and 1"):
        distance_weights(LINE, rows_at([[0.0, 1.0]]))
    with pytest.raises(ValueError, match="requires_grad=False"):
        value_weights(LINE, lambda obs: torch.zeros(len(obs)))
    with pytest.raises(ValueError, match="no finite slope in 2 of 4"):
        value_weights(LINE, lambda obs: (obs[:, 0] + 1).sqrt())


def built(weights, **options):
    """Random parameters, a packed batch that carries the weights, and the ways to its gradients."""
    data, rng = example_transitions(), generator(0)
    model = ProbabilisticEnsemble(3, 2, (16, 24), **options)
    model._build(data.spaces)
    model._initialise(rng)
    model._standardise(data)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=rng)
    return model, model._pack(data, weights).expand(3, -1, -1)


def by_hand(model, batch):
    step = Gradients(list(model.weights), list(model.biases), model.max_logvar, model.min_logvar, model.learned)
    x, target, ended = model._unpack(batch)
    loss = step(x, target, ended if model.learn_termination else None, model._weight(batch))
    return loss, [parameter.grad.clone() for parameter in model.parameters()]


def by_autograd(model, batch):
    model.zero_grad(set_to_none=True)
    loss = model._loss(batch)
    loss.backward()
    return loss.detach(), [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("options", [{}, HEADS], ids=["plain", "heads"])
@pytest.mark.parametrize("gradients", [by_hand, by_autograd])
def test_constant_weights_leave_every_gradient_as_it_is(options, gradients):
    plain = gradients(*built(None, **options))
    constant = gradients(*built(torch.full((240,), 3.7), **options))
    torch.testing.assert_close(constant, plain, atol=1e-6, rtol=0)


@pytest.mark.parametrize("options", [{}, HEADS], ids=["plain", "heads"])
def test_weighted_gradients_equal_autograd(options):
    weights = torch.rand(240, generator=generator(3)) + 0.01
    model, batch = built(weights, **options)
    torch.testing.assert_close(by_hand(model, batch), by_autograd(model, batch), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("gradients", [by_hand, by_autograd])
def test_a_weight_of_two_is_a_row_twice(gradients):
    model, batch = built(None, **HEADS)
    twice = torch.cat([batch, batch[:, :80]], dim=1)
    weights = torch.ones(240)
    weights[:80] = 2.0
    weighted = torch.cat([batch, (weights * 240 / 320).expand(3, -1)[..., None]], dim=2)
    torch.testing.assert_close(gradients(model, weighted), gradients(model, twice), atol=1e-6, rtol=1e-5)


def test_a_fit_with_constant_weights_is_the_fit_without():
    data = example_transitions()
    models = []
    for weights in (None, torch.full((len(data),), 0.5)):
        models.append(ProbabilisticEnsemble(3, 2, (16,), max_epochs=4, **HEADS))
        models[-1].fit(data, rng=generator(0), weights=weights)
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_a_weighted_fit_is_closer_where_the_weight_is():
    """A network too small for both halves of |x|: the weighted half is fitted better, the other half worse."""
    rng = generator(0)
    obs = 4 * torch.rand(400, 1, generator=rng) - 2
    data = rows_at(obs)
    data = replace(data, next_obs=torch.where(obs > 0, 3 * obs, -0.5 * obs), spaces=spaces())
    errors = []
    for weights in (None, torch.where(obs[:, 0] > 0, 1.0, FLOOR)):
        model = ProbabilisticEnsemble(2, 2, (1,), absolute=(0,), max_epochs=150, patience=150, learning_rate=1e-2)
        model.fit(data, rng=generator(1), weights=weights)
        with torch.no_grad():
            error = (model.predict(data.obs, data.action).mean.mean(dim=0) - data.next_obs).square()
        errors.append((error[obs > 0].mean(), error[obs <= 0].mean()))
    (near, far), (weighted_near, weighted_far) = errors
    assert weighted_near < near
    assert weighted_far > far


def spaces():
    return Spaces(Box(-np.inf, np.inf, (1,), np.float32), Box(-1.0, 1.0, (1,), np.float32))


@pytest.mark.parametrize("weights", [torch.ones(3), torch.zeros(240), torch.full((240,), math.nan)])
def test_bad_weights(weights):
    with pytest.raises(ValueError, match="weights must be 240 positive finite numbers"):
        ProbabilisticEnsemble(2, 1, (8,), max_epochs=1).fit(example_transitions(), rng=generator(0), weights=weights)
