"""Differences of angles, the short way round: a step across the seam of a wrapped angle is as small as any other."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

_TURNS = 1e5
"""Whole turns beyond which an angle has diverged."""


def near(after: Float[Tensor, "*n o"], before: Float[Tensor, "*n o"], angles: Sequence[int]) -> Float[Tensor, "*n o"]:
    """Return ``after``, columns in ``angles`` (radians) turned by whole turns to within half a turn of ``before``.

    Angles that have diverged stay what they are: infinite ones, and those 100,000 turns away, or so many that the dtype
    no longer resolves a thousandth of a turn (8388 in float32).
    """
    if not len(angles):
        return after
    turns = ((after - before) / (2 * math.pi)).round()
    turns = torch.where(turns.abs() <= min(_TURNS, 1e-3 / torch.finfo(turns.dtype).eps), turns, 0.0)
    kept = [column for column in range(after.shape[-1]) if column not in angles]
    turns[..., kept] = 0.0
    return after - 2 * math.pi * turns


def apart(after: Float[Tensor, "*n o"], before: Float[Tensor, "*n o"], angles: Sequence[int]) -> Float[Tensor, "*n o"]:
    """Return ``after - before``, columns in ``angles`` the short way round."""
    return near(after, before, angles) - before


def gathered(
    many: Float[Tensor, "n *b o"], angles: Sequence[int], by: Float[Tensor, "*b o"]
) -> Float[Tensor, "n *b o"]:
    """Return ``many``, columns in ``angles`` turned by whole turns to within half a turn of their mean direction.

    Of the angles of that direction (of the finite entries of ``many``, along the first axis) the one nearest to ``by``
    is meant, so that means and spreads of what is returned can be set against ``by``.
    """
    if not len(angles):
        return many
    direction = torch.atan2(many.sin().nanmean(dim=0), many.cos().nanmean(dim=0))
    return near(many, near(direction, by, angles).expand_as(many), angles)
