"""Sequences of a forced piecewise-linear network in one node of the graph, with its derivative written out.

A network of three units costs next to nothing to compute, and a loop over its steps is all overhead: a dozen small
nodes of the graph per step, each allocated, recorded and walked back. Here a step is a few operations without a graph,
and what depends on the weights alone is one product over all steps. Numbers and gradients are those of the loop
(`learneddyn.models.forcing.step_by_step`), up to rounding.

    z~_t = z_t + alpha_t (x_t - z_t) on the observed units;   z_{t+1} = A z~_t + W1 phi(z~_t) + drive_t
    shallow: phi = relu(W2 z + gate_t);   clipped: relu(W2 z + gate_t) - relu(W2 z);   almost linear: relu* (z)
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable


def unrolled(
    start: Float[Tensor, "b m"],
    x: Float[Tensor, "t b d"],
    drive: Float[Tensor, "t b m"],
    diagonal: Float[Tensor, " m"],
    outer: Float[Tensor, "m h"],
    alphas: Sequence[float],
    *,
    inner: Float[Tensor, "h m"] | None = None,
    gate: Float[Tensor, "t b h"] | None = None,
    clipped: bool = False,
    rectified: Bool[Tensor, " m"] | None = None,
) -> Float[Tensor, "t b m"]:
    """Return the states after every step, before they are forced.

    Args:
        start: first states.
        x: observations before each step; no gradient goes to them.
        drive: bias and input, added after a step.
        diagonal: A.
        outer: W1.
        alphas: strength of forcing before each step.
        inner: W2 of the shallow kinds; then
        gate: its threshold and input, and
        clipped: whether relu(W2 z) is subtracted.
        rectified: the units that phi rectifies, of the almost linear kind.
    """
    arguments = (start, x, drive, diagonal, outer, inner, gate, rectified, clipped, list(alphas))
    return _Unrolled.apply(*arguments)  # type: ignore[no-untyped-call]


class _Unrolled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        start: Float[Tensor, "b m"],
        x: Float[Tensor, "t b d"],
        drive: Float[Tensor, "t b m"],
        diagonal: Float[Tensor, " m"],
        outer: Float[Tensor, "m h"],
        inner: Float[Tensor, "h m"] | None,
        gate: Float[Tensor, "t b h"] | None,
        rectified: Bool[Tensor, " m"] | None,
        clipped: bool,
        alphas: list[float],
    ) -> Float[Tensor, "t b m"]:
        steps, d, h = len(x), x.shape[2], outer.shape[1]
        forced = torch.empty((steps, *start.shape), dtype=start.dtype, device=start.device)
        states, before = torch.empty_like(forced), start
        features = torch.empty((steps, len(start), h), dtype=start.dtype, device=start.device)
        on, plain = torch.empty_like(features), torch.empty_like(features)
        for t in range(steps):
            z = forced[t].copy_(before)
            if alphas[t]:
                z[:, :d].lerp_(x[t], alphas[t])
            if inner is None or gate is None:
                assert rectified is not None
                torch.where(rectified, z.clamp_min(0), z, out=features[t])
            else:
                torch.mm(z, inner.T, out=plain[t])
                torch.add(plain[t], gate[t], out=on[t])
                torch.clamp_min(on[t], 0, out=features[t])
                if clipped:
                    features[t].sub_(plain[t].clamp_min(0))
            before = torch.addcmul(drive[t], z, diagonal, out=states[t])
            before.addmm_(features[t], outer.T)
        ctx.save_for_backward(forced, features, on, plain, diagonal, outer, inner, rectified)
        ctx.clipped, ctx.alphas, ctx.d = clipped, alphas, d
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (grad,) = grad_outputs
        forced, features, on, plain, diagonal, outer, inner, rectified = ctx.saved_tensors
        steps, alphas, d = len(grad), ctx.alphas, ctx.d
        grad = grad.clone()  # of the states; the walk adds what comes from later steps
        if inner is None:
            slopes = torch.where(rectified, (forced > 0).to(grad.dtype), 1.0)
        else:
            slopes = (on > 0).to(grad.dtype)
            lower = (plain > 0).to(grad.dtype) if ctx.clipped else None
            to_gate, to_inner = torch.empty_like(on), torch.empty_like(on)
        back = grad[0]
        for t in reversed(range(steps)):
            active = grad[t] @ outer
            if inner is None:
                back = active.mul_(slopes[t]).addcmul_(grad[t], diagonal)
            else:
                torch.mul(active, slopes[t], out=to_gate[t])
                if lower is None:
                    through = to_gate[t]
                else:
                    through = torch.addcmul(to_gate[t], active, lower[t], value=-1, out=to_inner[t])
                back = torch.addcmul(through @ inner, grad[t], diagonal)
            if alphas[t]:
                back[:, :d].mul_(1 - alphas[t])
            if t:
                grad[t - 1].add_(back)
        flat = grad.flatten(0, 1)  # what the weights get is a sum over all steps
        states = forced.flatten(0, 1)
        outer_grad, diagonal_grad = flat.T @ features.flatten(0, 1), (flat * states).sum(dim=0)
        if inner is None:
            return back, None, grad, diagonal_grad, outer_grad, None, None, None, None, None
        through = to_gate if lower is None else to_inner
        inner_grad = through.flatten(0, 1).T @ states
        return back, None, grad, diagonal_grad, outer_grad, inner_grad, to_gate, None, None, None
