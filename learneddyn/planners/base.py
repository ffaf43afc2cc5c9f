"""What every planner shares: the state that warms the next search, the selection of plans, the shift by one step.

A planner searches action plans ``[horizon, action columns]`` for many lanes at once and sees nothing of a world but a
score, a function ``[b, s, h, a] -> [b, s]``, larger is better. It hides no state: `AbstractPlanner.plan` takes a
`PlanState` and returns the next one, so that callers decide when a lane starts afresh.

All lanes of a call share one set of random numbers. A lane's plan therefore depends on its own scores, its own state
and the generator, never on the lanes beside it; two lanes with equal scores get equal plans.

What is not finite never wins: a score of NaN or infinity counts as minus infinity, and a plan with that score is
neither returned nor averaged. Where no plan has a finite score, the planner returns the plan it started from.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Score = Callable[[Float[Tensor, "b s h a"]], Float[Tensor, "b s"]]
"""Candidate plans of every lane to their scores, larger is better."""
More = Callable[[], bool]
"""Asked before every iteration but the first: may the search go on?"""


def unlimited() -> bool:
    """Let a search take all its iterations."""
    return True


class PlanState(NamedTuple):
    """What a lane carries from one step of its episode to the next, shifted to the step to come."""

    mean: Float[Tensor, "b h a"]
    """The plan that the next search starts from; for discrete actions, probabilities."""
    kept: Float[Tensor, "b k h a"]
    """Good plans of the last search; none for most planners."""
    last: Float[Tensor, "b a"]
    """The action executed last; the middle of the range at the start of an episode."""
    step: Int[Tensor, " b"]
    """Plans made in this episode."""

    def restarted(self, lanes: Bool[Tensor, " b"], fresh: "PlanState") -> "PlanState":
        """Return the state with the chosen lanes taken from ``fresh``."""
        pairs = zip(self, fresh, strict=True)
        return PlanState(*(torch.where(lanes.view(-1, *[1] * (old.ndim - 1)), new, old) for old, new in pairs))


class Elites(NamedTuple):
    """The best plans of every lane, best first; what is not finite scores -inf."""

    plans: Float[Tensor, "b k h a"]
    scores: Float[Tensor, "b k"]

    def mean_or(self, fallback: Float[Tensor, "b h a"]) -> Float[Tensor, "b h a"]:
        """Return the mean of the elites with a finite score, ``fallback`` in lanes that have none."""
        weight = self._weight()
        return torch.where(weight.any(dim=1), (weight * self.plans).sum(dim=1) / self._count(weight), fallback)

    def variance_or(self, fallback: Float[Tensor, "b h a"]) -> Float[Tensor, "b h a"]:
        """Return the variance (dividing by their number) of the finite elites, ``fallback`` in lanes without one."""
        weight = self._weight()
        offset = self.plans - self.mean_or(fallback)[:, None]
        spread = (weight * offset.square()).sum(dim=1) / self._count(weight)
        return torch.where(weight.any(dim=1), spread, fallback)

    def _weight(self) -> Bool[Tensor, "b k 1 1"]:
        return self.scores.isfinite()[:, :, None, None]

    @staticmethod
    def _count(weight: Tensor) -> Tensor:
        return weight.sum(dim=1).clamp_min(1)


class Best(NamedTuple):
    """The best plan of every lane so far."""

    plan: Float[Tensor, "b h a"]
    score: Float[Tensor, " b"]

    @classmethod
    def none_yet(cls, plan: Float[Tensor, "b h a"]) -> "Best":
        """Return a record that any finite score beats; until then the plan is ``plan``."""
        return cls(plan, plan.new_full((len(plan),), -torch.inf))

    def or_better(self, elites: Elites) -> "Best":
        """Return the record after these elites."""
        better = elites.scores[:, 0] > self.score
        plan = torch.where(better[:, None, None], elites.plans[:, 0], self.plan)
        return Best(plan, torch.where(better, elites.scores[:, 0], self.score))


class AbstractPlanner(ABC):
    """Search for the action plan with the best score.

    Subclasses set ``horizon`` (steps of a plan), say in ``sequences`` how many plans one call scores per lane, and
    implement `plan`. The protocol of the design, ``plan(score, warm, low, high, rng) -> plan``, is extended in two
    places: the warm start is a `PlanState` that is also returned, because some planners carry more than one plan from
    step to step, and ``more`` lets a caller with a clock end a search early.
    """

    discrete: ClassVar[bool] = False
    """Whether plans hold one-hot rows, one column per discrete action, instead of numbers between bounds."""
    horizon: int

    @property
    @abstractmethod
    def sequences(self) -> int:
        """Plans that one call scores per lane, at most."""

    @abstractmethod
    def plan(
        self,
        score: Score,
        state: PlanState,
        low: Float[Tensor, " a"],
        high: Float[Tensor, " a"],
        rng: torch.Generator,
        more: More = unlimited,
    ) -> tuple[Float[Tensor, "b h a"], PlanState]:
        """Search from ``state``.

        Args:
            score: judges candidate plans ``[b, s, h, a]``; it may be called several times with different ``s``.
            state: from `start` or from the last call.
            low: smallest action, per column.
            high: largest action, per column.
            rng: on the device of ``state``.
            more: asked before every iteration but the first; when it answers False the best found so far is returned.

        Returns:
            The plan, of which a caller executes the first action, and the state for the next step.

        Raises:
            ValueError: ``score`` answers in another shape than ``[b, s]``.
        """

    def start(self, lanes: int, low: Float[Tensor, " a"], high: Float[Tensor, " a"]) -> PlanState:
        """Return the state of lanes at the start of an episode: the plan that stays in the middle of the range.

        Raises:
            ValueError: bounds that are not finite, or not in order.
        """
        if not bool((low.isfinite() & high.isfinite() & (low < high)).all()):
            raise ValueError(f"a planner needs finite bounds low < high in every column, got {low} and {high}")
        middle = (low + high) / 2
        return PlanState(
            middle.expand(lanes, self.horizon, -1),
            middle.new_empty(lanes, 0, self.horizon, len(middle)),
            middle.expand(lanes, -1),
            torch.zeros(lanes, dtype=torch.long, device=middle.device),
        )


def judged(score: Score, plans: Float[Tensor, "b s h a"]) -> Float[Tensor, "b s"]:
    """Return the scores of plans, with -inf for what is not finite.

    Raises:
        ValueError: the score answers in another shape than ``[b, s]``.
    """
    scores = score(plans)
    if scores.shape != plans.shape[:2]:
        raise ValueError(
            f"the score must answer plans of shape {tuple(plans.shape)} with {tuple(plans.shape[:2])}, "
            f"got {tuple(scores.shape)}"
        )
    return torch.where(scores.isfinite(), scores, -torch.inf)


def select(plans: Float[Tensor, "b s h a"], scores: Float[Tensor, "b s"], count: int) -> Elites:
    """Return the ``count`` best plans of every lane."""
    top, index = scores.topk(count, dim=1)
    return Elites(plans.gather(1, index[:, :, None, None].expand(-1, -1, *plans.shape[2:])), top)


def shifted(plans: Float[Tensor, "*b h a"], last: Float[Tensor, "*#b a"]) -> Float[Tensor, "*b h a"]:
    """Return plans for the step to come: the first action is gone, ``last`` is appended."""
    return torch.cat([plans[..., 1:, :], last[..., None, :].expand_as(plans[..., :1, :])], dim=-2)


def check_range(who: str, *ranges: tuple[str, float | int, float | int, float | int]) -> None:
    """Check arguments, each given as (name, value, least, most).

    Raises:
        ValueError: a value outside its range.
    """
    for name, value, least, most in ranges:
        if not least <= value <= most:
            raise ValueError(f"{who}: {name} must lie between {least:g} and {most:g}, got {value}")
