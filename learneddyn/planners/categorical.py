"""The cross-entropy method for discrete actions."""

from typing import ClassVar

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


class CategoricalCEM(AbstractPlanner):
    """Draw an action for every step of a plan from its own distribution, refit to the best plans, repeat.

    Plans hold one-hot rows. The best plan ever scored is returned, because an average of actions is none. Source of
    the method: Rubinstein, "The Cross-Entropy Method for Combinatorial and Continuous Optimization" (1999). For the
    next step, probabilities are shifted, the last step is uniform, and ``exploration`` mixes every distribution with
    the uniform one, so that a search that had settled can change its mind.

    Args:
        horizon: steps of a plan.
        candidates: plans drawn per iteration.
        elites: best plans that the probabilities are refitted to.
        iterations: at most.
        momentum: share of the old probabilities in the new ones.
        exploration: share of the uniform distribution at the start of every search.

    Raises:
        ValueError: an argument outside its range.
    """

    discrete: ClassVar[bool] = True

    def __init__(
        self,
        horizon: int = 15,
        candidates: int = 100,
        elites: int = 10,
        iterations: int = 3,
        momentum: float = 0.1,
        exploration: float = 0.3,
    ) -> None:
        check_range(
            "CategoricalCEM",
            ("horizon", horizon, 1, 10**6),
            ("candidates", candidates, 1, 10**9),
            ("elites", elites, 1, candidates),
            ("iterations", iterations, 1, 10**6),
            ("momentum", momentum, 0, 1),
            ("exploration", exploration, 0, 1),
        )
        self.horizon, self.candidates, self.elites, self.iterations = horizon, candidates, elites, iterations
        self.momentum, self.exploration = momentum, exploration

    @property
    def sequences(self) -> int:
        """Plans that one call scores per lane, at most."""
        return self.candidates * self.iterations

    def start(self, lanes: int, low: Float[Tensor, " a"], high: Float[Tensor, " a"]) -> PlanState:
        """Return uniform probabilities; the bounds of one-hot rows say nothing but the number of actions.

        Raises:
            ValueError: bounds that are not finite, or not in order.
        """
        state = super().start(lanes, low, high)
        return state._replace(mean=torch.full_like(state.mean, 1 / len(low)))

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
        actions, uniform = len(low), 1 / len(low)
        probability = (1 - self.exploration) * state.mean + self.exploration * uniform
        best = Best.none_yet(_one_hot(probability.argmax(dim=2), actions, low))
        for iteration in range(self.iterations):
            if iteration and not more():
                break
            shape = self.candidates, self.horizon, 1
            uniform_draw = torch.rand(shape, generator=rng, device=rng.device)
            # One uniform number per step chooses through the cumulative distribution of each lane.
            action = (uniform_draw > probability.cumsum(dim=2)[:, None]).sum(dim=3).clamp_max(actions - 1)
            plans = _one_hot(action, actions, low)
            elites = select(plans, judged(score, plans), self.elites)
            best = best.or_better(elites)
            probability = self.momentum * probability + (1 - self.momentum) * elites.mean_or(probability)
        after = state._replace(
            mean=shifted(probability, torch.full_like(low, uniform)), last=best.plan[:, 0], step=state.step + 1
        )
        return best.plan, after


def _one_hot(action: Tensor, actions: int, like: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(action, actions).to(like.dtype)
