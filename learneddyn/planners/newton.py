"""Newton's method on the plan: few iterations where the score is smooth and the plan short.

Sources: Soloway, Haley, "Neural Generalized Predictive Control: A Newton-Raphson Implementation" (1997), for the cost
with moves and input barriers and the control horizon.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from learneddyn.planners.base import (
    AbstractPlanner,
    Best,
    Elites,
    More,
    PlanState,
    Score,
    check_range,
    judged,
    select,
    shifted,
    unlimited,
)

_TO_BOUND = 0.99
"""Largest share of the way to a bound that one step goes, where there is a barrier."""


class NewtonPlanner(AbstractPlanner):
    """Minimise cost = -score + effort * sum of squared moves + barrier by damped Newton steps from the last plan.

    A plan varies in its first ``moves`` actions and holds the last of them. The Hessian is exact (second derivatives
    of the score, not those of a Gauss-Newton model), its eigenvalues are made positive, so that every step descends;
    a line search over halvings of the step is one call of the score. With a barrier ``barrier * sum (1 / (u - low) +
    1 / (high - u))`` plans stay inside the bounds, which a full step could jump over; without, steps are clipped to
    them. Lanes where no halving helps stay where they are.

    Deviations: the source takes the full step, and finite differences.

    Args:
        horizon: steps of a plan.
        moves: free actions at its start (the control horizon).
        iterations: Newton steps, at most.
        effort: weight of squared moves, from the action executed last on (at an episode's start, the middle of the
            range), in score units per squared action unit.
        barrier: weight of the barrier, in score units times action units.
        damping: least eigenvalue of the Hessian, relative to its largest.
        halvings: of the step in the line search.

    Raises:
        ValueError: an argument outside its range, or a score without a gradient (at `plan`).
    """

    def __init__(
        self,
        horizon: int = 8,
        moves: int = 3,
        iterations: int = 3,
        effort: float = 0.0,
        barrier: float = 0.0,
        damping: float = 1e-8,
        halvings: int = 7,
    ) -> None:
        check_range(
            "NewtonPlanner",
            ("horizon", horizon, 1, 10**6),
            ("moves", moves, 1, horizon),
            ("iterations", iterations, 1, 10**6),
            ("effort", effort, 0, 1e12),
            ("barrier", barrier, 0, 1e12),
            ("damping", damping, 1e-12, 1),
            ("halvings", halvings, 0, 60),
        )
        self.horizon, self.moves, self.iterations = horizon, moves, iterations
        self.effort, self.barrier, self.damping, self.halvings = effort, barrier, damping, halvings

    @property
    def sequences(self) -> int:
        """Plans that one call scores per lane, at most; one per iteration also costs the derivatives."""
        return self.iterations * (self.halvings + 2)

    def plan(
        self,
        score: Score,
        state: PlanState,
        low: Float[Tensor, " a"],
        high: Float[Tensor, " a"],
        rng: torch.Generator,
        more: More = unlimited,
    ) -> tuple[Float[Tensor, "b h a"], PlanState]:
        """Search from ``state``; see `AbstractPlanner.plan`. ``rng`` is not needed.

        Raises:
            ValueError: the score has no gradient, or another shape than ``[b, s]``.
        """
        x = self._inside(state.mean[:, : self.moves], low, high)
        best = Best.none_yet(self._whole(x))
        halves = 0.5 ** torch.arange(self.halvings + 1, device=x.device, dtype=x.dtype)
        for _ in range(self.iterations):
            cost, step = self._newton(score, x, state.last, low, high)
            best = best.or_better(Elites(self._whole(x)[:, None], -cost[:, None]))
            if not more():
                break
            tried = self._reachable(x[:, None], x[:, None] + halves[:, None, None] * step[:, None], low, high)
            with torch.no_grad():
                found = select(self._whole(tried), -self._cost(score, tried, state.last, low, high), 1)
            best = best.or_better(found)
            x = best.plan[:, : self.moves]
        after = state._replace(mean=shifted(best.plan, best.plan[:, -1]), last=best.plan[:, 0], step=state.step + 1)
        return best.plan, after

    def _whole(self, x: Float[Tensor, "*b c a"]) -> Float[Tensor, "*b h a"]:
        held = x[..., -1:, :].expand(*x.shape[:-2], self.horizon - self.moves, x.shape[-1])
        return torch.cat([x, held], dim=-2)

    def _cost(
        self,
        score: Score,
        x: Float[Tensor, "b s c a"],
        last: Float[Tensor, "b a"],
        low: Float[Tensor, " a"],
        high: Float[Tensor, " a"],
    ) -> Float[Tensor, "b s"]:
        cost = -judged(score, self._whole(x))
        if self.effort:
            before = torch.cat([last[:, None, None].expand_as(x[:, :, :1]), x[:, :, :-1]], dim=2)
            cost = cost + self.effort * (x - before).square().sum(dim=(2, 3))
        if self.barrier:
            cost = cost + self.barrier * (1 / (x - low) + 1 / (high - x)).sum(dim=(2, 3))
        return cost

    @torch.enable_grad()
    def _newton(
        self, score: Score, x: Float[Tensor, "b c a"], last: Tensor, low: Tensor, high: Tensor
    ) -> tuple[Float[Tensor, " b"], Float[Tensor, "b c a"]]:
        """Return the cost at x and the damped Newton step; no step where a derivative is not finite."""
        x = x.detach().requires_grad_()
        cost = self._cost(score, x[:, None], last, low, high)[:, 0]
        if not cost.requires_grad:
            raise ValueError(
                "NewtonPlanner needs a score with a gradient; this one has none: its world is the truth, its reward "
                "ignores states and actions, or it computes without autograd"
            )
        usable = cost.isfinite()
        (gradient,) = torch.autograd.grad(cost, x, torch.ones_like(cost).where(usable, 0.0), create_graph=True)
        g = gradient.flatten(1)
        rows = [torch.zeros_like(x)] * g.shape[1]
        if g.requires_grad:
            rows = [
                torch.autograd.grad(column.sum(), x, retain_graph=True, materialize_grads=True)[0]
                for column in g.unbind(dim=1)
            ]
        g, hessian = g.detach(), torch.stack([row.flatten(1) for row in rows], dim=1)
        usable = usable & g.isfinite().all(dim=1) & hessian.isfinite().all(dim=(1, 2))
        g, hessian = torch.where(usable[:, None], g, 0.0), torch.where(usable[:, None, None], hessian, 0.0)
        curvature, axes = torch.linalg.eigh(0.5 * (hessian + hessian.mT))
        curvature = curvature.abs()
        least = (self.damping * curvature.amax(dim=1, keepdim=True)).clamp_min(self.damping)
        step = -(axes @ ((axes.mT @ g[:, :, None]) / torch.maximum(curvature, least)[:, :, None]))
        return cost.detach(), step.view_as(x)

    def _inside(self, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
        if not self.barrier:
            return x
        margin = (1 - _TO_BOUND) / 2 * (high - low)
        return x.clamp(low + margin, high - margin)

    def _reachable(self, x: Tensor, target: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Return the targets, held back before the bounds."""
        if not self.barrier:
            return target.clamp(low, high)
        return torch.minimum(torch.maximum(target, x - _TO_BOUND * (x - low)), x + _TO_BOUND * (high - x))
