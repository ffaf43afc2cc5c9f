"""Sparse regression on bootstraps of the rows and of the candidate terms: E-SINDy.

Source: Fasel, Kutz, Brunton, Brunton, "Ensemble-SINDy: Robust sparse model discovery in the low-data, high-noise limit,
with active learning and control" (2022). The regression itself, sequentially thresholded least squares, is pysindy's;
its ensemble optimiser is not used, because it draws from the global random state.

A bootstrap keeps the triangular factor of its rows: ``|Θ c - y|^2 = |R_Θ c - R_y|^2`` for every c, so that the
regression has as many rows as columns, whatever the number of rows it was drawn from.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from learneddyn.core import DataError


class Bootstrap(NamedTuple):
    """One draw of rows and terms, as triangular factors, float64."""

    theta: Float[Tensor, "r k"]
    target: Float[Tensor, "r q"]
    kept: Int[Tensor, " k"]
    """The candidate terms that were not left out."""
    terms: int
    """Candidate terms in all."""

    def stlsq(self, threshold: float, ridge: float) -> Float[Tensor, "p q"]:
        """Return the coefficients, zero for the terms that were left out or fell below ``threshold``.

        Raises:
            ImportError: pysindy is not installed (names the extra).
        """
        found = _stlsq(threshold, ridge).fit(self.theta.cpu().numpy(), self.target.cpu().numpy()).coef_
        out = self.theta.new_zeros(self.terms, self.target.shape[1])
        out[self.kept] = torch.as_tensor(found, device=out.device).T
        return out


def draw_bootstraps(
    theta: Float[Tensor, "n p"],
    target: Float[Tensor, "n q"],
    bootstraps: int,
    dropped: int,
    rng: torch.Generator,
    progress: bool = False,
) -> list[Bootstrap]:
    """Draw rows with replacement, and leave ``dropped`` random terms out, ``bootstraps`` times.

    Raises:
        DataError: no term would be left.
    """
    rows, terms = theta.shape
    if dropped >= terms:
        raise DataError(f"dropped must be below the number of candidate terms {terms}, got {dropped}")
    draws = []
    for _ in tqdm(range(bootstraps), desc="bootstraps", disable=not progress):
        drawn = torch.randint(rows, (rows,), generator=rng, device=theta.device)
        kept = torch.randperm(terms, generator=rng, device=theta.device)[dropped:].sort().values
        both = torch.cat([theta.index_select(1, kept), target], dim=1).index_select(0, drawn)
        factor = torch.linalg.qr(both, mode="r").R
        draws.append(Bootstrap(factor[:, : len(kept)], factor[:, len(kept) :], kept, terms))
    return draws


def merged(coefficients: Float[Tensor, "m p q"], aggregate: str | None) -> Float[Tensor, "e p q"]:
    """Return the "median" or "mean" of all bootstraps as one member; every bootstrap as its own for None."""
    match aggregate:
        case "median":
            return coefficients.quantile(0.5, dim=0, keepdim=True)
        case "mean":
            return coefficients.mean(dim=0, keepdim=True)
    return coefficients


def require_options(bootstraps: int, dropped: int, aggregate: str | None, holdout_ratio: float) -> None:
    """Check what all regressions on bootstraps are told.

    Raises:
        ValueError: an argument outside its range (names it, the value, what is allowed).
    """
    for name, ok, value, allowed in (
        ("bootstraps", bootstraps >= 1, bootstraps, "at least 1"),
        ("dropped", dropped >= 0, dropped, "at least 0"),
        ("aggregate", aggregate in (None, "median", "mean"), aggregate, "'median', 'mean' or None"),
        ("holdout_ratio", 0 < holdout_ratio < 1, holdout_ratio, "between 0 and 1"),
    ):
        if not ok:
            raise ValueError(f"{name} must be {allowed}, got {value!r}")


def _stlsq(threshold: float, ridge: float) -> Any:
    """Return pysindy's optimiser.

    Raises:
        ImportError: pysindy is not installed (names the extra).
    """
    try:
        from pysindy import STLSQ
    except ImportError as error:
        raise ImportError("SINDy needs pysindy: pip install 'learneddyn[models]'") from error
    return STLSQ(threshold=threshold, alpha=ridge, max_iter=20)
