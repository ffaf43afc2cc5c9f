"""SINDy: supports are recovered, the library counts as the paper's, equations print, rollouts agree with pysindy."""

import copy
import pickle
import time

import gymnasium as gym
import numpy as np
import pytest
import torch

from learneddyn.core import DataError, State, Transitions, generator
from learneddyn.models import SINDy
from learneddyn.models.library import Evaluator, PolynomialLibrary
from learneddyn.models.stlsq import draw_bootstraps
from learneddyn.spaces import Spaces
from learneddyn.world.bounds import Bounded


def logged(obs, action, next_obs, reward=None):
    box = gym.spaces.Box
    spaces = Spaces(*(box(-np.inf, np.inf, (part.shape[1],), np.float32) for part in (obs, action)))
    rows = len(obs)
    reward = torch.zeros(rows) if reward is None else reward
    ended = torch.zeros(rows, dtype=torch.bool)
    return Transitions(obs, action, reward, next_obs, ended, torch.arange(rows), spaces, "polynomial")


def polynomial(rows=2000, noise=1e-3):
    rng = generator(0)
    obs, action = (2 * torch.rand(rows, width, generator=rng) - 1 for width in (3, 1))
    x, y, z = obs.T
    after = torch.stack([0.9 * x + 0.2 * y * z, 0.7 * y - 0.3 * x**2 + 0.4 * action[:, 0], 0.5 * z * action[:, 0]], 1)
    return logged(obs, action, after + noise * torch.randn(after.shape, generator=rng), after[:, 0] ** 2)


@pytest.mark.parametrize(
    ("o", "a", "arguments", "terms"),
    [
        (5, 1, {"degree": 2}, 41),
        (8, 2, {"degree": 2, "interactions": False}, 50),
        (2, 1, {"degree": 3, "products": False}, 10),
    ],
)
def test_the_library_counts_as_the_papers(o, a, arguments, terms):
    model = SINDy(**arguments, bootstraps=1, threshold=0.0)
    rng = generator(0)
    data = logged(torch.randn(80, o, generator=rng), torch.randn(80, a, generator=rng), torch.randn(80, o))
    model.fit(data, rng=rng)
    assert model.library(data.obs, data.action).shape[1] == terms == len(set(model.term_names()))


def test_terms_that_the_unit_circle_makes_redundant_are_left_out():
    names = PolynomialLibrary(2, 1, degree=3, angles=[1]).names(["x", "q", "u"])
    doubled = {name for name in names if name.count("sin(q)") >= 2}
    assert doubled == {"sin(q) sin(q)"}  # without a constant the square itself is needed
    assert len(PolynomialLibrary(2, 1, degree=3, angles=[1], bias=True)) == len(names)
    # What is left is independent.
    rng = generator(0)
    x, u = (3 * torch.randn(500, width, generator=rng).double() for width in (2, 1))
    theta = PolynomialLibrary(2, 1, degree=3, angles=[1])(x, u)
    assert torch.linalg.matrix_rank(theta) == len(names)
    # Pairs of observation columns on the circle are the same to it.
    pairs = PolynomialLibrary(3, 1, degree=3, unit_pairs=[(1, 2)]).names(["x", "cos(q)", "sin(q)", "u"])
    assert pairs == names
    with pytest.raises(ValueError, match="unit_pairs must be"):
        PolynomialLibrary(2, 1, unit_pairs=[(1, 2)])


def test_terms_are_what_their_names_say():
    model = SINDy(degree=3, angles=[1], bias=True, bootstraps=1)
    data = polynomial(200)
    model.fit(data, rng=generator(0))
    x0, x1, x2 = data.obs.T
    values = {"x0": x0, "x2": x2, "cos(x1)": x1.cos(), "sin(x1)": x1.sin(), "u0": data.action[:, 0], "1": x0**0}
    library = model.library(data.obs, data.action)
    for index, name in enumerate(model.term_names()):
        expected = torch.stack([values[factor] for factor in name.split()]).prod(dim=0)
        assert torch.allclose(library[:, index], expected, atol=1e-6), name


def test_the_support_is_recovered_by_nearly_every_bootstrap():
    model = SINDy(threshold=0.05, dropped=0)
    model.fit(polynomial(), rng=generator(0))
    names = model.term_names()
    wanted = [{"x0", "x1 x2"}, {"x1", "x0 x0", "u0"}, {"x2 u0"}]
    right = sum(
        all({names[i] for i in member[:, row].nonzero().flatten()} == wanted[row] for row in range(3))
        for member in model.bootstrapped
    )
    assert right >= 19
    assert model.equations()[2].startswith("x2' = 0.5")
    assert torch.allclose(model.coefficients[0, names.index("u0"), 1], torch.tensor(0.4), atol=1e-2)


