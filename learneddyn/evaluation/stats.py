"""Bootstrap intervals and robust aggregates over few runs.

Every function names its bootstrap: *BCa* (bias-corrected and accelerated; Efron, "Better Bootstrap Confidence
Intervals", 1987) for one sample, *percentile* for differences and for tables of runs. The aggregates follow Agarwal et
al., "Deep Reinforcement Learning at the Edge of the Statistical Precipice", 2021.
"""

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

from learneddyn.core import Json

Statistic = Callable[..., Any]
"""``statistic(values, axis=-1)``, as `numpy.mean`: one number per row of a batch of samples."""

_CHUNK = 2_000_000


class Estimate(NamedTuple):
    """A figure and its interval. One sample alone says nothing about spread: its interval is (-inf, inf)."""

    value: float
    low: float
    high: float

    def to_json(self) -> Json:
        """Return a plain dictionary; infinite bounds become None, which JSON can hold."""
        return {name: plain(number) for name, number in self._asdict().items()}

    @classmethod
    def from_json(cls, text: Json) -> "Estimate":
        """Read what `to_json` wrote."""
        low, high = text["low"], text["high"]
        value = math.nan if text["value"] is None else text["value"]
        return cls(value, -math.inf if low is None else low, math.inf if high is None else high)


def plain(number: float) -> float | None:
    """Return a number that JSON can hold: None for NaN and infinities."""
    return float(number) if math.isfinite(number) else None


