"""A sampler that keeps imagined observations where the plant keeps its own: inside bounds and on the unit circle.

Polynomial models know nothing of a rail's end or of cos^2 + sin^2 = 1. SINDy-RL (Zolman et al., 2024) brings every
prediction back before it goes on.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from learneddyn.core import Dynamics, Outcome, State
from learneddyn.world.sampling import SAMPLERS, Sampler


class Bounded:
    """A sampler around another one: pairs (cosine, sine) are normalised, angles wrapped, then columns are clamped.

    Args:
        sampler: a name or a callable, see `learneddyn.world.sampling`.
        low: lower bounds ``[o]``, -inf where there is none; None for no bounds.
        high: upper bounds ``[o]``.
        unit_pairs: pairs of observation columns (cosine, sine).
        angles: observation columns in radians that the plant gives within [-pi, pi).
    """

    def __init__(
        self,
        sampler: str | Sampler,
        *,
        low: Sequence[float] | None = None,
        high: Sequence[float] | None = None,
        unit_pairs: Sequence[tuple[int, int]] = (),
        angles: Sequence[int] = (),
    ) -> None:
        if (low is None) != (high is None):
            raise ValueError(f"low and high belong together, got low={low}, high={high}")
        if low is not None and high is not None and any(a > b for a, b in zip(low, high, strict=True)):
            raise ValueError(f"low must not exceed high, got {low} and {high}")
        self.sampler = SAMPLERS[sampler] if isinstance(sampler, str) else sampler
        self.low, self.high = (None if bound is None else torch.tensor(bound) for bound in (low, high))
        self.angles = list(angles)
        self.cosine, self.sine = [pair[0] for pair in unit_pairs], [pair[1] for pair in unit_pairs]

    def __call__(
        self, state: State, action: Float[Tensor, "b a"], dynamics: Dynamics, rng: torch.Generator
    ) -> tuple[State, Outcome]:
        """Draw the next state and bring it back."""
        after, outcome = self.sampler(state, action, dynamics, rng)
        obs = outcome.next_obs
        if self.cosine:
            obs = obs.clone()
            norm = torch.hypot(obs[:, self.cosine], obs[:, self.sine]).clamp_min(1e-6)
            obs[:, self.cosine] /= norm
            obs[:, self.sine] /= norm
        if self.angles:
            obs = obs.clone()
            obs[:, self.angles] = (obs[:, self.angles] + math.pi).remainder(2 * math.pi) - math.pi
        if self.low is not None and self.high is not None:
            obs = obs.clamp(self.low.to(obs.device), self.high.to(obs.device))
        return after._replace(obs=obs), outcome._replace(next_obs=obs)
