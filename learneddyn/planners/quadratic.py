"""Convex quadratic programs on a box, many at once, by a primal-dual interior-point method.

Source: Mehrotra, "On the Implementation of a Primal-Dual Interior Point Method" (1992), for predictor and corrector.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

_CAUTION = 0.995
"""Share of the way to the nearest bound that one step goes."""

_STRAIGHT = 0.5
"""Share of the predictor's step that must be possible for its second order to be trusted."""


class Solution(NamedTuple):
    """Minima of convex quadratic functions on a box."""

    x: Float[Tensor, "b n"]
    gap: Float[Tensor, " b"]
    """The duality gap: no x in the box is lower by more."""
    iterations: int


class _Pair(NamedTuple):
    """Something of the lower bounds, and of the upper ones."""

    low: Float[Tensor, "*b n"]
    high: Float[Tensor, "*b n"]


def box_minimum(
    hessian: Float[Tensor, "n n"],
    linear: Float[Tensor, "b n"],
    low: Float[Tensor, " n"],
    high: Float[Tensor, " n"],
    *,
    tolerance: float = 1e-12,
    iterations: int = 60,
) -> Solution:
    """Minimise ``x H x / 2 + f x`` for ``low <= x <= high``, one problem per row of f.

    Multipliers and rooms to the bounds are brought to zero together; what then lies at a bound is put there, and the
    rest solved for exactly.

    Args:
        hessian: symmetric and positive definite.
        linear: f.
        low: of every entry.
        high: of every entry, above ``low``.
        tolerance: on the mean product of multiplier and room, relative to 1 plus the largest gradient at x = 0.
        iterations: at most.
    """
    # With a unit diagonal, entries of very different effect (a plan's first and last action) count alike.
    unit = hessian.diagonal().rsqrt()
    hessian, linear, bounds = unit[:, None] * hessian * unit, linear * unit, _Pair(low / unit, high / unit)
    enough, done = tolerance * (1 + linear.abs().amax(dim=1)), 0
    x = ((bounds.low + bounds.high) / 2).expand_as(linear)
    gradient = x @ hessian + linear
    slack = 1 + gradient.abs().mean(dim=1, keepdim=True)
    push = _Pair(gradient.clamp_min(0) + slack, (-gradient).clamp_min(0) + slack)
    # Rooms go along by themselves: as differences to x, the small ones would round to zero.
    room = _Pair(x - bounds.low, bounds.high - x)
    nothing = _Pair(torch.zeros_like(x), torch.zeros_like(x))
    while done < iterations:
        gap = _gap(push, room)
        going = (gap > enough)[:, None]
        if not bool(going.any()):
            break
        gradient = x @ hessian + linear
        root = torch.linalg.cholesky(hessian + torch.diag_embed(push.low / room.low + push.high / room.high))
        dx, change = _step(root, gradient, push, room, nothing)
        length = _longest(push, room, dx, change)
        reached = _gap(*_moved(push, room, dx, change, length))
        aim = ((reached / gap).pow(3) * gap)[:, None]
        # Squared, a short first step says little about the curve; in flat directions it would lead from bound to bound.
        bend = torch.where(length > _STRAIGHT, dx, 0.0)
        dx, change = _step(root, gradient, push, room, _Pair(aim - bend * change.low, aim + bend * change.high))
        length = torch.where(going, _CAUTION * _longest(push, room, dx, change), 0.0)
        x, done = x + length * dx, done + 1
        push, room = _moved(push, room, dx, change, length)
    x = _polished(x, hessian, linear, bounds, push.low > room.low, push.high > room.high)
    return Solution((x * unit).clamp(low, high), _gap(push, room) * 2 * len(unit), done)


def _gap(push: _Pair, room: _Pair) -> Float[Tensor, " b"]:
    """Return the mean product of multipliers and rooms."""
    return (push.low * room.low + push.high * room.high).mean(dim=1) / 2


def _step(
    root: Float[Tensor, "b n n"], gradient: Float[Tensor, "b n"], push: _Pair, room: _Pair, target: _Pair
) -> tuple[Float[Tensor, "b n"], _Pair]:
    """Return the Newton step of x and of the multipliers towards these products of multipliers and rooms."""
    pull = target.low / room.low - target.high / room.high - gradient
    dx = torch.cholesky_solve(pull[:, :, None], root)[:, :, 0]
    low = (target.low - push.low * dx) / room.low - push.low
    return dx, _Pair(low, (target.high + push.high * dx) / room.high - push.high)


def _moved(push: _Pair, room: _Pair, dx: Tensor, change: _Pair, length: Tensor) -> tuple[_Pair, _Pair]:
    """Return multipliers and rooms after a step of this length."""
    pushes = _Pair(push.low + length * change.low, push.high + length * change.high)
    return pushes, _Pair(room.low + length * dx, room.high - length * dx)


def _longest(push: _Pair, room: _Pair, dx: Tensor, change: _Pair) -> Float[Tensor, "b 1"]:
    """Return the longest step, at most 1, that leaves multipliers and rooms at least 0."""
    reach = [
        torch.where(move < 0, -value / move, torch.inf).amin(dim=1)
        for value, move in ((push.low, change.low), (push.high, change.high), (room.low, dx), (room.high, -dx))
    ]
    return torch.stack(reach).amin(dim=0).clamp_max(1.0)[:, None]


def _polished(
    x: Float[Tensor, "b n"],
    hessian: Float[Tensor, "n n"],
    linear: Float[Tensor, "b n"],
    bounds: _Pair,
    at_low: Bool[Tensor, "b n"],
    at_high: Bool[Tensor, "b n"],
) -> Float[Tensor, "b n"]:
    """Return x with the held entries at their bounds and the others solved for, where that is no higher."""
    free = ~(at_low | at_high)
    fixed = torch.where(at_low, bounds.low, torch.where(at_high, bounds.high, 0.0))
    both, eye = free[:, :, None] & free[:, None, :], torch.eye(len(hessian), device=x.device, dtype=x.dtype)
    right = torch.where(free, -(linear + fixed @ hessian), fixed)
    exact = torch.linalg.solve(torch.where(both, hessian, eye), right).clamp(*bounds)
    off = exact - x
    lower = (off * ((x + 0.5 * off) @ hessian + linear)).sum(dim=1, keepdim=True) <= 0
    return torch.where(lower, exact, x)
