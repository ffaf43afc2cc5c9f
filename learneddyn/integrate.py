"""Runge-Kutta steps of ordinary differential equations, batched: what flows, true or learned, are followed with."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

Slope = Callable[[Float[Tensor, "b d"]], Float[Tensor, "b d"]]
"""Time derivative of states; what else it depends on is held over a step."""

STABILITY = 3.3066
"""Length of the real interval on which Dormand and Prince's method of order 5 is stable."""

# Dormand, Prince, "A family of embedded Runge-Kutta formulae" (1980): the method of order 5(4) with seven stages.
_STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)


class Embedded(NamedTuple):
    """One step with what it says about itself."""

    after: Float[Tensor, "b d"]
    """The state after the step, of order 5."""
    error: Float[Tensor, "b d"]
    """Its difference from the solution of order 4: the local error estimate of step-size control."""
    stiffness: Float[Tensor, " b"]
    """Estimate of the spectral radius of the slope's Jacobian, from the last two stages, per unit of time."""


def rk4(slope: Slope, state: Float[Tensor, "b d"], duration: float, substeps: int = 1) -> Float[Tensor, "b d"]:
    """Return the state after ``duration``, by ``substeps`` steps of the classical method of order 4."""
    h = duration / substeps
    for _ in range(substeps):
        one = slope(state)
        two = slope(torch.add(state, one, alpha=0.5 * h))
        three = slope(torch.add(state, two, alpha=0.5 * h))
        four = slope(torch.add(state, three, alpha=h))
        state = torch.add(state, one + 2 * (two + three) + four, alpha=h / 6)
    return state


def embedded_step(slope: Slope, state: Float[Tensor, "b d"], h: float) -> Embedded:
    """Take one Dormand-Prince step of length ``h`` and return it with its error and stiffness estimates."""
    stages = [slope(state)]
    reached = state
    last = state
    for row in _STAGES:
        last, reached = reached, state
        for weight, stage in zip(row, stages, strict=True):
            reached = torch.add(reached, stage, alpha=h * weight)
        stages.append(slope(reached))
    error = h * torch.stack([weight * stage for weight, stage in zip(_ERROR, stages, strict=True)]).sum(dim=0)
    apart = (reached - last).norm(dim=1).clamp_min(torch.finfo(state.dtype).tiny ** 0.5)
    return Embedded(reached, error, (stages[-1] - stages[-2]).norm(dim=1) / apart)
