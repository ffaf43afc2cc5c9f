import numpy as np
import pytest
import torch

from learneddyn.core import generator
from learneddyn.planners.noise import coloured, truncated_normal


@pytest.mark.parametrize("beta", [0.0, 0.25, 1.0, 2.0, 3.5])
def test_power_falls_with_the_colour(beta):
    signals = coloured(10_000, 64, beta=beta, rng=generator(0)).numpy()
    power = (np.abs(np.fft.rfft(signals)) ** 2).mean(axis=0)[1:-1]
    slope, _ = np.polyfit(np.log(np.fft.rfftfreq(64)[1:-1]), np.log(power), 1)
    assert slope == pytest.approx(-beta, abs=0.1)


@pytest.mark.parametrize("length", [1, 2, 3, 15, 30, 64])
@pytest.mark.parametrize("beta", [0.0, 2.0])
def test_every_entry_has_unit_variance(length, beta):
    signals = coloured(20_000, length, beta=beta, rng=generator(1))
    assert signals.shape == (20_000, length)
    assert torch.allclose(signals.var(dim=0), torch.ones(length), atol=0.05)
    assert signals.var().item() == pytest.approx(1, abs=0.03)
    assert signals.mean().item() == pytest.approx(0, abs=0.02)


def test_white_noise_is_uncorrelated_and_red_noise_is_not():
    white, red = (coloured(20_000, 30, beta=beta, rng=generator(2)) for beta in (0.0, 2.0))
    assert (white[:, 3] * white[:, 4]).mean().item() == pytest.approx(0, abs=0.03)
    assert (red[:, 3] * red[:, 4]).mean().item() > 0.8


def test_truncated_normal_has_the_moments_of_its_law():
    draws = truncated_normal(200_000, rng=generator(0))
    assert draws.abs().max() <= 2
    # Variance of a standard normal cut at 2: 1 - 2 * 2 * phi(2) / (Phi(2) - Phi(-2)).
    assert draws.var().item() == pytest.approx(0.7737, abs=0.01)
    assert draws.mean().item() == pytest.approx(0, abs=0.01)
