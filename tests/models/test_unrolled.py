"""Unrolled networks say and learn what the loop over steps does, in a fraction of its time."""

import time

import gymnasium as gym
import numpy as np
import pytest
import torch

from learneddyn.core import generator
from learneddyn.models import PLRNN
from learneddyn.models.forcing import forced_loss, step_by_step, stepwise_loss
from learneddyn.spaces import Spaces


def network(kind, latent=5, actions=2, reward=True):
    box = gym.spaces.Box
    model = PLRNN(kind, latent=latent, hidden=7, relus=2, learn_reward=reward)
    model._build(Spaces(*(box(-np.inf, np.inf, (width,), np.float32) for width in (3, actions))))
    rng = generator(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=rng))
    return model.double()


def sequences(actions=2, outputs=4, batch=6, steps=9):
    return [torch.randn(batch, steps, width, generator=generator(1)).double() for width in (3, actions, outputs)]


@pytest.mark.parametrize("kind", ["shallow", "clipped", "almost-linear"])
@pytest.mark.parametrize("latent", [3, 5])
@pytest.mark.parametrize(("alpha", "every"), [(0.0, 1), (0.3, 1), (1.0, 1), (1.0, 4)])
def test_losses_and_gradients_are_those_of_the_loop(kind, latent, alpha, every):
    model, (x, u, target) = network(kind, latent), sequences()
    alphas = [alpha if step and step % every == 0 else 0.0 for step in range(x.shape[1])]
    plain = stepwise_loss(step_by_step(model, x, u, alphas), target)
    fast = forced_loss(model, x, u, target, alpha, every=every)
    assert torch.allclose(fast, plain, rtol=1e-12)
    weights = list(model.parameters())
    wanted, got = (torch.autograd.grad(loss, weights, materialize_grads=True) for loss in (plain, fast))
    for (name, _), one, two in zip(model.named_parameters(), wanted, got, strict=True):
        assert torch.allclose(one, two, rtol=1e-9, atol=1e-12), name


def test_no_action_columns():
    model, (x, _, target) = network("clipped", actions=0), sequences()
    u = x[..., :0]
    plain = stepwise_loss(step_by_step(model, x, u, [0.0] + [0.2] * 8), target)
    assert torch.allclose(forced_loss(model, x, u, target, 0.2), plain, rtol=1e-12)


def test_data_and_states_stay_as_they_are():
    model, (x, u, target) = network("shallow"), sequences()
    kept = x.clone()
    first = forced_loss(model, x, u, target, 0.5)
    first.backward(retain_graph=True)
    again = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    first.backward()
    assert torch.equal(x, kept)
    assert all(map(torch.equal, again, [p.grad for p in model.parameters() if p.grad is not None]))


def test_an_update_costs_less_than_half_of_the_loops():
    model = network("clipped", latent=3, actions=1, reward=False).float()
    x, u, target = (part.float() for part in sequences(1, 3, batch=32, steps=50))
    alphas = [0.0] + [0.1] * 49

    def cost(said):
        best = float("inf")
        for _ in range(4):
            began = time.process_time()
            stepwise_loss(said(), target).backward()
            best = min(best, time.process_time() - began)
        return best

    assert cost(lambda: model.unroll(x, u, alphas)) < 0.5 * cost(lambda: step_by_step(model, x, u, alphas))
