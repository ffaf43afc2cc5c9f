"""Noise of the environments' resets, drawn on the generator's device in float32."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def uniform(lanes: int, low: Sequence[float], high: Sequence[float], rng: torch.Generator) -> Float[Tensor, "b k"]:
    """Draw ``lanes`` rows, column k uniform between ``low[k]`` and ``high[k]``.

    Raises:
        ValueError: no lanes.
    """
    floor = torch.tensor(low, device=rng.device)
    return floor + (torch.tensor(high, device=rng.device) - floor) * torch.rand(
        _checked(lanes), len(low), generator=rng, device=rng.device
    )


def around(lanes: int, centre: Sequence[float], half_width: float, rng: torch.Generator) -> Float[Tensor, "b k"]:
    """Draw ``lanes`` rows, column k uniform within ``half_width`` of ``centre[k]``.

    Raises:
        ValueError: no lanes.
    """
    return uniform(lanes, [c - half_width for c in centre], [c + half_width for c in centre], rng)


def normal(lanes: int, columns: int, scale: float, rng: torch.Generator) -> Float[Tensor, "b k"]:
    """Draw ``lanes`` rows of ``columns`` independent Gaussians of mean 0 and standard deviation ``scale``.

    Raises:
        ValueError: no lanes.
    """
    return scale * torch.randn(_checked(lanes), columns, generator=rng, device=rng.device)


def _checked(lanes: int) -> int:
    if lanes < 1:
        raise ValueError(f"the number of lanes must be at least 1, got {lanes}")
    return lanes
