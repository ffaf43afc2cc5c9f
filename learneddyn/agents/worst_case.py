"""Static robust control by a growing set of worst cases, and the searches for the worst one.

The meta-algorithm of Zouitine, Geist, Rachelson, "Solving robust MDPs as a sequence of static RL problems" (2024,
IWOCS), for max over policies of min over models T of V_T(s0), where the adversary picks the model once and for all:

    solve T_i, which gives Q_i;   act by the pointwise minimum over all Q_j so far
    T_{i+1} = the model in which that policy does worst;   stop where it does as well as promised

`incremental` is that loop, whatever a model, a solution and a policy are: `learneddyn.agents.iwocs_tabular` solves
tables exactly, `learneddyn.agents.iwocs` learns. A model is anything: the parameters of a plant, the number of a World.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

M = TypeVar("M")
S = TypeVar("S")
P = TypeVar("P")

Search = Callable[[Callable[[Sequence[M]], Sequence[float]]], tuple[M, float]]
"""Given the values of models under a policy, many at a time, return the worst model and its value."""


@dataclass(frozen=True)
class Round(Generic[M]):
    """One turn of the loop: a model is solved, and the worst one for the policy at hand is found.

    ``promised`` is min_j Q_j(s0, pi(s0)) over the models solved so far, ``value`` the policy's worth in ``worst``.
    """

    solved: M
    promised: float
    worst: M
    value: float


def incremental(
    first: M,
    solve: Callable[[M], S],
    combine: Callable[[list[S]], tuple[P, float]],
    search: Search[M],
    value: Callable[[P, Sequence[M]], Sequence[float]],
    *,
    tolerance: float,
    rounds: int,
    known: Sequence[M] = (),
) -> tuple[P, list[Round[M]]]:
    """Solve worst cases one after the other until the policy keeps what it promises in the worst of them.

    Args:
        first: the model to begin with, usually the nominal one.
        solve: a model.
        combine: all solutions so far into a policy and the value it promises at the start.
        search: for the worst model.
        value: of a policy at the start, in several models.
        tolerance: largest |value in the worst model - promised value| that ends the loop.
        rounds: most models to solve.
        known: models that an earlier call has solved.

    Returns:
        The last policy and all rounds. The loop also ends where the worst model is one that has been solved: nothing
        new would be learned from it.

    Raises:
        ValueError: rounds below 1 or a negative tolerance.
    """
    if rounds < 1 or tolerance < 0:
        raise ValueError(f"rounds must be at least 1 and tolerance at least 0, got {rounds} and {tolerance}")
    solutions: list[S] = []
    history: list[Round[M]] = []
    model = first
    while True:
        solutions.append(solve(model))
        policy, promised = combine(solutions)
        worst, worth = search(_of(value, policy))
        history.append(Round(model, promised, worst, worth))
        solved = any(worst == other for other in (*known, *(turn.solved for turn in history)))
        if abs(worth - promised) <= tolerance or solved or len(history) == rounds:
            return policy, history
        model = worst


def _of(value: Callable[[P, Sequence[M]], Sequence[float]], policy: P) -> Callable[[Sequence[M]], Sequence[float]]:
    return lambda models: value(policy, models)


def every(models: Sequence[M]) -> Search[M]:
    """Return a search that tries every model of a finite set: a grid of parameters, or a set of Worlds.

    Raises:
        ValueError: an empty set.
    """
    if not len(models):
        raise ValueError("a search needs at least one model")

    def search(value: Callable[[Sequence[M]], Sequence[float]]) -> tuple[M, float]:
        values = np.asarray(value(models), dtype=np.float64)
        worst = int(values.argmin())
        return models[worst], float(values[worst])

    return search


def grid(low: Sequence[float], high: Sequence[float], points: int) -> list[tuple[float, ...]]:
    """Return a regular grid over a box of parameters, ``points`` along every side, corners included.

    Raises:
        ValueError: sides of different number or order, or fewer than two points.
    """
    _check_box(low, high)
    if points < 2:
        raise ValueError(f"a grid needs at least 2 points along every side, got {points}")
    sides = [np.linspace(a, b, points) for a, b in zip(low, high, strict=True)]
    return [
        tuple(map(float, point))
        for point in np.stack(np.meshgrid(*sides, indexing="ij"), axis=-1).reshape(-1, len(sides))
    ]


def cma_es(
    low: Sequence[float], high: Sequence[float], *, generations: int = 6, population: int = 100, seed: int = 0
) -> Search[tuple[float, ...]]:
    """Return a search by CMA-ES (Hansen, "The CMA Evolution Strategy: A Tutorial", 2016) over a box of parameters.

    Parameters are scaled to [0, 1]; the strategy starts at 0.5 with standard deviation 0.5, and candidates outside are
    clipped to the box before they are valued, as published for IWOCS with these generations and this population.

    Args:
        low: least parameters.
        high: largest ones.
        generations: of the strategy.
        population: models valued per generation.
        seed: of the strategy; every search begins anew with it.

    Raises:
        ValueError: a box or numbers out of range.
        ImportError: the extra ``reproduce`` (package ``cma``) is not installed.
    """
    _check_box(low, high)
    if generations < 1 or population < 2:
        raise ValueError(f"generations and population must be at least 1 and 2, got {generations} and {population}")
    try:
        import cma
    except ImportError as error:
        raise ImportError("CMA-ES needs the package cma: pip install learneddyn[reproduce]") from error
    bottom, width = np.array(low, dtype=np.float64), np.array(high, dtype=np.float64) - np.array(low, dtype=np.float64)

    def search(value: Callable[[Sequence[tuple[float, ...]]], Sequence[float]]) -> tuple[tuple[float, ...], float]:
        strategy = cma.CMAEvolutionStrategy(
            np.full(len(bottom), 0.5), 0.5, {"popsize": population, "seed": seed + 1, "verbose": -9}
        )
        worst: tuple[float, ...] = ()
        least = np.inf
        for _ in range(generations):
            asked = strategy.ask()
            models = [tuple(map(float, bottom + width * np.clip(point, 0, 1))) for point in asked]
            values = np.asarray(value(models), dtype=np.float64)
            strategy.tell(asked, values.tolist())
            if values.min() < least:
                worst, least = models[int(values.argmin())], float(values.min())
        return worst, least

    return search


def _check_box(low: Sequence[float], high: Sequence[float]) -> None:
    if not len(low) or len(low) != len(high) or not all(a < b for a, b in zip(low, high, strict=True)):
        raise ValueError(f"a box needs as many low as high ends, every low below its high, got {low} and {high}")