def test_a_change_is_fitted_where_it_is_asked():
    model = SINDy(target="change", threshold=0.05, dropped=0)
    model.fit(polynomial(), rng=generator(0))
    assert model.equations(["x", "y", "z", "u"])[0].startswith("x' = x - 0.1")


def test_the_reward_is_a_polynomial_of_what_comes_out():
    data, model = polynomial(noise=0.0), SINDy(learn_reward=True, threshold=0.02, dropped=0)
    model.fit(data, rng=generator(0))
    answer = model.predict(data.obs[:50], data.action[:50])
    assert torch.allclose(answer.reward_mean[0], data.reward[:50], atol=1e-4)
    assert model.equations()[-1] == "reward(x') = 1 x0 x0"


def test_rows_ask_their_own_bootstrap():
    model = SINDy(aggregate=None, bootstraps=4)
    data = polynomial(300, noise=0.1)
    model.fit(data, rng=generator(0))
    every = model.predict(data.obs[:8], data.action[:8]).mean
    member = torch.tensor([0, 1, 2, 3, 3, 2, 1, 0])
    own = model.sample(data.obs[:8], data.action[:8], member, generator(0), noise=False).next_obs
    assert torch.allclose(own, every[member, torch.arange(8)], atol=1e-6)
    assert every.std(dim=0).max() > 0


def test_bounds_and_pairs_bring_predictions_back():
    data, model = polynomial(), SINDy()
    model.fit(data, rng=generator(0))
    sampler = Bounded("elite", low=[-0.1, -np.inf, -np.inf], high=[0.1, np.inf, np.inf], unit_pairs=[(1, 2)])
    state = State(data.obs[:20], torch.zeros(20, dtype=torch.long))
    after, outcome = sampler(state, data.action[:20], model, generator(0))
    assert torch.equal(after.obs, outcome.next_obs)
    assert after.obs[:, 0].abs().max() <= 0.1
    assert torch.allclose(after.obs[:, 1:].norm(dim=1), torch.ones(20), atol=1e-5)
    with pytest.raises(ValueError, match="low and high belong together"):
        Bounded("elite", low=[0.0])


@pytest.mark.parametrize(
    "arguments",
    [
        {"degree": 3, "threshold": 1e-2},
        {"degree": 3, "threshold": 0.0, "angles": [1], "bias": True, "target": "change"},
        {"degree": 2, "threshold": 0.1, "angles": [0, 2], "learn_reward": True},
        {"degree": 4, "interactions": False, "products": False, "bootstraps": 3, "aggregate": None},
        {"degree": 2, "bootstraps": 3, "aggregate": None, "learn_reward": True, "target": "change"},
        {"threshold": 0.0, "dropped": 0, "degree": 1, "bootstraps": 1},
    ],
)
def test_the_fast_evaluation_is_the_differentiable_one(arguments):
    model, data = SINDy(**arguments), polynomial(400, noise=0.01)
    model.fit(data, rng=generator(0))
    rng = generator(1)
    obs, action = torch.randn(5000, 3, generator=rng), torch.randn(5000, 1, generator=rng)
    with_gradients = obs.clone().requires_grad_()
    slow = model.predict(with_gradients, action)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for lanes in (1, 7, 5000):  # the last takes several blocks
            for one in (model, twin):
                fast = one.predict(obs[:lanes], action[:lanes])
                torch.testing.assert_close(fast.mean, slow.mean[:, :lanes], atol=2e-5, rtol=1e-4)
                if model.learn_reward:
                    torch.testing.assert_close(fast.reward_mean, slow.reward_mean[:, :lanes], atol=1e-3, rtol=1e-3)
    slow.mean.sum().backward()
    assert with_gradients.grad.isfinite().all()


def test_what_is_made_of_neighbours_is_one_product():
    library = PolynomialLibrary(4, 1, degree=3)
    assert len(library) == 34 + 1 + 34
    # Three coordinates multiply stretches of degree one and two each, one multiplies both as one: and the action all.
    assert len(Evaluator(library, torch.ones(1, len(library), 1))._products) <= 9


def test_new_coefficients_are_used_at_once():
    model, data = SINDy(bootstraps=2), polynomial(200)
    model.fit(data, rng=generator(0))
    with torch.no_grad():
        before = model.predict(data.obs, data.action).mean
        model.coefficients.mul_(2)
        torch.testing.assert_close(model.predict(data.obs, data.action).mean, 2 * before)


