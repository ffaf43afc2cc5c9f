"""Differences of angles, the short way round: a step across the seam of a wrapped angle is as small as any other."""

import math
from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor


def near(after: Float[Tensor, "*n o"], before: Float[Tensor, "*n o"], angles: Sequence[int]) -> Float[Tensor, "*n o"]:
    """Return ``after``, columns in ``angles`` (radians) turned by whole turns to within half a turn of ``before``."""
    if not len(angles):
        return after
    turns = ((after - before) / (2 * math.pi)).round()
    kept = [column for column in range(after.shape[-1]) if column not in angles]
    turns[..., kept] = 0.0
    return after - 2 * math.pi * turns


def apart(after: Float[Tensor, "*n o"], before: Float[Tensor, "*n o"], angles: Sequence[int]) -> Float[Tensor, "*n o"]:
    """Return ``after - before``, columns in ``angles`` the short way round."""
    return near(after, before, angles) - before
