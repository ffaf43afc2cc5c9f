"""The two noises of the cross-entropy planners."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

TRUNCATION = 2.0
"""Standard deviations at which `truncated_normal` is cut."""


def truncated_normal(*shape: int, rng: torch.Generator) -> Float[Tensor, "*shape"]:
    """Draw from the standard normal distribution, conditioned on lying within two standard deviations."""
    inside = math.erf(TRUNCATION / math.sqrt(2))
    uniform = 2 * torch.rand(shape, generator=rng, device=rng.device) - 1
    # Rounding at the edge must not let a sample leave the bounds that the cut stands for.
    return (math.sqrt(2) * torch.erfinv(inside * uniform)).clamp_(-TRUNCATION, TRUNCATION)


def coloured(*shape: int, beta: float, rng: torch.Generator) -> Float[Tensor, "*shape"]:
    """Draw Gaussian signals along the last axis whose power falls as ``frequency ** -beta``; 0 is white noise.

    Every entry has mean 0 and variance 1. The constant part has the power of the lowest frequency, one period in the
    whole signal. Method: Timmer, Koenig, "On generating power law noise" (1995), except that the normalisation counts
    the constant part and the highest frequency in full, which makes the variance 1 at every length and colour.
    """
    length = shape[-1]
    frequency = torch.fft.rfftfreq(length, device=rng.device).clamp_min_(1 / length)
    amplitude = frequency ** (-beta / 2)
    paired = torch.ones_like(frequency, dtype=torch.bool)
    # These two are their own mirror images: real, and of twice the variance in the real part.
    paired[0] = False
    if length % 2 == 0:
        paired[-1] = False
    variance = (torch.where(paired, 4.0, 2.0) * amplitude.square()).sum() / length**2
    real, imaginary = torch.randn(2, *shape[:-1], len(frequency), generator=rng, device=rng.device)
    real, imaginary = torch.where(paired, real, math.sqrt(2) * real), imaginary * paired
    return torch.fft.irfft(torch.complex(real, imaginary) * (amplitude / variance.sqrt()), n=length)
