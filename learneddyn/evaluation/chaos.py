"""Does a model reproduce a system's attractor, and for how long does it follow a trajectory?

Sources: state-space divergence and spectral distance as in Hess, Monfared, Brenner, Durstewitz, "Generalized Teacher
Forcing for Learning Chaotic Dynamics" (2023); valid prediction time as in Gilpin, "Model scale versus domain knowledge
in statistical forecasting of chaotic systems" (2023); Lyapunov exponents by Benettin, Galgani, Giorgilli, Strelcyn,
"Lyapunov Characteristic Exponents for smooth dynamical systems" (1980).
"""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

_SMOOTHING = 1e-5
"""Count added to every cell of a histogram, so that empty cells cost much but not infinitely much."""


def state_space_divergence(true: np.ndarray, generated: np.ndarray, bins: int = 30) -> float:
    """Return D_stsp, the Kullback-Leibler divergence between two attractors' histograms, in nats.

    Args:
        true: ``[t, d]`` states of the system; their range, widened by a tenth of their standard deviation, is binned.
        generated: ``[t', d]`` states of the model.
        bins: per axis.

    Raises:
        ValueError: more than five columns, for which a histogram has too many cells.
    """
    columns = true.shape[1]
    if columns > 5:
        raise ValueError(f"a histogram of {columns} columns has {bins}^{columns} cells: at most 5 columns are possible")
    margin = 0.1 * true.std(axis=0)
    edges = [
        np.linspace(low, high, bins + 1)
        for low, high in zip(true.min(axis=0) - margin, true.max(axis=0) + margin, strict=True)
    ]

    def density(states: np.ndarray) -> np.ndarray:
        inside = np.nan_to_num(states, nan=np.inf)
        cells = np.stack([np.searchsorted(e, x, "right") - 1 for e, x in zip(edges, inside.T, strict=True)], axis=1)
        cells = cells[((cells >= 0) & (cells < bins)).all(axis=1)]
        flat = np.ravel_multi_index(tuple(cells.T), (bins,) * columns)
        counts = np.bincount(flat, minlength=bins**columns) + _SMOOTHING
        return counts / counts.sum()

    p, q = density(true), density(generated)
    return float(np.sum(p * np.log(p / q)))


def spectral_distance(true: np.ndarray, generated: np.ndarray, sigma: float = 20.0) -> float:
    """Return D_H, the Hellinger distance between smoothed power spectra, averaged over columns; 0 to 1.

    Args:
        true: ``[t, d]`` states of the system, at the same time step as
        generated: ``[t', d]`` states of the model; both are cut to the shorter length.
        sigma: standard deviation of the Gaussian that smooths a spectrum, in frequency bins.
    """
    length = min(len(true), len(generated))
    distances = []
    for column in range(true.shape[1]):
        p, q = (_spectrum(series[:length, column], sigma) for series in (true, generated))
        distances.append(np.sqrt(max(0.0, 1.0 - float(np.sum(np.sqrt(p * q))))))
    return float(np.mean(distances))


def valid_prediction_time(
    true: np.ndarray, predicted: np.ndarray, scale: np.ndarray, dt: float, lyapunov: float, threshold: float = 0.4
) -> np.ndarray:
    """Return for every forecast how long its normalised error stays below the threshold, in Lyapunov times.

    Args:
        true: ``[n, t, d]`` trajectories.
        predicted: ``[n, t, d]`` forecasts of them.
        scale: ``[d]`` standard deviation of the system's states.
        dt: time between two steps.
        lyapunov: largest Lyapunov exponent, per unit of time.
        threshold: of the root mean squared error in units of ``scale``.
    """
    error = np.sqrt((((predicted - true) / scale) ** 2).mean(axis=2))
    over = ~(error <= threshold)
    steps = np.where(over.any(axis=1), over.argmax(axis=1), true.shape[1])
    return steps * dt * lyapunov


@torch.no_grad()
def lyapunov_spectrum(
    step: Callable[[Float[Tensor, " m"]], Float[Tensor, " m"]],
    state: Float[Tensor, " m"],
    steps: int,
    dt: float = 1.0,
    transient: int = 1000,
) -> Float[Tensor, " m"]:
    """Return all Lyapunov exponents of a map, largest first, per unit of time, by QR iteration of its Jacobian.

    Args:
        step: the map, differentiable.
        state: where to begin.
        steps: over which the exponents are averaged.
        dt: time that one application of the map takes.
        transient: steps to take before.
    """
    for _ in range(transient):
        state = step(state)
    jacobian = torch.func.jacrev(step)
    frame = torch.eye(len(state), dtype=state.dtype, device=state.device)
    grown = torch.zeros(len(state), dtype=state.dtype, device=state.device)
    for _ in range(steps):
        frame, stretch = torch.linalg.qr(jacobian(state) @ frame)
        grown += stretch.diagonal().abs().log()
        state = step(state)
    return (grown / (steps * dt)).sort(descending=True).values


def _spectrum(series: np.ndarray, sigma: float) -> np.ndarray:
    """Return the smoothed, normalised power spectrum of a standardised series."""
    spread = series.std()
    power = np.abs(np.fft.rfft((series - series.mean()) / (spread if spread > 0 else 1.0))) ** 2
    reach = min(int(4 * sigma), len(power) - 1)
    window = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    smooth = np.convolve(np.pad(power, reach, mode="reflect"), window / window.sum(), mode="valid")
    return smooth / smooth.sum()
