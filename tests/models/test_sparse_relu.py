"""SparseReLU: units end as ReLU, identity or zero, and the cascade is the network."""

import copy

import gymnasium as gym
import numpy as np
import pytest
import torch

from learneddyn.core import Transitions, generator
from learneddyn.envs.worlds import save_world
from learneddyn.models import MixER, SparseReLU
from learneddyn.models.sparse_relu import IDENTITY, RELU, ZERO
from learneddyn.spaces import Spaces


def logged(step, rows=600, o=2, seed=0):
    rng = generator(seed)
    obs, action = 2 * torch.rand(rows, o, generator=rng) - 1, 2 * torch.rand(rows, 1, generator=rng) - 1
    box = gym.spaces.Box
    spaces = Spaces(box(-np.inf, np.inf, (o,), np.float32), box(-1.0, 1.0, (1,), np.float32))
    nothing = torch.zeros(rows)
    columns = (obs, action, nothing, step(obs, action), nothing.bool(), torch.arange(rows) // 6)
    return Transitions(*columns, spaces, "made up")


def kinked(obs, action):
    x, y = obs.T
    return torch.stack([x + 0.3 * (y + action[:, 0]).relu(), 0.9 * y + 0.2 * action[:, 0]], dim=1)


@pytest.fixture(scope="module")
def sparse():
    model = SparseReLU(hidden=[12, 10], relus=3, horizon=1, updates=400)
    model.fit(logged(kinked), rng=generator(0))
    return model


def test_no_more_units_stay_rectified_than_wanted(sparse):
    counts = sparse.counts
    assert 1 <= counts["relu"] <= 3
    assert sum(counts.values()) == 22


def test_the_cascade_is_the_network_in_the_units_of_the_environment(sparse):
    rng = generator(1)
    obs, action = (4 * torch.rand(200, width, generator=rng, dtype=torch.float64) - 2 for width in (2, 1))
    v = torch.cat([obs, action], dim=1)
    *pairs, (weight, bias) = sparse.cascade()
    for inner, constant in pairs:
        v = torch.cat([v, (v @ inner.T + constant).relu()], dim=1)
    exact = copy.deepcopy(sparse).double().predict(obs, action).mean[0]
    assert sum(len(inner) for inner, _ in pairs) == sparse.counts["relu"]
    assert torch.allclose(v @ weight.T + bias, exact, atol=1e-9)


def test_without_a_relu_the_network_is_linear_and_fits_a_linear_system():
    data = logged(lambda obs, action: obs @ torch.tensor([[0.9, 0.1], [-0.2, 1.0]]) + 0.3 * action)
    model = SparseReLU(hidden=[6], relus=0, horizon=1, updates=400)
    report = model.fit(data, rng=generator(0))
    assert model.counts["relu"] == 0
    assert len(model.cascade()) == 1
    assert report.metrics["holdout_mse"] < 1e-4


def test_none_keeps_every_relu():
    model = SparseReLU(hidden=[6], relus=None, updates=20)
    model.fit(logged(kinked), rng=generator(0))
    assert model.counts == {"relu": 6, "identity": 0, "zero": 0}


def test_kinds_are_drawn_as_often_as_their_softmax_says(sparse):
    model, rng = copy.deepcopy(sparse), generator(2)
    with torch.no_grad():
        model.logits.copy_(torch.tensor([1.0, 0.0, -1.0]))
        drawn = torch.stack([torch.cat(model._drawn(rng)) for _ in range(300)])
    assert torch.allclose(drawn.mean(dim=(0, 1)), torch.tensor([1.0, 0.0, -1.0]).softmax(dim=0), atol=0.03)
    assert ((drawn - drawn.round()).abs() < 1e-5).all()


def test_the_least_likely_relus_give_way_to_the_better_linear_kind(sparse):
    model = copy.deepcopy(sparse)
    with torch.no_grad():
        model.logits[:, RELU] = torch.linspace(1, 2, 22)
        model.logits[:, IDENTITY], model.logits[:, ZERO] = 0.0, -1.0
        model.logits[0] = torch.tensor([1.0, -2.0, 0.5])
    model._choose()
    assert (model.kinds[-3:] == RELU).all()
    assert (model.kinds[1:-3] == IDENTITY).all()
    assert model.kinds[0] == ZERO


@pytest.mark.parametrize(
    ("argument", "value"), [("hidden", []), ("relus", -1), ("horizon", 0), ("temperature", 0.0), ("pressure", 0.0)]
)
def test_bad_arguments_are_named(argument, value):
    with pytest.raises(ValueError, match=f"{argument} must be"):
        SparseReLU(**{argument: value})


@pytest.mark.parametrize("make", [SparseReLU, MixER])
def test_it_becomes_an_environment(tmp_path, make):
    real = gym.make("InvertedPendulum-v5")
    data = logged(lambda obs, action: 0.9 * obs + 0.1 * action, o=4)
    spaces = Spaces(real.observation_space, real.action_space)
    model = make(updates=10)
    columns = [getattr(data, name) for name in ("obs", "action", "reward", "next_obs", "terminated", "episode")]
    model.fit(Transitions(*columns, spaces, "made up"), rng=generator(0))
    save_world(tmp_path / "world", model, task="InvertedPendulum-v5", sampler="tsinf")
    env = gym.make("learneddyn:LearnedDyn-v0", world=str(tmp_path / "world"))
    obs, _ = env.reset(seed=0)
    after, reward, *_ = env.step(env.action_space.sample())
    assert obs.shape == after.shape == (4,)
    assert np.isfinite(after).all()
    assert np.isfinite(reward)
    env.close()
    real.close()
