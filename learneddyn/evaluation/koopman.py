"""Which eigenvalues of a fitted Koopman matrix belong to the system: residuals, pseudospectra, verified modes.

Source: Colbrook, Townsend, "Rigorous data-driven computation of spectral properties of Koopman operators for dynamical
systems" (2021). A small residual certifies an approximate eigenfunction of the operator itself, not of its matrix; a
large one marks spectral pollution. The converse does not hold: no amount of data shows that an eigenvalue is absent, so
everything here returns certificates, never the statement that there is no mode.

All functions take blocks of lifted rows ``(psi, psi_next)`` before a step and after it, weighed alike, as
`Koopman.lifted_pairs` yields them; a single pair of tensors is ``[(psi, psi_next)]``. The data enters through inner
products alone, so the rows are replaced by the triangle of their QR decomposition, block by block, in float64.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Complex, Float
from torch import Tensor

from learneddyn.models.koopman import solve, triangle

Pairs = Iterable[tuple[Float[Tensor, "n k"], Float[Tensor, "n k"]]]
_BLOCK = 2**22
"""Numbers in the largest intermediate of a pseudospectrum."""


class Spectrum(NamedTuple):
    """Eigenpairs of a Koopman matrix, sorted by residual, and the residual of each in the operator."""

    eigenvalues: Complex[Tensor, " k"]
    vectors: Complex[Tensor, "k k"]
    residuals: Float[Tensor, " k"]

    def verified(self, tolerance: float = 0.05) -> Bool[Tensor, " k"]:
        """Return which pairs have a residual below the tolerance."""
        return self.residuals < tolerance


@torch.no_grad()
def spectrum(pairs: Pairs, rcond: float = 1e-12) -> Spectrum:
    """Return the eigenpairs of the least-squares matrix and ``|psi_next v - lambda psi v| / |psi v|`` for each.

    Raises:
        ValueError: there is no block.
    """
    r, k = _triangle(pairs)
    before, after = r[:, :k], r[:, k:]
    values, vectors = torch.linalg.eig(solve(r, k, rcond))
    lifted, stepped = before.to(vectors.dtype) @ vectors, after.to(vectors.dtype) @ vectors
    size = lifted.norm(dim=0)
    residuals = (stepped - lifted * values).norm(dim=0) / size.clamp_min(1e-300)
    order = residuals.argsort()
    return Spectrum(values[order], vectors[:, order], residuals[order])


@torch.no_grad()
def pseudospectrum(pairs: Pairs, points: Complex[Tensor, " g"], rcond: float = 1e-12) -> Float[Tensor, " g"]:
    """Return for every complex point z the smallest residual that any function of the dictionary has there.

    A value of epsilon certifies that z lies in the operator's epsilon-pseudospectrum (up to sampling error). Directions
    of the dictionary that the data does not tell apart (singular values below ``rcond``) are left out.

    Raises:
        ValueError: there is no block.
    """
    r, k = _triangle(pairs)
    before, after = r[:, :k], r[:, k:]
    _, singular, basis = torch.linalg.svd(before, full_matrices=False)
    kept = singular > rcond * singular[0]
    change = basis[kept].T / singular[kept]
    before, after = (before @ change).to(points.dtype), (after @ change).to(points.dtype)
    # As before, a triangle stands for the rows: what is left to decompose is 2 k' by k' for each point.
    r = torch.linalg.qr(torch.cat([before, after], dim=1), mode="r").R
    before, after = r[:, : before.shape[1]], r[:, before.shape[1] :]
    together = max(1, _BLOCK // before.numel())
    least = [torch.linalg.svdvals(after - z[:, None, None] * before)[:, -1].real for z in points.split(together)]
    return torch.cat(least)


@torch.no_grad()
def verified_spectrum(
    pairs: Pairs, spacing: float = 0.05, radius: float = 1.2, below: float = 0.5
) -> tuple[Complex[Tensor, " m"], Float[Tensor, " m"]]:
    """Return the grid points that minimise the residual around themselves, and their residuals as certificates.

    Of every grid point z with residual tau <= ``below``, the points with the least residual within distance tau are
    kept. For an operator that preserves its measure the spectrum comes as near to a kept point as its residual.

    Raises:
        ValueError: there is no block.
    """
    r, k = _triangle(pairs)
    steps = torch.arange(-radius, radius + spacing / 2, spacing, dtype=torch.float64, device=r.device)
    grid = torch.complex(*torch.meshgrid(steps, steps, indexing="ij")).flatten()
    grid = grid[grid.abs() <= radius]
    residual = pseudospectrum([(r[:, :k], r[:, k:])], grid)
    best = []
    for some in (residual <= below).nonzero().flatten().split(max(1, _BLOCK // len(grid))):
        near = (grid[some, None] - grid[None, :]).abs() <= residual[some, None] + 1e-12
        best.append(torch.where(near, residual[None, :], torch.inf).argmin(dim=1))
    chosen = torch.cat([*best, torch.empty(0, dtype=torch.long, device=r.device)]).unique()
    return grid[chosen], residual[chosen]


def _triangle(pairs: Pairs) -> tuple[Float[Tensor, "_ two_k"], int]:
    """Return the triangle of ``[psi, psi_next]`` and the width of ``psi``."""
    r = triangle(torch.cat([psi, psi_next], dim=1).double() for psi, psi_next in pairs)
    return r, r.shape[1] // 2
