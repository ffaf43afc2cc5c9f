"""A sampler that keeps imagined observations where the plant keeps its own: inside bounds and on the unit circle.

Polynomial models know nothing of a rail's end or of cos^2 + sin^2 = 1. SINDy-RL (Zolman et al., 2024) brings every
prediction back before it goes on.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from learneddyn.core import Dynamics, Json, Outcome, State
from learneddyn.world.sampling import SAMPLERS, Sampler


class Bounded:
    """A sampler around another one: pairs (cosine, sine) are normalised, angles wrapped, then columns are clamped.

    What is not finite stays what it is, its partner of a pair too: nothing that has diverged looks sound. World folders
    keep the arguments but the first under ``bounds``, see `learneddyn.envs.save_world`.

    Args:
        sampler: a name or a callable, see `learneddyn.world.sampling`.
        low: lower bounds ``[o]``, None or -inf where there is none; None for no bounds at all.
        high: upper bounds ``[o]``, None or inf where there is none.
        unit_pairs: pairs of observation columns (cosine, sine).
        angles: observation columns in radians that the plant gives within [-pi, pi).

    Raises:
        ValueError: an unknown sampler, one of low and high alone or both of different lengths, bounds that leave no
            number between them, or a column that is named twice or does not exist.
    """

    def __init__(
        self,
        sampler: str | Sampler,
        *,
        low: Sequence[float | int | None] | None = None,
        high: Sequence[float | int | None] | None = None,
        unit_pairs: Sequence[Sequence[int]] = (),
        angles: Sequence[int] = (),
    ) -> None:
        if isinstance(sampler, str) and sampler not in SAMPLERS:
            raise ValueError(f"unknown sampler {sampler!r}, allowed are {sorted(SAMPLERS)} or a callable")
        if (low is None) != (high is None) or len(low or ()) != len(high or ()):
            raise ValueError(f"low and high belong together, a number per column each, got low={low}, high={high}")
        floor, ceiling = _filled(low, -math.inf), _filled(high, math.inf)
        # No comparison with NaN holds.
        if not all(a <= b and a < math.inf and b > -math.inf for a, b in zip(floor, ceiling, strict=True)):
            raise ValueError(f"low must not exceed high, got {low} and {high}")
        if any(len(pair) != 2 for pair in unit_pairs):
            raise ValueError(f"unit_pairs must be pairs of columns (cosine, sine), got {unit_pairs}")
        named = [*angles, *(column for pair in unit_pairs for column in pair)]
        if len(set(named)) != len(named) or not all(isinstance(column, int) and column >= 0 for column in named):
            raise ValueError(
                f"unit_pairs and angles must name columns, integers of at least 0, each once, got {unit_pairs} and "
                f"{angles}"
            )
        self.sampler = SAMPLERS[sampler] if isinstance(sampler, str) else sampler
        self.low, self.high = (torch.tensor(bound) if bound else None for bound in (floor, ceiling))
        self.angles = list(angles)
        self.cosine, self.sine = [pair[0] for pair in unit_pairs], [pair[1] for pair in unit_pairs]
        self.arguments: Json = {
            "low": _written(floor),
            "high": _written(ceiling),
            "unit_pairs": [list(pair) for pair in unit_pairs],
            "angles": self.angles,
        }
        """The arguments but the first, as JSON values."""

    def check_columns(self, columns: int) -> None:
        """Refuse observations of ``columns`` columns where these bounds are not made for them.

        Raises:
            ValueError: another number of bounds, or a column beyond the last.
        """
        if self.low is not None and len(self.low) != columns:
            raise ValueError(f"low and high must hold one bound per observation column, {columns}, got {len(self.low)}")
        last = max([*self.angles, *self.cosine, *self.sine], default=0)
        if last >= columns:
            raise ValueError(f"unit_pairs and angles must name columns from 0 to {columns - 1}, got {last}")

    def __call__(
        self, state: State, action: Float[Tensor, "b a"], dynamics: Dynamics, rng: torch.Generator
    ) -> tuple[State, Outcome]:
        """Draw the next state and bring it back."""
        after, outcome = self.sampler(state, action, dynamics, rng)
        obs = outcome.next_obs
        if self.cosine:
            obs = obs.clone()
            norm = torch.hypot(obs[:, self.cosine], obs[:, self.sine]).clamp_min(1e-6)
            norm = torch.where(norm.isfinite(), norm, 1.0)
            obs[:, self.cosine] /= norm
            obs[:, self.sine] /= norm
        if self.angles:
            obs = obs.clone()
            angle = obs[:, self.angles]
            wrapped = (angle + math.pi).remainder(2 * math.pi) - math.pi
            obs[:, self.angles] = torch.where(angle.isfinite(), wrapped, angle)
        if self.low is not None and self.high is not None:
            # What has diverged must not look as if it stood at the bound.
            obs = torch.where(obs.isinf(), obs, obs.clamp(self.low.to(obs.device), self.high.to(obs.device)))
        return after._replace(obs=obs), outcome._replace(next_obs=obs)


def _filled(bounds: Sequence[float | int | None] | None, absent: float) -> list[float]:
    return [absent if bound is None else float(bound) for bound in bounds or ()]


def _written(bounds: list[float]) -> list[float | None] | None:
    return [bound if math.isfinite(bound) else None for bound in bounds] or None