def test_a_bootstrap_gives_what_pysindy_gives_on_its_rows():
    from pysindy import STLSQ

    data, library = polynomial(300, noise=0.1), PolynomialLibrary(3, 1, degree=2)
    theta, target = library(data.obs.double(), data.action.double()), data.next_obs.double()
    draw = draw_bootstraps(theta, target, 1, 2, generator(3))[0]
    rng = generator(3)
    drawn, kept = torch.randint(300, (300,), generator=rng), torch.randperm(theta.shape[1], generator=rng)[2:]
    kept = kept.sort().values
    wanted = STLSQ(0.05, 1e-2).fit(theta[drawn][:, kept].numpy(), target[drawn].numpy()).coef_
    found = draw.stlsq(0.05, 1e-2)
    assert (found != 0).sum() == (wanted != 0).sum() > 3
    np.testing.assert_allclose(found[kept].T, wanted, atol=1e-9)


@pytest.mark.usefixtures("one_thread")
def test_rollouts_are_several_times_as_fast_as_all_terms_of_all_rows():
    model, data = SINDy(degree=3, threshold=1e-2, dropped=0), polynomial(4096)
    model.fit(data, rng=generator(0))

    def spent(call):
        begun = time.process_time()
        for _ in range(30):
            call()
        return time.process_time() - begun

    with torch.no_grad():
        ratios = [
            spent(lambda: model._differentiable(data.obs, data.action))
            / spent(lambda: model._every(data.obs, data.action, None))
            for _ in range(5)
        ]
    assert np.median(ratios) >= 2.5  # about 4.5, with other processes in the caches


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_transitions_outside_the_domain_are_not_learned_from(tmp_path):
    data, model = polynomial(noise=0.0), SINDy(domain=[(1, -0.5, 0.5)], dropped=0)
    beyond = (data.obs[:, 1].abs() > 0.5) | (data.next_obs[:, 1].abs() > 0.5)
    data.next_obs[beyond] = 99.0
    report = model.fit(data, rng=generator(0))
    assert report.metrics["train_rows"] + report.metrics["holdout_rows"] == (~beyond).sum()
    assert model.equations()[2] == "x2' = 0.5 x2 u0"
    assert model.noise.max() < 1e-3
    model.save(tmp_path)
    assert SINDy.load(tmp_path).domain == model.domain
    with pytest.raises(DataError, match="fewer than 2 of 2000 transitions lie inside the domain"):
        SINDy(domain=[(0, 5.0, 6.0)]).fit(data, rng=generator(0))
    with pytest.raises(ValueError, match="domain must name observation columns below 3"):
        SINDy(domain=[(3, 0, 1)]).fit(data, rng=generator(0))


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"domain must be \(column, low, high\) each"):
        SINDy(domain=[(0, 1.0, 0.0)])
    with pytest.raises(ValueError, match="aggregate must be"):
        SINDy(aggregate="mode")
    with pytest.raises(ValueError, match="names must be 3 observation columns"):
        model = SINDy(bootstraps=1)
        model.fit(polynomial(100), rng=generator(0))
        model.equations(["x"])


@torch.no_grad()
def test_a_copy_does_not_answer_with_what_its_original_remembered():
    """Versions of a copied tensor begin at zero: after as many changes as the original had seen, they are the same."""
    data = polynomial(300)
    model = SINDy(bootstraps=2, dropped=0)
    model.fit(data, rng=generator(0))
    before = model.predict(data.obs, data.action).mean
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied.predict(data.obs, data.action).mean, before)
    copied = copy.deepcopy(model)
    while copied.coefficients._version < model.coefficients._version:
        copied.coefficients.mul_(1.0)
    copied.coefficients.data.mul_(0.5)
    assert torch.allclose(copied.predict(data.obs, data.action).mean, 0.5 * before, atol=1e-6)
    assert torch.equal(model.predict(data.obs, data.action).mean, before)


@torch.no_grad()
def test_tensors_that_take_the_place_of_others_are_seen():
    data = polynomial(300)
    model = SINDy(bootstraps=2, dropped=0)
    model.fit(data, rng=generator(0))
    before = model.predict(data.obs, data.action).mean
    halved = {name: 0.5 * tensor if name == "coefficients" else tensor for name, tensor in model.state_dict().items()}
    fresh = halved["coefficients"]
    while fresh._version < model.coefficients._version:
        fresh.mul_(1.0)
    model.load_state_dict(halved, assign=True)
    assert torch.allclose(model.predict(data.obs, data.action).mean, 0.5 * before, atol=1e-6)
