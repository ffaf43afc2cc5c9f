"""SINDy: supports are recovered, the library counts as the paper's, equations print, rollouts agree with pysindy."""

import gymnasium as gym
import numpy as np
import pytest
import torch

from learneddyn.core import State, Transitions, generator
from learneddyn.models import SINDy
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


def test_bad_arguments():
    with pytest.raises(ValueError, match="aggregate must be"):
        SINDy(aggregate="mode")
    with pytest.raises(ValueError, match="names must be 3 observation columns"):
        model = SINDy(bootstraps=1)
        model.fit(polynomial(100), rng=generator(0))
        model.equations(["x"])
