"""Does a model reproduce a system's attractor, and for how long does it follow a trajectory?

Sources: state-space divergence and spectral distance as in Hess, Monfared, Brenner, Durstewitz, "Generalized Teacher
Forcing for Learning Chaotic Dynamics" (2023); valid prediction time as in Gilpin, "Model scale versus domain knowledge
in statistical forecasting of chaotic systems" (2023); scaled errors: Hyndman, Koehler, "Another look at measures of
forecast accuracy" (2006); Lyapunov exponents by Benettin, Galgani, Giorgilli, Strelcyn,
"Lyapunov Characteristic Exponents for smooth dynamical systems" (1980).
"""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

_SMOOTHING = 1e-5
"""Count added to every cell of a histogram, so that empty cells cost much but not infinitely much."""
_CENTRES, _DRAWS, _FAR = 1000, 1000, 10.0


def state_space_divergence(true: np.ndarray, generated: np.ndarray, bins: int = 30, seed: int = 0) -> float:
    """Return D_stsp, the Kullback-Leibler divergence of a model's attractor from the true one, in nats.

    Up to five columns it is that of two histograms, whose cells begin with a count of 1e-5. One more cell holds all
    states outside the binned range and those that are not finite: a model that leaves the attractor pays for every step
    it is away (the source drops these steps, so that a model that visits the attractor for a moment and then diverges
    looks perfect). Beyond five columns it is that of two mixtures of Gaussians of unit variance centred on (up to 1000
    of) the states, in standard deviations of the true ones, estimated from 1000 draws; states that are not finite, or
    further than 10 deviations from the true mean in a column, then count as lying there.

    The two forms are not comparable. Neither is 0 between two stretches of the same orbit: report that floor too.

    Args:
        true: ``[t, d]`` states of the system; their range, widened by a tenth of their standard deviation, is binned.
        generated: ``[t', d]`` states of the model.
        bins: per axis.
        seed: of the draws.

    Raises:
        ValueError: other columns, no states, or true ones that are not finite.
    """
    _require_states(true, generated)
    if true.shape[1] > 5:
        return _mixture_divergence(true, generated, np.random.default_rng(seed))
    std = true.std(axis=0)
    margin = np.where(std > 0, 0.1 * std, 0.5)  # a column that stays the same has cells too
    edges = [
        np.linspace(low, high, bins + 1)
        for low, high in zip(true.min(axis=0) - margin, true.max(axis=0) + margin, strict=True)
    ]
    inside = bins ** true.shape[1]

    def density(states: np.ndarray) -> np.ndarray:
        known = np.nan_to_num(states, nan=np.inf)
        cells = np.stack([np.searchsorted(e, x, "right") - 1 for e, x in zip(edges, known.T, strict=True)], axis=1)
        kept = ((cells >= 0) & (cells < bins)).all(axis=1)
        flat = np.ravel_multi_index(tuple(cells[kept].T), (bins,) * true.shape[1])
        counts = np.bincount(flat, minlength=inside + 1) + _SMOOTHING
        counts[inside] += (~kept).sum()
        return counts / counts.sum()

    p, q = density(true), density(generated)
    return float(np.sum(p * np.log(p / q)))


def _require_states(true: np.ndarray, generated: np.ndarray) -> None:
    if true.ndim != 2 or generated.ndim != 2 or true.shape[1] != generated.shape[1] or not len(true) * len(generated):
        raise ValueError(f"states must be [t, d] with the same d and t >= 1, got {true.shape} and {generated.shape}")
    if not np.isfinite(true).all():
        raise ValueError("the true states must be finite")


def _mixture_divergence(true: np.ndarray, generated: np.ndarray, rng: np.random.Generator) -> float:
    """Return the divergence of mixtures of unit Gaussians on the states of two orbits, by Monte Carlo."""
    mean, spread = true.mean(axis=0), true.std(axis=0)
    spread = np.where(spread > 0, spread, 1.0)

    def centres(states: np.ndarray) -> np.ndarray:
        rows = rng.choice(len(states), min(_CENTRES, len(states)), replace=False)
        scaled = np.nan_to_num((states[rows] - mean) / spread, nan=_FAR, posinf=_FAR, neginf=-_FAR)
        return scaled.clip(-_FAR, _FAR)

    p, q = centres(true), centres(generated)
    draws = p[rng.integers(len(p), size=_DRAWS)] + rng.standard_normal((_DRAWS, true.shape[1]))

    def log_density(of: np.ndarray) -> np.ndarray:
        distance = (draws**2).sum(axis=1)[:, None] + (of**2).sum(axis=1) - 2 * draws @ of.T
        nearest = distance.min(axis=1)
        return -0.5 * nearest + np.log(np.exp(-0.5 * (distance - nearest[:, None])).mean(axis=1))

    return float((log_density(p) - log_density(q)).mean())