def bootstrap_interval(
    values: Any,
    statistic: Statistic = np.mean,
    *,
    level: float = 0.95,
    resamples: int = 5000,
    method: str = "bca",
    seed: int = 0,
) -> Estimate:
    """Return ``statistic(values)`` and its bootstrap interval.

    Args:
        values: ``[n]`` independent samples (episodes of one agent, or one figure per seed).
        statistic: called as ``statistic(batch, axis=-1)``.
        level: nominal coverage; with few samples the true coverage is somewhat lower.
        resamples: number of bootstrap samples.
        method: ``bca`` or ``percentile``. BCa falls back to percentile where all resamples agree.
        seed: of the resampling.

    Raises:
        ValueError: no values, non-finite values, a level outside (0, 1), or an unknown method.
    """
    sample = _finite("values", values, 1)
    _check(level, resamples)
    if method not in ("bca", "percentile"):
        raise ValueError(f"unknown bootstrap method {method!r}, allowed are 'bca' and 'percentile'")
    value = float(statistic(sample, axis=-1))
    if len(sample) == 1:
        return Estimate(value, -math.inf, math.inf)
    rng = np.random.default_rng(seed)
    rows = max(1, _CHUNK // len(sample))
    draws = [
        statistic(sample[rng.integers(len(sample), size=(min(rows, resamples - done), len(sample)))], axis=-1)
        for done in range(0, resamples, rows)
    ]
    return _interval(value, np.concatenate(draws), level, sample if method == "bca" else None, statistic)


def crossed_interval(values: Any, *, level: float = 0.95, resamples: int = 5000, seed: int = 0) -> Estimate:
    """Return the mean of a table and its percentile interval, both of whose sides are samples.

    Rows (members of an ensemble) and columns (start states) are resampled independently of each other: Owen, "The
    Pigeonhole Bootstrap", 2007. A side of one entry is held fixed.

    Args:
        values: ``[m, n]``, one figure for every pair.
        level: nominal coverage.
        resamples: number of bootstrap samples.
        seed: of the resampling.

    Raises:
        ValueError: not a finite table.
    """
    table = _finite("values", values, 2)
    _check(level, resamples)
    value = float(table.mean())
    if table.size == 1:
        return Estimate(value, -math.inf, math.inf)
    rng = np.random.default_rng(seed)
    draws = []
    rows = max(1, _CHUNK // max(table.shape))
    for done in range(0, resamples, rows):
        size = min(rows, resamples - done)
        left, right = (rng.multinomial(side, [1 / side] * side, size=size) / side for side in table.shape)
        draws.append(((left @ table) * right).sum(axis=1))
    return _interval(value, np.concatenate(draws), level)


def bootstrap_difference(
    first: Any,
    second: Any,
    statistic: Statistic = np.mean,
    *,
    paired: bool = False,
    level: float = 0.95,
    resamples: int = 5000,
    seed: int = 0,
) -> Estimate:
    """Return ``statistic(first) - statistic(second)`` and its percentile bootstrap interval.

    Args:
        first: ``[n]`` samples.
        second: ``[m]`` samples; ``m == n`` when paired.
        statistic: called as ``statistic(batch, axis=-1)``.
        paired: sample i of both belongs together (same seed, or same start state) and is resampled together.
        level: nominal coverage.
        resamples: number of bootstrap samples.
        seed: of the resampling.

    Raises:
        ValueError: no values, non-finite values, or paired samples of different length.
    """
    a, b = _finite("first", first, 1), _finite("second", second, 1)
    _check(level, resamples)
    if paired and len(a) != len(b):
        raise ValueError(f"paired samples must have the same length, got {len(a)} and {len(b)}")
    value = float(statistic(a, axis=-1) - statistic(b, axis=-1))
    if min(len(a), len(b)) == 1:
        return Estimate(value, -math.inf, math.inf)
    rng = np.random.default_rng(seed)
    rows = max(1, _CHUNK // max(len(a), len(b)))
    draws = []
    for done in range(0, resamples, rows):
        size = min(rows, resamples - done)
        left = rng.integers(len(a), size=(size, len(a)))
        right = left if paired else rng.integers(len(b), size=(size, len(b)))
        draws.append(statistic(a[left], axis=-1) - statistic(b[right], axis=-1))
    return _interval(value, np.concatenate(draws), level)


def interquartile_mean(values: Any, axis: int | None = -1) -> Any:
    """Return the mean of the middle half: ``floor(n / 4)`` values are cut at each end (Agarwal et al., 2021).

    Args:
        values: any array; with ``axis=None`` all its numbers are one sample.
        axis: the sample axis.
    """
    array = np.asarray(values, dtype=np.float64)
    array = array.reshape(-1) if axis is None else np.moveaxis(array, axis, -1)
    cut = array.shape[-1] // 4
    return np.sort(array, axis=-1)[..., cut : array.shape[-1] - cut].mean(axis=-1)


def stratified_interval(
    scores: Any,
    statistic: Statistic = interquartile_mean,
    *,
    level: float = 0.95,
    resamples: int = 5000,
    seed: int = 0,
) -> Estimate:
    """Return an aggregate over runs and tasks with its stratified percentile bootstrap interval (Agarwal et al., 2021).

    Args:
        scores: ``[runs, tasks]``, one score per seed and task, on a scale the tasks share. Runs are resampled within
            each task; the statistic sees all ``runs * tasks`` scores at once.
        statistic: called as ``statistic(batch, axis=-1)``.
        level: nominal coverage.
        resamples: number of bootstrap samples.
        seed: of the resampling.

    Raises:
        ValueError: not a finite ``[runs, tasks]`` table.
    """
    table = _finite("scores", scores, 2)
    _check(level, resamples)
    value = float(statistic(table.reshape(-1), axis=-1))
    if len(table) == 1:
        return Estimate(value, -math.inf, math.inf)
    draws = _resample_runs(table, resamples, np.random.default_rng(seed))
    return _interval(value, statistic(draws.reshape(resamples, -1), axis=-1), level)


def probability_of_improvement(
    first: Any, second: Any, *, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Estimate:
    """Return P(a run of ``first`` beats a run of ``second``), averaged over tasks; ties count half.

    The Mann-Whitney statistic per task with a stratified percentile bootstrap (Agarwal et al., 2021).

    Args:
        first: ``[runs, tasks]`` scores.
        second: ``[runs, tasks]`` scores; the numbers of runs may differ, the tasks not.
        level: nominal coverage.
        resamples: number of bootstrap samples.
        seed: of the resampling.

    Raises:
        ValueError: not finite tables, or different numbers of tasks.
    """
    a, b = _finite("first", first, 2), _finite("second", second, 2)
    _check(level, resamples)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"both tables need the same tasks (columns), got {a.shape[1]} and {b.shape[1]}")

    def wins(x: np.ndarray, y: np.ndarray) -> Any:
        sign = np.sign(x[..., :, None, :] - y[..., None, :, :])
        return (0.5 * (sign + 1)).mean(axis=(-3, -2, -1))

    value = float(wins(a, b))
    if min(len(a), len(b)) == 1:
        return Estimate(value, -math.inf, math.inf)
    rng = np.random.default_rng(seed)
    rows = max(1, _CHUNK // (len(a) * len(b) * a.shape[1]))
    draws = []
    for done in range(0, resamples, rows):
        size = min(rows, resamples - done)
        draws.append(wins(_resample_runs(a, size, rng), _resample_runs(b, size, rng)))
    return _interval(value, np.concatenate(draws), level)


def correlation(
    x: Any, y: Any, *, method: str = "spearman", level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Estimate:
    """Return the correlation of ``x`` and ``y`` with a percentile bootstrap interval over the pairs.

    A resample in which one side is constant has no correlation and is left out.

    Args:
        x: ``[n]`` values.
        y: ``[n]`` values of the same items.
        method: ``spearman`` (of ranks; ties share their mean rank) or ``pearson``.
        level: nominal coverage.
        resamples: number of bootstrap samples.
        seed: of the resampling.

    Raises:
        ValueError: fewer than three pairs, different lengths, non-finite or constant values, or an unknown method.
    """
    a, b = _finite("x", x, 1), _finite("y", y, 1)
    _check(level, resamples)
    if method not in ("spearman", "pearson"):
        raise ValueError(f"unknown correlation {method!r}, allowed are 'spearman' and 'pearson'")
    if len(a) != len(b) or len(a) < 3:
        raise ValueError(f"a correlation needs at least three pairs of equal length, got {len(a)} and {len(b)} values")
    for name, values in (("x", a), ("y", b)):
        if np.ptp(values) == 0:
            raise ValueError(f"{name} is constant ({values[0]}): its correlation with anything is undefined")
    prepare = _ranks if method == "spearman" else np.asarray
    draws = np.random.default_rng(seed).integers(len(a), size=(resamples, len(a)))
    spread = _pearson(prepare(a[draws]), prepare(b[draws]))
    value = float(_pearson(prepare(a[None]), prepare(b[None]))[0])
    return _interval(value, spread[np.isfinite(spread)], level)


def _interval(
    value: float,
    draws: np.ndarray,
    level: float,
    sample: np.ndarray | None = None,
    statistic: Statistic = np.mean,
) -> Estimate:
    """Percentile interval of ``draws``, or the BCa interval where the sample is given."""
    tails = np.array([(1 - level) / 2, (1 + level) / 2])
    if sample is not None and np.ptp(draws) > 0:
        normal = NormalDist()
        below = float(np.mean(draws < value) + 0.5 * np.mean(draws == value))
        bias = normal.inv_cdf(min(max(below, 1 / len(draws)), 1 - 1 / len(draws)))
        left_out = np.array([float(statistic(np.delete(sample, i), axis=-1)) for i in range(len(sample))])
        lean = left_out.mean() - left_out
        spread = 6 * float((lean**2).sum()) ** 1.5
        acceleration = float((lean**3).sum()) / spread if spread > 0 else 0.0
        shifted = [bias + normal.inv_cdf(float(tail)) for tail in tails]
        tails = np.array([normal.cdf(bias + z / (1 - acceleration * z)) for z in shifted])
    low, high = np.quantile(draws, tails)
    return Estimate(value, float(low), float(high))


def _resample_runs(table: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Draw runs with replacement within each task: ``[runs, tasks] -> [resamples, runs, tasks]``."""
    rows = rng.integers(len(table), size=(resamples, *table.shape))
    return table[rows, np.arange(table.shape[1])]


def _ranks(batch: np.ndarray) -> np.ndarray:
    """Ranks within each row, from zero; ties share their mean rank."""
    ranks = np.empty(batch.shape)
    for row, values in enumerate(batch):
        ordered = np.sort(values)
        ranks[row] = (np.searchsorted(ordered, values, "left") + np.searchsorted(ordered, values, "right") - 1) / 2
    return ranks


def _pearson(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Correlation along the last axis; NaN where one side is constant."""
    x, y = x - x.mean(axis=-1, keepdims=True), y - y.mean(axis=-1, keepdims=True)
    norm = np.sqrt((x**2).sum(axis=-1) * (y**2).sum(axis=-1))
    return np.divide((x * y).sum(axis=-1), norm, out=np.full(norm.shape, np.nan), where=norm > 0)


def _finite(name: str, values: Any, axes: int) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != axes or array.size == 0:
        raise ValueError(f"{name} must be a non-empty array of {axes} axes, got shape {array.shape}")
    if not np.isfinite(array).all():
        bad = np.flatnonzero(~np.isfinite(array.reshape(-1)))
        raise ValueError(f"{name} holds {len(bad)} NaN or infinite entries of {array.size}, the first at {int(bad[0])}")
    return array


def _check(level: float, resamples: int) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
    if resamples < 2:
        raise ValueError(f"resamples must be at least 2, got {resamples}")
