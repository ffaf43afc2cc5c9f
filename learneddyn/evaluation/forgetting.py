"""What a sequence of tasks does to a learner: what it forgets, and what earlier tasks are worth to later ones.

Sources: backward and forward transfer as in Lopez-Paz, Ranzato, "Gradient Episodic Memory for Continual Learning"
(2017); forgetting as in Chaudhry, Dokania, Ajanthan, Torr, "Riemannian Walk for Incremental Learning: Understanding
Forgetting and Intransigence" (2018); retention (they call it forgetting) and transfer against a learner of one task
alone as in Huang, Xie, Bharadhwaj, Shkurti, "Continual Model-Based Reinforcement Learning with Hypernetworks" (2021).
"""

from typing import Any, NamedTuple

import numpy as np


class Transfer(NamedTuple):
    """What was kept and carried over; positive differences are good news, whether scores are returns or errors.

    Attributes:
        final: mean score over all tasks after the last one.
        learned: mean score over all tasks, each right after it was learned.
        backward: mean over all but the last task of the gain since it was learned; 0 for a single task.
        forgetting: for every task but the last, the best it ever was before the end minus what it is at the end, as a
            loss: negative where the end is the best.
        retention: for every task, score at the end over score right after it was learned (errors: the inverse), the
            share of what was learned that is still there. None where the score below the fraction bar is not positive:
            of a return of -200 no share can be kept (-100 is better, and half of it); `backward` and `forgetting` are
            differences and hold there too.
        zero_shot: mean over all but the first task of the score before it was learned, minus the untrained model's;
            None without ``untrained``.
        forward: mean over all but the first task of the score right after it was learned minus the one of a learner
            that met this task alone; None without ``alone``.
    """

    final: float
    learned: float
    backward: float
    forgetting: tuple[float, ...]
    retention: tuple[float | None, ...]
    zero_shot: float | None = None
    forward: float | None = None


def transfer(scores: Any, *, lower_is_better: bool = False, untrained: Any = None, alone: Any = None) -> Transfer:
    """Summarise how a learner did on every task as tasks went by.

    Args:
        scores: ``[t, t]``; row i, column j is the score on task j after learning tasks 0 to i. The entries above the
            diagonal may be NaN, unless ``untrained`` is given.
        lower_is_better: scores are errors, not returns.
        untrained: ``[t]`` scores of a model that has learned nothing.
        alone: ``[t]`` scores of learners that met one task each.

    Raises:
        ValueError: not a square matrix, no task, or an entry that is needed and not finite.
    """
    table = np.asarray(scores, np.float64)
    if table.ndim != 2 or table.shape[0] != table.shape[1] or not len(table):
        raise ValueError(f"scores must be a square matrix, a row per task learned, got shape {table.shape}")
    tasks, sign = len(table), -1.0 if lower_is_better else 1.0
    needed = np.tril(np.ones_like(table, bool), 1 if untrained is not None else 0)
    if not np.isfinite(table[needed]).all():
        row, column = np.argwhere(needed & ~np.isfinite(table))[0]
        raise ValueError(f"the score on task {column} after task {row} is {table[row, column]}, it must be finite")
    own, end = table.diagonal(), table[-1]
    shares = zip(own, end, strict=True) if lower_is_better else zip(end, own, strict=True)
    best = [float((sign * table[task:-1, task]).max()) for task in range(tasks - 1)]
    return Transfer(
        final=float(end.mean()),
        learned=float(own.mean()),
        backward=float(sign * (end - own)[:-1].mean()) if tasks > 1 else 0.0,
        forgetting=tuple(high - sign * float(end[task]) for task, high in enumerate(best)),
        retention=tuple(float(share / whole) if whole > 0 else None for share, whole in shares),
        zero_shot=_ahead(table.diagonal(1), untrained, sign, tasks),
        forward=_ahead(own[1:], alone, sign, tasks),
    )


def _ahead(scores: np.ndarray, baseline: Any, sign: float, tasks: int) -> float | None:
    """Return the mean advantage over a baseline on all tasks but the first."""
    if baseline is None:
        return None
    base = np.asarray(baseline, np.float64)
    if base.shape != (tasks,) or not np.isfinite(base).all():
        raise ValueError(f"a baseline must hold {tasks} finite scores, got {baseline}")
    return float(sign * (scores - base[1:]).mean()) if tasks > 1 else 0.0
