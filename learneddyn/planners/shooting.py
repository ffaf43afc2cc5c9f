"""Random shooting: the planner that any other must beat."""

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
    unlimited,
)


class RandomShooting(AbstractPlanner):
    """Draw plans uniformly between the bounds and return the best one; nothing is carried to the next step.

    Args:
        horizon: steps of a plan.
        candidates: plans drawn.

    Raises:
        ValueError: an argument below 1.
    """

    def __init__(self, horizon: int = 15, candidates: int = 1000) -> None:
        check_range("RandomShooting", ("horizon", horizon, 1, 10**6), ("candidates", candidates, 1, 10**9))
        self.horizon, self.candidates = horizon, candidates

    @property
    def sequences(self) -> int:
        """Plans that one call scores per lane."""
        return self.candidates

    def plan(
        self,
        score: Score,
        state: PlanState,
        low: Float[Tensor, " a"],
        high: Float[Tensor, " a"],
        rng: torch.Generator,
        more: More = unlimited,
    ) -> tuple[Float[Tensor, "b h a"], PlanState]:
        """Search; see `AbstractPlanner.plan`."""
        share = torch.rand(self.candidates, *state.mean.shape[1:], generator=rng, device=rng.device)
        plans = (low + share * (high - low)).expand(len(state.mean), -1, -1, -1)
        best = Best.none_yet(state.mean).or_better(select(plans, judged(score, plans), 1))
        return best.plan, state._replace(last=best.plan[:, 0], step=state.step + 1)
