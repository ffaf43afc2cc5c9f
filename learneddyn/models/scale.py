"""What a column is divided by, and how exact a regression may claim to be: both relative to how far the column spreads.

A network sees columns in standard deviations, whatever their units are.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

EXACT = 1e-6
"""Least standard deviation of an error that is believed, in units of its column's spread: float32 shows no less."""


def spread(columns: Float[Tensor, "n c"]) -> Float[Tensor, " c"]:
    """Return every column's standard deviation, and 1 for a column that is constant up to the rounding of float32."""
    exact = columns.double()
    std = (exact - exact.mean(dim=0)).square().mean(dim=0).sqrt()  # Tensor.std warns of no columns
    constant = std <= torch.finfo(torch.float32).eps * exact.abs().amax(dim=0)
    return torch.where(constant, 1.0, std).to(columns.dtype)


def gaussian_nll(error: Tensor, std: Tensor) -> Float[Tensor, ""]:
    """Return the mean negative log-likelihood of errors, nats per number; ``std`` is broadcast to them."""
    return (0.5 * (error / std).square() + std.log()).mean() + 0.5 * math.log(2 * math.pi)
