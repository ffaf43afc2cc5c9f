"""Which linear regions a piecewise-linear network visits, and what it does in each of them: its symbolic code.

Source: Brenner, Hemmer, Monfared, Durstewitz, "Almost-Linear RNNs Yield Highly Interpretable Symbolic Codes in
Dynamical Systems Reconstruction" (2024).
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from learneddyn.models.plrnn import PLRNN


class SymbolicCode(NamedTuple):
    """An orbit as a walk over linear regions, the most visited first."""

    bits: Bool[Tensor, "r p"]
    """Which units are on in each region."""
    symbols: Int[Tensor, " t"]
    """The region at every step."""
    dwell: Float[Tensor, " r"]
    """Share of the steps spent in each region."""
    transitions: Float[Tensor, "r r"]
    """Probability of the next region, row by row; zero rows for a region that the orbit never leaves a step behind."""


class FixedPoint(NamedTuple):
    """Where the linear map of one region rests, and how it turns around that point."""

    state: Float[Tensor, " m"]
    eigenvalues: Float[Tensor, "m 2"]
    """Real and imaginary parts."""
    real: bool
    """Whether the point lies in its own region; otherwise it is virtual."""


def symbolic_code(bits: Bool[Tensor, "t p"]) -> SymbolicCode:
    """Return the code of an orbit from the units that are on at every step (`PLRNN.regions`)."""
    if bits.shape[1] == 0:  # without rectified units there is one region; `unique` refuses rows of no columns
        kinds = bits[:1]
        symbols, counts = bits.new_zeros(len(bits), dtype=torch.long), bits.new_full((1,), len(bits), dtype=torch.long)
    else:
        kinds, symbols, counts = bits.unique(dim=0, return_inverse=True, return_counts=True)
    order = counts.argsort(descending=True)
    symbols = order.argsort()[symbols]
    moves = torch.zeros(len(kinds), len(kinds), device=bits.device)
    pairs = symbols[:-1] * len(kinds) + symbols[1:]
    moves = torch.bincount(pairs, minlength=len(kinds) ** 2).view(len(kinds), len(kinds)).float()
    return SymbolicCode(
        kinds[order], symbols, counts[order] / len(bits), moves / moves.sum(dim=1, keepdim=True).clamp_min(1)
    )


@torch.no_grad()
def fixed_points(model: PLRNN, code: SymbolicCode) -> list[FixedPoint]:
    """Return the fixed point of every region's linear map where the action is zero, in the environment's units.

    Raises:
        ValueError: the model is not almost linear.
    """
    if model.kind != "almost-linear":
        raise ValueError(f"fixed points by region need an almost-linear model, got {model.kind!r}")
    found = []
    rest = model.bias - model.drive @ (model.action_mean / model.action_std)
    for bits in code.bits:
        on = torch.ones_like(model.diagonal)
        on[model.rectified] = bits.to(on.dtype)
        linear = model.diagonal.diag() + model.mixing * on
        state = torch.linalg.lstsq(torch.eye(len(on), device=on.device) - linear, rest[:, None]).solution[:, 0]
        inside = bool(((state[model.rectified] > 0) == bits).all())
        found.append(FixedPoint(state, torch.view_as_real(torch.linalg.eigvals(linear)), inside))
    return found
