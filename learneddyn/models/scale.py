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
    return or_one(std, exact).to(columns.dtype)


def or_one(size: Float[Tensor, " c"], columns: Float[Tensor, "n c"]) -> Float[Tensor, " c"]:
    """Return every column's ``size``, and 1 where that is no more than the rounding to float32 of its largest entry."""
    return torch.where(size <= torch.finfo(torch.float32).eps * columns.abs().amax(dim=0), 1.0, size)


def gaussian_nll(error: Tensor, std: Tensor) -> Float[Tensor, ""]:
    """Return the mean negative log-likelihood of errors, nats per number; ``std`` is broadcast to them."""
    return (0.5 * (error / std).square() + std.log()).mean() + 0.5 * math.log(2 * math.pi)
