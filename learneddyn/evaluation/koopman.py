"""Which eigenvalues of a fitted Koopman matrix belong to the system: residuals, pseudospectra, verified modes.

Source: Colbrook, Townsend, "Rigorous data-driven computation of spectral properties of Koopman operators for dynamical
systems" (2021). A small residual certifies an approximate eigenfunction of the operator itself, not of its matrix; a
large one marks spectral pollution. The converse does not hold: no amount of data shows that an eigenvalue is absent, so
everything here returns certificates, never the statement that there is no mode.

All functions take lifted rows ``psi`` before a step and ``psi_next`` after it (`Koopman.lifted_pairs`), weighed alike.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Complex, Float
from torch import Tensor

from learneddyn.models.koopman import least_squares


class Spectrum(NamedTuple):
    """Eigenpairs of a Koopman matrix, sorted by residual, and the residual of each in the operator."""

    eigenvalues: Complex[Tensor, " k"]
    vectors: Complex[Tensor, "k k"]
    residuals: Float[Tensor, " k"]

    def verified(self, tolerance: float = 0.05) -> Bool[Tensor, " k"]:
        """Return which pairs have a residual below the tolerance."""
        return self.residuals < tolerance


@torch.no_grad()
def spectrum(psi: Float[Tensor, "n k"], psi_next: Float[Tensor, "n k"], rcond: float = 1e-12) -> Spectrum:
    """Return the eigenpairs of the least-squares matrix and ``|psi_next v - lambda psi v| / |psi v|`` for each.

    Computed in float64 by QR, so that the condition number is not squared.
    """
    before, after = psi.double(), psi_next.double()
    values, vectors = torch.linalg.eig(least_squares(before, after, rcond))
    lifted, stepped = before.to(vectors.dtype) @ vectors, after.to(vectors.dtype) @ vectors
    size = lifted.norm(dim=0)
    residuals = (stepped - lifted * values).norm(dim=0) / size.clamp_min(1e-300)
    order = residuals.argsort()
    return Spectrum(values[order], vectors[:, order], residuals[order])


@torch.no_grad()
def pseudospectrum(
    psi: Float[Tensor, "n k"], psi_next: Float[Tensor, "n k"], points: Complex[Tensor, " g"], rcond: float = 1e-12
) -> Float[Tensor, " g"]:
    """Return for every complex point z the smallest residual that any function of the dictionary has there.

    A value of epsilon certifies that z lies in the operator's epsilon-pseudospectrum (up to sampling error). Directions
    of the dictionary that the data does not tell apart (singular values below ``rcond``) are left out.
    """
    _, r = torch.linalg.qr(torch.cat([psi, psi_next], dim=1).double())
    k = psi.shape[1]
    # The data enters only through inner products, so rows of R stand for rows of data.
    before, after = r[:, :k], r[:, k:]
    _, singular, basis = torch.linalg.svd(before, full_matrices=False)
    kept = singular > rcond * singular[0]
    change = basis[kept].T / singular[kept]
    before, after = (before @ change).to(points.dtype), (after @ change).to(points.dtype)
    shifted = after - points[:, None, None] * before
    return torch.linalg.svdvals(shifted)[:, -1].real


@torch.no_grad()
def verified_spectrum(
    psi: Float[Tensor, "n k"],
    psi_next: Float[Tensor, "n k"],
    spacing: float = 0.05,
    radius: float = 1.2,
    below: float = 0.5,
) -> tuple[Complex[Tensor, " m"], Float[Tensor, " m"]]:
    """Return the grid points that minimise the residual around themselves, and their residuals as certificates.

    Of every grid point z with residual tau <= ``below``, the points with the least residual within distance tau are
    kept. For an operator that preserves its measure the spectrum comes as near to a kept point as its residual.
    """
    steps = torch.arange(-radius, radius + spacing / 2, spacing, dtype=torch.float64, device=psi.device)
    grid = torch.complex(*torch.meshgrid(steps, steps, indexing="ij")).flatten()
    grid = grid[grid.abs() <= radius]
    residual = pseudospectrum(psi, psi_next, grid)
    candidates = residual <= below
    near = (grid[candidates, None] - grid[None, :]).abs() <= residual[candidates, None] + 1e-12
    best = torch.where(near, residual[None, :], torch.inf).argmin(dim=1).unique()
    return grid[best], residual[best]
