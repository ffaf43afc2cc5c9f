"""Does a model reproduce a system's attractor, and for how long does it follow a trajectory?

Sources: state-space divergence and spectral distance as in Hess, Monfared, Brenner, Durstewitz, "Generalized Teacher
Forcing for Learning Chaotic Dynamics" (2023); valid prediction time as in Gilpin, "Model scale versus domain knowledge
in statistical forecasting of chaotic systems" (2023); scaled errors: Hyndman, Koehler, "Another look at measures of
forecast accuracy" (2006); Lyapunov exponents by Benettin, Galgani, Giorgilli, Strelcyn,
"Lyapunov Characteristic Exponents for smooth dynamical systems" (1980); correlation dimension by Grassberger,
Procaccia, "Measuring the strangeness of strange attractors" (1983), without the pairs that Theiler, "Spurious dimension
from correlation algorithms applied to limited time-series data" (1986) warns of.
"""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

_SMOOTHING = 1e-5
"""Count added to every cell of a histogram, so that empty cells cost much but not infinitely much."""
_CENTRES, _DRAWS, _FAR = 1000, 1000, 10.0
_RADII, _RULER = 12, 1500
"""Radii that a correlation sum is fitted at, and states whose distances choose them."""
_PAIRS = 2_000_000
"""Distances that are held at a time."""


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

    def cells(states: np.ndarray) -> np.ndarray:
        known = np.nan_to_num(states, nan=np.inf)
        at = np.stack([np.searchsorted(e, x, "right") - 1 for e, x in zip(edges, known.T, strict=True)], axis=1)
        kept = ((at >= 0) & (at < bins)).all(axis=1)
        found = np.full(len(states), inside)
        found[kept] = np.ravel_multi_index(tuple(at[kept].T), (bins,) * true.shape[1])
        return found

    # Only the cells that hold a state are looked at one by one: of 30^5, few do.
    visited, number = np.unique(np.concatenate([cells(true), cells(generated)]), return_inverse=True)
    counts = [np.bincount(part, minlength=len(visited)) for part in (number[: len(true)], number[len(true) :])]
    totals = [len(states) + _SMOOTHING * (inside + 1) for states in (true, generated)]
    p, q = ((count + _SMOOTHING) / total for count, total in zip(counts, totals, strict=True))
    empty = (inside + 1 - len(visited)) * _SMOOTHING / totals[0] * np.log(totals[1] / totals[0])
    return float(np.sum(p * np.log(p / q)) + empty)


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

    A column with an entry that is not finite is 1 away; one that never changes has all its power at frequency 0. A
    spectrum is mirrored at its ends as in the source, which is how that of a real series goes on; there it is said to
    be what SciPy's filter does by default, which repeats the end itself (``mode="mirror"`` is the one used here).

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
    return _valid_steps(np.sqrt((((predicted - true) / scale) ** 2).mean(axis=2)), threshold) * dt * lyapunov


def symmetric_prediction_time(
    true: np.ndarray, predicted: np.ndarray, dt: float, lyapunov: float, threshold: float = 30.0
) -> np.ndarray:
    """Return for every forecast how long its sMAPE stays below the threshold, in Lyapunov times.

    The error is that of `symmetric_error`, 0 to 200, over the columns of one step. It depends on where zero is, so that
    figures of standardised and of raw states cannot be compared.

    Args:
        true: ``[n, t, d]`` trajectories.
        predicted: ``[n, t, d]`` forecasts of them.
        dt: time between two steps.
        lyapunov: largest Lyapunov exponent, per unit of time.
        threshold: of the error.
    """
    return _valid_steps(_symmetric(true, predicted).mean(axis=2), threshold) * dt * lyapunov


def _valid_steps(error: np.ndarray, threshold: float) -> np.ndarray:
    """Return the steps ``[n]`` until an error ``[n, t]`` is above the threshold or not a number."""
    over = ~(error <= threshold)
    return np.where(over.any(axis=1), over.argmax(axis=1), error.shape[1])


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
    return float(_symmetric(true, predicted).mean())


def _symmetric(true: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    known = np.isfinite(predicted)
    said = np.where(known, predicted, 0.0)
    size = np.abs(true) + np.abs(said)
    return 200.0 * np.where(known, np.abs(true - said) / np.where(size > 0, size, 1.0), 1.0)


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


def correlation_dimension(states: np.ndarray, apart: int = 100, shares: tuple[float, float] = (1e-3, 3e-2)) -> float:
    """Return the correlation dimension of the set that an orbit visits: 1 of a cycle, 2.05 of Lorenz's attractor.

    It is the slope of log C(r) over log r by least squares, where C(r) is the share of pairs of states that are closer
    than r. Few states show few dimensions: a dozen thousand are enough for two or three. Columns should be of similar
    size. Pairs are counted block by block: memory grows with the states, time with their square.

    Args:
        states: ``[t, d]``, in order of time.
        apart: pairs of states that are fewer steps apart are left out: they are near because little time passed.
        shares: of all pairs that are closer than the smallest and the largest radius.

    Returns:
        The dimension, 0 where all pairs within the largest radius coincide; NaN where a state is not finite.

    Raises:
        ValueError: no matrix, fewer than ``2 apart`` states, or shares that do not increase between 0 and 1.
    """
    if states.ndim != 2 or len(states) < 2 * max(1, apart):
        raise ValueError(f"states must be [t, d] with t of at least 2 apart = {2 * apart}, got {states.shape}")
    if not 0 < shares[0] < shares[1] < 1:
        raise ValueError(f"shares must increase between 0 and 1, got {shares}")
    if not np.isfinite(states).all():
        return float("nan")
    states, apart = states.astype(np.float64), max(1, apart)
    ruler = states[:: -(-len(states) // _RULER)]
    low, high = np.quantile(_squares(ruler, ruler)[np.triu_indices(len(ruler), 1)], shares) ** 0.5
    if high == 0:
        return 0.0
    radii = np.geomspace(max(low, 1e-6 * high), high, _RADII)
    edges, counts = np.concatenate([[0.0], radii**2]), np.zeros(_RADII)
    block = max(1, _PAIRS // len(states))
    for first in range(0, len(states) - apart, block):
        rows = np.arange(first, min(first + block, len(states) - apart))
        squares = _squares(states[rows], states[first + apart :])
        later = np.arange(first + apart, len(states)) - rows[:, None] >= apart
        counts += np.histogram(squares[later & (squares <= edges[-1])], edges)[0]
    closer = counts.cumsum()
    seen = closer > 0
    if closer[0] == closer[-1]:
        return 0.0
    return float(np.polyfit(np.log(radii[seen]), np.log(closer[seen]), 1)[0])


def _squares(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return squared distances ``[n, m]``, column by column: products would lose what is small."""
    squares = np.zeros((len(a), len(b)))
    for column in range(a.shape[1]):
        squares += (a[:, column, None] - b[:, column]) ** 2
    return squares


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
