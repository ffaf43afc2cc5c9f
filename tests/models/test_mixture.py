"""MixER: environments are members, the gate finds families, and a new environment only learns a context."""

from itertools import permutations

import pytest
import torch
from sklearn.metrics import adjusted_rand_score

from learneddyn.core import DataError, generator
from learneddyn.models import MixER
from learneddyn.models.mixture import _assigned, _far_apart
from learneddyn.reproduce import mixer
from learneddyn.testing import check_dynamics, example_transitions

KNOWN = [
    (name, low + share * (high - low)) for name, (low, high) in mixer.FAMILIES.items() for share in (0.2, 0.5, 0.8)
]


@pytest.fixture(scope="module")
def fitted():
    model = MixER(environments=len(KNOWN), hidden=[32, 32], updates=500, learning_rate=3e-3)
    model.fit(mixer.log(KNOWN, 100, generator(0)), rng=generator(0))
    return model


def test_the_gate_finds_the_families(fitted):
    family = torch.arange(3).repeat_interleave(3)
    assert mixer.rand_index(fitted.routes, family) == 1.0
    assert max(mixer.error(fitted, mixer.log(KNOWN, 100, generator(1)))) < 0.5


def test_a_row_is_answered_by_its_own_environment(fitted):
    data = mixer.log(KNOWN, 4, generator(1))
    member = fitted.environment_of(data)
    assert member.tolist() == [index for index in range(9) for _ in range(4)]
    every = fitted.predict(data.obs, data.action).mean
    own = fitted.sample(data.obs, data.action, member, generator(0), noise=False).next_obs
    assert torch.allclose(own, every[member, torch.arange(36)], atol=1e-5)


def test_one_environment_is_handed_out_as_a_model_of_its_own(fitted, tmp_path):
    data = mixer.log(KNOWN, 3, generator(1))
    whole = fitted.predict(data.obs, data.action)
    for environment in (0, 4, 8):
        one = fitted.on(environment).predict(data.obs, data.action)
        assert one.elites.tolist() == [0]
        assert torch.allclose(one.mean[0], whole.mean[environment], atol=1e-6)
        assert torch.equal(one.std[0], whole.std[environment])
    model = fitted.on(8)
    model.save(tmp_path / "model")
    assert torch.equal(MixER.load(tmp_path / "model").predict(data.obs, data.action).mean, one.mean)
    check_dynamics(model, data)
    with torch.no_grad():
        model.contexts.add_(1.0)
    assert torch.equal(fitted.predict(data.obs, data.action).mean, whole.mean), "it is a copy"
    for wrong in (-1, 9):
        with pytest.raises(ValueError, match=f"one of the 9 it was fitted on, 0 first, got {wrong}"):
            fitted.on(wrong)
    with pytest.raises(ValueError, match="has not been fitted"):
        MixER().on(0)


def test_adapting_learns_a_context_and_nothing_else(fitted):
    new = mixer.log([("Van der Pol", 1.3)], 30, generator(2))
    before = {name: tensor.clone() for name, tensor in fitted.state_dict().items()}
    model = fitted.adapted(new, rng=generator(0), updates=100)
    assert all(torch.equal(before[name], tensor) for name, tensor in fitted.state_dict().items())
    assert all(torch.equal(*pair) for pair in zip(fitted.weights, model.weights, strict=True))
    assert model.num_members == 1
    assert model.routes.item() == fitted.routes[4].item(), "the expert of the Van der Pol oscillators"
    held = mixer.log([("Van der Pol", 1.3)], 200, generator(3))
    with torch.no_grad():
        alien = fitted.predict(held.obs, held.action).mean[0]
    wrong = float(((alien - held.next_obs) / fitted.output_scale).square().mean())
    assert mixer.error(model, held)[0] < 0.2 * wrong


def test_adapting_needs_rows_of_the_same_spaces(fitted):
    with pytest.raises(ValueError, match="this model was fitted on"):
        fitted.adapted(example_transitions(), rng=generator(0))
    with pytest.raises(DataError, match="at least 2"):
        fitted.adapted(mixer.log(KNOWN[:1], 1, generator(0)), rng=generator(0))
    with pytest.raises(ValueError, match="has not been fitted"):
        MixER().adapted(example_transitions(), rng=generator(0))


def test_episodes_are_dealt_by_number_or_evenly():
    data = mixer.log(KNOWN[:5], 2, generator(0))
    assert MixER(environments=[1, 3, 1]).environment_of(data).tolist() == [0] * 2 + [1] * 6 + [2] * 2
    assert MixER(environments=2).environment_of(data).tolist() == [0] * 6 + [1] * 4
    with pytest.raises(DataError, match="names 4 episodes, the data has 5"):
        MixER(environments=[2, 2]).environment_of(data)
    with pytest.raises(DataError, match="need as many episodes, got 5"):
        MixER(environments=6).environment_of(data)


def test_an_environment_without_rows_to_learn_from_is_named():
    with pytest.raises(DataError, match="environment 0 has no rows"):
        MixER(environments=2, holdout_ratio=0.5, updates=1).fit(mixer.log(KNOWN[:2], 1, generator(0)), rng=generator(3))


def test_the_assignment_is_the_cheapest_of_all():
    losses = torch.rand(4, 4, generator=generator(0))
    cheapest = min(permutations(range(4)), key=lambda order: sum(losses[k, m] for k, m in enumerate(order)))
    assert _assigned(losses).tolist() == list(cheapest)


def test_far_points_are_far():
    points = torch.tensor([[0.0], [0.1], [5.0], [5.1], [9.0]])
    assert sorted(_far_apart(points, 3)[0].flatten().tolist()) == [0.0, 5.0, 9.0]


def test_the_rand_index_is_scikit_learns():
    one, two = torch.randint(3, (2, 40), generator=generator(0))
    for a, b in ((one, two), (one, one), (torch.zeros(4).long(), torch.zeros(4).long())):
        assert mixer.rand_index(a, b) == pytest.approx(adjusted_rand_score(a, b), abs=1e-12)


@pytest.mark.parametrize(
    ("argument", "value"), [("environments", 0), ("environments", [2, 0]), ("experts", 0), ("gate_every", 0)]
)
def test_bad_arguments_are_named(argument, value):
    with pytest.raises(ValueError, match=f"{argument} must be"):
        MixER(**{argument: value})
