"""Model predictive path integral control, in the two forms that circulate."""

import torch
from jaxtyping import Float
from torch import Tensor

from learneddyn.planners.base import (
    AbstractPlanner,
    More,
    PlanState,
    Score,
    check_range,
    judged,
    shifted,
    unlimited,
)


class MPPI(AbstractPlanner):
    """Average noisy plans, weighted by the exponential of their scores.

    ``form="information"``: Williams, Wagener, Goldfain, Drews, Rehg, Boots, Theodorou, "Information Theoretic MPC for
    Model-Based Reinforcement Learning" (2017). Plans are ``clip(mean + noise)``; a plan pays
    ``temperature * sum_t (mean_t - middle) noise_t / std^2`` besides its score, with the noise that is left after the
    clip, and the mean moves by the weighted noise.

    ``form="smoothed"``: Nagabandi, Konolige, Levine, Kumar, "Deep Dynamics Models for Learning Dexterous Manipulation"
    (2019, PDDM). Plans are low-pass filtered, ``u_t = smoothing (mean_t + noise_t) + (1 - smoothing) u_{t-1}``,
    beginning with the action executed last, and the mean becomes their weighted mean. Its factor on the rewards is the
    inverse of ``temperature``.

    A temperature of zero would return the best plan, an infinite one the average (for the information form: from a mean
    in the middle); a constant added to all scores changes nothing. Both forms start at the last mean, shifted by one
    step and continued by the middle of the range.

    Args:
        horizon: steps of a plan.
        candidates: plans drawn per iteration.
        iterations: weighted averages taken, one after the other. The information form has one in its source.
        temperature: in units of the score.
        std: of the noise, in halves of the action range.
        form: ``"information"`` or ``"smoothed"``.
        smoothing: of the smoothed form; 1 does not smooth.

    Raises:
        ValueError: an argument outside its range.
    """

    def __init__(
        self,
        horizon: int = 15,
        candidates: int = 500,
        iterations: int = 1,
        temperature: float = 1.0,
        std: float = 0.5,
        form: str = "information",
        smoothing: float = 0.9,
    ) -> None:
        check_range(
            "MPPI",
            ("horizon", horizon, 1, 10**6),
            ("candidates", candidates, 1, 10**9),
            ("iterations", iterations, 1, 10**6),
            ("temperature", temperature, 1e-12, 1e12),
            ("std", std, 1e-6, 100),
            ("smoothing", smoothing, 1e-6, 1),
        )
        if form not in ("information", "smoothed"):
            raise ValueError(f"MPPI: form must be 'information' or 'smoothed', got {form!r}")
        self.horizon, self.candidates, self.iterations = horizon, candidates, iterations
        self.temperature, self.std, self.form, self.smoothing = temperature, std, form, smoothing

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
        mean, middle, std = state.mean, (low + high) / 2, self.std * (high - low) / 2
        for iteration in range(self.iterations):
            if iteration and not more():
                break
            shape = self.candidates, *mean.shape[1:]
            plans = mean[:, None] + std * torch.randn(shape, generator=rng, device=rng.device)
            if self.form == "smoothed":
                plans = self._filtered(plans, state.last)
            plans = plans.clamp(low, high)
            scores = judged(score, plans)
            if self.form == "information":
                noise = plans - mean[:, None]
                control = ((mean - middle)[:, None] * noise / std.square()).sum(dim=(2, 3))
                scores = scores - self.temperature * control
            mean = self._averaged(plans, scores, mean)
        after = state._replace(mean=shifted(mean, middle), last=mean[:, 0], step=state.step + 1)
        return mean, after

    def _filtered(self, plans: Float[Tensor, "b s h a"], last: Float[Tensor, "b a"]) -> Float[Tensor, "b s h a"]:
        action, filtered = last[:, None], []
        for noisy in plans.unbind(dim=2):
            action = self.smoothing * noisy + (1 - self.smoothing) * action
            filtered.append(action)
        return torch.stack(filtered, dim=2)

    def _averaged(
        self, plans: Float[Tensor, "b s h a"], scores: Float[Tensor, "b s"], fallback: Float[Tensor, "b h a"]
    ) -> Float[Tensor, "b h a"]:
        """Return the weighted mean of the plans; lanes without a finite score keep ``fallback``."""
        some = scores.isfinite().any(dim=1)
        weight = (torch.where(some[:, None], scores, 0.0) / self.temperature).softmax(dim=1)
        return torch.where(some[:, None, None], torch.einsum("bs,bsha->bha", weight, plans), fallback)
