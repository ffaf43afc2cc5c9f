"""The improved cross-entropy method: good plans from few sequences, for planning in real time."""

import math
from typing import Any

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
from learneddyn.planners.noise import coloured

BUDGETS = {100: (3, 40), 300: (4, 100), 500: (5, 150), 4000: (10, 900)}
"""Sequences in total: iterations, sequences of the first one. From the paper."""


class ICEM(AbstractPlanner):
    """Cross-entropy search with noise that is correlated in time, elites that live on, and fewer draws per iteration.

    Source: Pinneri, Sawant, Blaes, Achterhold, Stueckler, Rolinek, Martius, "Sample-efficient Cross-Entropy Method for
    Real-time Planning" (2020). The first iteration also scores the best plans of the last step, shifted, with a fresh
    last action; later ones keep the best plans of the iteration before with their scores; the last one replaces a draw
    by the mean. The best plan ever scored is returned, and the mean lives on, shifted, its last action repeated.
    Deviation: noise of variance exactly 1, see `learneddyn.planners.noise.coloured`.

    Args:
        horizon: steps of a plan.
        candidates: plans drawn in the first iteration.
        elites: best plans that mean and deviation are refitted to.
        iterations: at most.
        beta: colour of the noise: its power falls as ``frequency ** -beta``. Larger is smoother: the paper takes 0.25
            for HalfCheetah running, 2 for HumanoidStandup, 2.5 to 3.5 for manipulation.
        std: of the first iteration's noise, in halves of the action range.
        decay: every iteration draws this factor fewer plans, though at least two per elite.
        keep: share of the elites that live on.
        momentum: share of the old mean and deviation in the new ones.

    Raises:
        ValueError: an argument outside its range.
    """

    def __init__(
        self,
        horizon: int = 30,
        candidates: int = 40,
        elites: int = 10,
        iterations: int = 3,
        beta: float = 2.0,
        std: float = 0.5,
        decay: float = 1.25,
        keep: float = 0.3,
        momentum: float = 0.1,
    ) -> None:
        check_range(
            "ICEM",
            ("horizon", horizon, 1, 10**6),
            ("candidates", candidates, 1, 10**9),
            ("elites", elites, 1, candidates),
            ("iterations", iterations, 1, 10**6),
            ("beta", beta, 0, 100),
            ("std", std, 1e-6, 100),
            ("decay", decay, 1, 100),
            ("keep", keep, 0, 1),
            ("momentum", momentum, 0, 1),
        )
        self.horizon, self.candidates, self.elites, self.iterations = horizon, candidates, elites, iterations
        self.beta, self.std, self.decay, self.keep, self.momentum = beta, std, decay, keep, momentum

    @classmethod
    def of_budget(cls, sequences: int, **options: Any) -> "ICEM":
        """Return the planner with the paper's iterations and draws for 100, 300, 500 or 4000 sequences a step.

        Raises:
            ValueError: another budget.
        """
        if sequences not in BUDGETS:
            raise ValueError(f"ICEM: there are settings for {sorted(BUDGETS)} sequences, got {sequences}")
        iterations, candidates = BUDGETS[sequences]
        return cls(iterations=iterations, candidates=candidates, **options)

    @property
    def sequences(self) -> int:
        """Plans that one call scores per lane, at most."""
        return sum(map(self._draws, range(self.iterations))) + self._kept

    @property
    def _kept(self) -> int:
        return math.floor(self.keep * self.elites)

    def _draws(self, iteration: int) -> int:
        return max(2 * self.elites, math.floor(self.candidates * self.decay**-iteration))

    def start(self, lanes: int, low: Float[Tensor, " a"], high: Float[Tensor, " a"]) -> PlanState:
        """Return the state of lanes at the start of an episode, where no plan is kept yet.

        Raises:
            ValueError: bounds that are not finite, or not in order.
        """
        state = super().start(lanes, low, high)
        return state._replace(kept=state.mean[:, None].expand(-1, self._kept, -1, -1))

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
        mean, old = state.mean, self.momentum
        std = (self.std * (high - low) / 2).expand_as(mean)
        best = Best.none_yet(mean)
        elites = None
        for iteration in range(self.iterations):
            if elites is not None and not more():
                break
            draws = self._draws(iteration)
            noise = coloured(draws, mean.shape[2], self.horizon, beta=self.beta, rng=rng).transpose(1, 2)
            plans = (mean[:, None] + std[:, None] * noise).clamp(low, high)
            if iteration == self.iterations - 1:
                plans[:, 0] = mean
            if elites is None:
                plans = torch.cat([plans, self._revived(state, std, low, high, rng)], dim=1)
                scores = judged(score, plans)
                scores[:, draws:].masked_fill_(state.step[:, None] == 0, -torch.inf)
            else:
                scores = torch.cat([judged(score, plans), elites.scores[:, : self._kept]], dim=1)
                plans = torch.cat([plans, elites.plans[:, : self._kept]], dim=1)
            elites = select(plans, scores, self.elites)
            best = best.or_better(elites)
            std = old * std + (1 - old) * elites.variance_or(std.square()).sqrt()
            mean = old * mean + (1 - old) * elites.mean_or(mean)
        assert elites is not None
        kept = elites.plans[:, : self._kept]
        after = PlanState(shifted(mean, mean[:, -1]), shifted(kept, kept[:, :, -1]), best.plan[:, 0], state.step + 1)
        return best.plan, after

    def _revived(
        self, state: PlanState, std: Tensor, low: Tensor, high: Tensor, rng: torch.Generator
    ) -> Float[Tensor, "b k h a"]:
        """Return the plans kept from the last step, with a fresh last action."""
        noise = torch.randn(self._kept, len(low), generator=rng, device=rng.device)
        last = (state.mean[:, None, -1] + std[:, None, -1] * noise).clamp(low, high)
        return torch.cat([state.kept[:, :, :-1], last[:, :, None]], dim=2)
