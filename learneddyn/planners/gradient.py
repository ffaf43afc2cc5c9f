"""Planning by gradient ascent through a differentiable score."""

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


class GradientPlanner(AbstractPlanner):
    """Improve several plans by Adam on their scores and return the best plan scored on the way.

    Every plan is ``middle + half range * tanh(x)`` and climbs in ``x``, so that actions stay within their bounds. One
    plan starts at the last result, shifted by one step, the others around it with noise that is correlated in time.
    Where a gradient is not finite, the plan does not move. Adam: Kingma, Ba, "Adam: A Method for Stochastic
    Optimization" (2015).

    `learneddyn.world.World.returns` is such a score where model, reward and sampler are differentiable; the truth is
    not. Gradients through long horizons of a learned model can be steep: prefer short horizons and several candidates.

    Args:
        horizon: steps of a plan.
        candidates: plans improved side by side.
        iterations: Adam steps, at most.
        learning_rate: of Adam, in units of ``x``.
        std: of the noise on ``x`` at the start.
        beta: colour of that noise, see `learneddyn.planners.ICEM`.

    Raises:
        ValueError: an argument outside its range, or a score without a gradient (at `plan`).
    """

    def __init__(
        self,
        horizon: int = 15,
        candidates: int = 8,
        iterations: int = 20,
        learning_rate: float = 0.1,
        std: float = 0.5,
        beta: float = 2.0,
    ) -> None:
        check_range(
            "GradientPlanner",
            ("horizon", horizon, 1, 10**6),
            ("candidates", candidates, 1, 10**9),
            ("iterations", iterations, 1, 10**6),
            ("learning_rate", learning_rate, 1e-9, 1e3),
            ("std", std, 0, 100),
            ("beta", beta, 0, 100),
        )
        self.horizon, self.candidates, self.iterations = horizon, candidates, iterations
        self.learning_rate, self.std, self.beta = learning_rate, std, beta

    @property
    def sequences(self) -> int:
        """Plans that one call scores per lane, at most; each but the last round also costs a backward pass."""
        return self.candidates * (self.iterations + 1)

    def plan(
        self,
        score: Score,
        state: PlanState,
        low: Float[Tensor, " a"],
        high: Float[Tensor, " a"],
        rng: torch.Generator,
        more: More = unlimited,
    ) -> tuple[Float[Tensor, "b h a"], PlanState]:
        """Search from ``state``; see `AbstractPlanner.plan`.

        Raises:
            ValueError: the score has no gradient, or another shape than ``[b, s]``.
        """
        middle, half = (low + high) / 2, (high - low) / 2
        noise = coloured(self.candidates, len(low), self.horizon, beta=self.beta, rng=rng).transpose(1, 2)
        noise[0] = 0
        # tanh cannot reach the bounds: a plan at a bound starts a little inside, where it still has a gradient.
        inside = ((state.mean - middle) / half).clamp(-0.99, 0.99)
        x = (inside.atanh()[:, None] + self.std * noise).requires_grad_()
        adam = torch.optim.Adam([x], lr=self.learning_rate)
        best = Best.none_yet(state.mean)
        for iteration in range(self.iterations + 1):
            if iteration and not more():
                break
            climbing = iteration < self.iterations
            with torch.set_grad_enabled(climbing):
                plans = middle + half * x.tanh()
                scores = judged(score, plans)
            best = best.or_better(select(plans.detach(), scores.detach(), 1))
            if climbing:
                x.grad = -_gradient(scores, x)
                adam.step()
        after = state._replace(mean=shifted(best.plan, best.plan[:, -1]), last=best.plan[:, 0], step=state.step + 1)
        return best.plan, after


def _gradient(scores: Float[Tensor, "b s"], x: Float[Tensor, "b s h a"]) -> Float[Tensor, "b s h a"]:
    if not scores.requires_grad:
        raise ValueError(
            "GradientPlanner needs a score with a gradient; this one has none: its world is the truth, its reward "
            "ignores states and actions, or it computes without autograd"
        )
    (gradient,) = torch.autograd.grad(scores, x, torch.ones_like(scores).where(scores.isfinite(), 0.0))
    usable = (gradient.isfinite()).flatten(2).all(dim=2) & scores.isfinite()
    return torch.where(usable[:, :, None, None], gradient, 0.0)
