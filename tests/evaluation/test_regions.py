"""Linear regions: fixed points rest under no action, and a model without rectified units has one region."""

import pytest
import torch

from learneddyn.core import generator
from learneddyn.evaluation.regions import fixed_points, symbolic_code
from learneddyn.models import PLRNN
from learneddyn.testing import example_transitions


def fitted(relus):
    model = PLRNN("almost-linear", latent=5, relus=relus, updates=20, window=6, batch_size=8)
    model.fit(example_transitions(), rng=generator(0))
    return model


def test_fixed_points_rest_under_no_action():
    """No action is zero in the environment's units, which differs from the mean action of the data."""
    model = fitted(relus=2)
    with torch.no_grad():
        model.action_mean.fill_(0.4)
        model.mixing.mul_(0.1)
    code = symbolic_code(torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]]).bool())
    real = [point for point in fixed_points(model, code) if point.real]
    assert real, "nearly linear: one region holds the fixed point"
    for point in real:
        obs = point.state[:3] * model.obs_std + model.obs_mean
        answer = model.predict(obs[None], torch.zeros(1, 2), point.state[None])
        assert torch.allclose(answer.mean[0, 0], obs, atol=1e-4)
        assert torch.allclose(answer.memory[0], point.state, atol=1e-4)
        moved = model.predict(obs[None], torch.full((1, 2), 0.4), point.state[None])
        assert not torch.allclose(moved.memory[0], point.state, atol=1e-4)


def test_a_linear_model_has_one_region():
    model = fitted(relus=0)
    code = symbolic_code(model.regions(torch.zeros(7, 5), torch.zeros(7, 2)))
    assert code.bits.shape == (1, 0)
    assert code.symbols.tolist() == [0] * 7
    assert code.dwell.tolist() == pytest.approx([1.0])
    assert code.transitions.tolist() == [[1.0]]
    [point] = fixed_points(model, code)
    assert point.real
