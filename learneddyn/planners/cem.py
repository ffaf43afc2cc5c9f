"""The cross-entropy method as PETS plans with it."""

import torch
from jaxtyping import Float
from torch import Tensor

from learneddyn.planners.base import (
    AbstractPlanner,
    Best,
    More,
    PlanState,
    Score,
    check_range,
    judged,
    select,
    shifted,
    unlimited,
)
from learneddyn.planners.noise import truncated_normal

BUDGETS = {100: (2, 50), 300: (3, 100), 500: (4, 125)}
"""Sequences in total: iterations, sequences of each. The baselines of the paper of `learneddyn.planners.ICEM`."""


class CEM(AbstractPlanner):
    """Draw plans from a Gaussian, refit it to the best ones, repeat; return its mean.

    Source: Chua, Calandra, McAllister, Levine, "Deep Reinforcement Learning in a Handful of Trials using Probabilistic
    Dynamics Models" (2018). The variance is held so that two standard deviations, where the Gaussian is cut, stay
    within the bounds; it starts at ``(high - low)^2 / 16`` at every step, the mean at the last plan, shifted by one
    step and continued by the middle of the range. Deviations: the first iteration always runs, however narrow the
    bounds are, and a lane stops by itself.

    Args:
        horizon: steps of a plan.
        candidates: plans drawn per iteration.
        elites: best plans that the Gaussian is refitted to.
        iterations: at most.
        momentum: share of the old mean and variance in the new ones.
        min_variance: a lane stops when all its variances are below this, in squared action units.
        execute: ``"mean"`` returns the final mean as the source does, which is a bad plan where two different ones are
            good; ``"best"`` returns the best plan drawn.

    Raises:
        ValueError: an argument outside its range.
    """

    def __init__(
        self,
        horizon: int = 25,
        candidates: int = 400,
        elites: int = 40,
        iterations: int = 5,
        momentum: float = 0.1,
        min_variance: float = 1e-3,
        execute: str = "mean",
    ) -> None:
        check_range(
            "CEM",
            ("horizon", horizon, 1, 10**6),
            ("candidates", candidates, 1, 10**9),
            ("elites", elites, 1, candidates),
            ("iterations", iterations, 1, 10**6),
            ("momentum", momentum, 0, 1),
        )
        if execute not in ("mean", "best"):
            raise ValueError(f"CEM: execute must be 'mean' or 'best', got {execute!r}")
        self.horizon, self.candidates, self.elites, self.iterations = horizon, candidates, elites, iterations
        self.momentum, self.min_variance, self.execute = momentum, min_variance, execute

    @classmethod
    def of_budget(cls, sequences: int, *, horizon: int = 30) -> "CEM":
        """Return the planner of the iCEM paper's baseline for 100, 300 or 500 sequences a step, 10 elites.

        Raises:
            ValueError: another budget.
        """
        if sequences not in BUDGETS:
            raise ValueError(f"CEM: there are settings for {sorted(BUDGETS)} sequences, got {sequences}")
        iterations, candidates = BUDGETS[sequences]
        return cls(horizon, candidates, elites=10, iterations=iterations)

    @property
    def sequences(self) -> int:
        """Plans that one call scores per lane, at most."""
        return self.candidates * self.iterations

    def plan(
        self,
        score: Score,
        state: PlanState,
        low: Float[Tensor, " a"],
        high: Float[Tensor, " a"],
        rng: torch.Generator,
        more: More = unlimited,
    ) -> tuple[Float[Tensor, "b h a"], PlanState]:
        """Search from ``state``; see `AbstractPlanner.plan`."""
        mean, keep = state.mean, self.momentum
        variance = ((high - low).square() / 16).expand_as(mean)
        best = Best.none_yet(mean)
        for iteration in range(self.iterations):
            wide = variance.amax(dim=(1, 2), keepdim=True) > self.min_variance
            if iteration and not (bool(wide.any()) and more()):
                break
            reach = torch.minimum(mean - low, high - mean) / 2
            spread = torch.minimum(variance.sqrt(), reach)
            noise = truncated_normal(self.candidates, *mean.shape[1:], rng=rng)
            plans = (mean[:, None] + spread[:, None] * noise).clamp(low, high)
            elites = select(plans, judged(score, plans), self.elites)
            refit = wide | (iteration == 0)
            best = best.or_better(elites._replace(scores=elites.scores.where(refit[:, 0], -torch.inf)))
            mean, variance = (
                torch.where(refit, keep * old + (1 - keep) * new, old)
                for old, new in ((mean, elites.mean_or(mean)), (variance, elites.variance_or(variance)))
            )
        chosen = mean if self.execute == "mean" else best.plan
        after = state._replace(mean=shifted(mean, (low + high) / 2), last=chosen[:, 0], step=state.step + 1)
        return chosen, after