def spectral_distance(true: np.ndarray, generated: np.ndarray, sigma: float = 20.0) -> float:
    """Return D_H, the Hellinger distance between smoothed power spectra, averaged over columns; 0 to 1.

    A column with an entry that is not finite is 1 away; one that never changes has all its power at frequency 0.

    Args:
        true: ``[t, d]`` states of the system, at the same time step as
        generated: ``[t', d]`` states of the model; both are cut to the shorter length.
        sigma: standard deviation of the Gaussian that smooths a spectrum, in frequency bins.
    """
    length = min(len(true), len(generated))
    distances = []
    for column in range(true.shape[1]):
        if not np.isfinite(generated[:length, column]).all():
            distances.append(1.0)
            continue
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


def prediction_error(true: np.ndarray, predicted: np.ndarray, steps: int, scale: np.ndarray) -> float:
    """Return PE(n), the mean squared error ``steps`` ahead, in units of the variance of the system's states.

    Infinite where a forecast is not finite.

    Args:
        true: ``[n, t, d]`` trajectories.
        predicted: ``[n, t, d]`` forecasts of them; entry 0 is one step ahead.
        steps: how far ahead, 1 to t.
        scale: ``[d]`` standard deviation of the system's states.

    Raises:
        ValueError: more steps than there are.
    """
    if not 1 <= steps <= true.shape[1]:
        raise ValueError(f"steps must be 1 to {true.shape[1]}, got {steps}")
    return _mean(((predicted - true)[:, steps - 1] / scale) ** 2)


def symmetric_error(true: np.ndarray, predicted: np.ndarray) -> float:
    """Return sMAPE = 200 mean |true - predicted| / (|true| + |predicted|), 0 to 200.

    That is the usual form; half of it, 0 to 100, is what the package dysts calls scaled. An entry that is not finite
    counts 200, one where both are 0 counts 0.
    """
    size = np.abs(true) + np.abs(predicted)
    share = np.abs(true - predicted) / np.where(size > 0, size, 1.0)
    return float(200.0 * np.where(np.isfinite(predicted), share, 1.0).mean())


def scaled_error(true: np.ndarray, predicted: np.ndarray, past: np.ndarray) -> float:
    """Return MASE: the mean absolute error over that of repeating the last value, one step ahead, in ``past``.

    Above 1 a forecast of any horizon is worse than persistence is at one step; infinite where one is not finite.

    Args:
        true: ``[..., t, d]`` trajectories.
        predicted: forecasts of them.
        past: ``[t', d]`` states before, at the same time step; every column is scaled by its own.

    Raises:
        ValueError: a column of ``past`` never changes, or is shorter than two states.
    """
    naive = np.abs(np.diff(past, axis=0)).mean(axis=0) if len(past) > 1 else np.zeros(past.shape[1])
    if not (naive > 0).all():
        raise ValueError(f"past needs two states or more that change in every column, its mean changes are {naive}")
    return _mean(np.abs(true - predicted) / naive)


def _mean(error: np.ndarray) -> float:
    """Return the mean, infinite where an entry is not finite."""
    return float(error.mean()) if np.isfinite(error).all() else float("inf")


@torch.no_grad()
def lyapunov_spectrum(
    step: Callable[[Float[Tensor, "b m"]], Float[Tensor, "b m"]],
    states: Float[Tensor, "b m"],
    steps: int,
    dt: float = 1.0,
    transient: int = 1000,
) -> Float[Tensor, " m"]:
    """Return all Lyapunov exponents of a map, largest first, per unit of time, by QR iteration of its Jacobian.

    Args:
        step: the map, differentiable, row by row.
        states: where orbits begin; exponents are averaged over them, so that ten orbits need a tenth of the steps.
        steps: of the iteration; the first fifth only turns the frame, the exponents are averaged over the others.
        dt: time that one application of the map takes.
        transient: steps to take before.
    """
    for _ in range(transient):
        states = step(states)
    jacobian = torch.func.jacrev(lambda rows: step(rows).sum(dim=0))  # rows do not mix
    frame = torch.eye(states.shape[1], dtype=states.dtype, device=states.device).expand(len(states), -1, -1)
    grown, turning = torch.zeros_like(states), steps // 5
    for number in range(steps):
        frame, stretch = torch.linalg.qr(jacobian(states).transpose(0, 1) @ frame)
        if number >= turning:
            grown += stretch.diagonal(dim1=1, dim2=2).abs().log()
        states = step(states)
    return (grown.mean(dim=0) / ((steps - turning) * dt)).sort(descending=True).values


def _spectrum(series: np.ndarray, sigma: float) -> np.ndarray:
    """Return the smoothed, normalised power spectrum of a series around its mean."""
    series = series - series.mean()
    size = np.abs(series).max()
    power = np.abs(np.fft.rfft(series / size)) ** 2 if size > 0 else np.eye(1, len(series) // 2 + 1)[0]
    reach = min(int(4 * sigma), len(power) - 1)
    window = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    smooth = np.convolve(np.pad(power, reach, mode="reflect"), window / window.sum(), mode="valid")
    return smooth / smooth.sum()
