"""The ensemble's training loss and its gradients, derived by hand.

Autograd allocates every intermediate result anew and walks a graph to reach the same products. Here all of them live in
memory that the next batch uses again. `ProbabilisticEnsemble._loss` is the definition; tests hold both
equal.

With ``g = sigmoid(raw - max)`` the softly bounded variance is ``v = exp(min) + u``, ``u = exp(max) g``, so that
``d log v / d raw = u / v (1 - g)``, ``d log v / d max = u / v g`` and ``d log v / d min = 1 - u / v``.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

TIGHTNESS = 0.01
"""Weight of the penalty on the distance between the variance bounds (Chua et al., 2018)."""


class Gradients:
    """Compute the loss of a batch and write its gradients into ``.grad`` of the parameters.

    Args:
        weights: of every layer.
        biases: of every layer.
        max_logvar: upper bound of the log-variances.
        min_logvar: lower bound.
        learned: target columns that count.
        half: compute layers and their gradients in bfloat16, but for the last, whose rounded means would blur targets
            that are predicted to a hundredth of their scale; parameters, the loss and what follows stay float32.
    """

    def __init__(
        self,
        weights: Sequence[Float[nn.Parameter, "e _ _"]],
        biases: Sequence[Float[nn.Parameter, "e 1 _"]],
        max_logvar: Float[nn.Parameter, " q"],
        min_logvar: Float[nn.Parameter, " q"],
        learned: Bool[Tensor, " q"],
        half: bool = False,
    ) -> None:
        self._weights, self._biases = list(weights), list(biases)
        self._max, self._min, self._learned = max_logvar, min_logvar, learned.float()
        self._share = self._learned / self._learned.sum()
        self._by_weight = [_gradient(weight) for weight in self._weights]
        self._by_bias = [_gradient(bias) for bias in self._biases]
        self._by_max, self._by_min = _gradient(max_logvar), _gradient(min_logvar)
        halved = len(self._weights) - 1 if half else 0
        self._work = [weight.detach() for weight in self._weights]
        self._work[:halved] = [weight.bfloat16() for weight in self._work[:halved]]
        self._slopes = [torch.empty_like(weight) for weight in self._work[:halved]]
        self._memory: dict[tuple[str, int, int], Tensor] = {}

    @torch.no_grad()
    def __call__(
        self,
        x: Float[Tensor, "e b i"],
        target: Float[Tensor, "e b q"],
        ended: Float[Tensor, "e b"] | None,
        weight: Float[Tensor, "e b"] | None = None,
    ) -> Float[Tensor, ""]:
        """Return the loss of this batch.

        Args:
            x: standardised inputs.
            target: scaled targets.
            ended: 1 where the step terminated, or None without a termination head.
            weight: factor of every row's loss, of mean 1 over the data; None is 1.
        """
        for layer in range(len(self._slopes)):
            self._work[layer].copy_(self._weights[layer])
        inputs, before = self._forward(x)
        loss, slope = self._heads(before.pop(), target, ended, weight)
        self._backward(inputs, before, slope)
        return loss

    def _forward(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Return what enters every layer, and what leaves it before its activation."""
        inputs, before, last = [x], [], len(self._work) - 1
        for layer, (weight, bias) in enumerate(zip(self._work, self._biases, strict=True)):
            inputs[-1] = inputs[-1].to(weight.dtype)
            z = self._buffer("z", layer, inputs[-1], weight.shape[2])
            before.append(torch.baddbmm(bias.to(weight.dtype), inputs[-1], weight, out=z))
            if layer < last:
                inputs.append(torch.ops.aten.silu.out(z, out=self._buffer("h", layer, z, weight.shape[2])))
        return inputs, before

    def _heads(self, out: Tensor, target: Tensor, ended: Tensor | None, weight: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the loss and its gradient by the networks' outputs; write those of the variance bounds."""
        q, rows = target.shape[2], target.shape[1]
        share = self._share / rows if weight is None else self._share * (weight[..., None] / rows)
        gate = (out[..., q : 2 * q] - self._max).sigmoid_()
        loose = gate * self._max.exp()
        precision = (loose + self._min.exp()).reciprocal_()
        off = out[..., :q] - target
        weighted = off * precision
        square = off.mul_(weighted)
        loss = ((square - precision.log()) * share).sum() + TIGHTNESS * ((self._max - self._min) * self._learned).sum()
        slope = torch.empty_like(out)
        torch.mul(weighted, 2 * share, out=slope[..., :q])
        by_logvar = square.neg_().add_(1).mul_(share)
        by_loose = loose.mul_(precision).mul_(by_logvar)
        by_max = gate.mul_(by_loose)
        torch.sub(by_loose, by_max, out=slope[..., q : 2 * q])
        tightness = TIGHTNESS * self._learned
        torch.add(by_max.sum(dim=(0, 1)), tightness, out=self._by_max)
        torch.sub((by_logvar - by_loose).sum(dim=(0, 1)), tightness, out=self._by_min)
        if ended is not None:
            logit = out[..., -1]
            entropy = nn.functional.binary_cross_entropy_with_logits(logit, ended, weight=weight, reduction="sum")
            loss = loss + entropy / rows
            by_logit = torch.sub(logit.sigmoid(), ended, out=slope[..., -1]).div_(rows)
            if weight is not None:
                by_logit.mul_(weight)
        return loss, slope

    def _backward(self, inputs: list[Tensor], before: list[Tensor], slope: Tensor) -> None:
        for layer in reversed(range(len(self._work))):
            if layer < len(self._slopes):
                self._by_weight[layer].copy_(torch.bmm(inputs[layer].mT, slope, out=self._slopes[layer]))
            else:
                torch.bmm(inputs[layer].mT, slope, out=self._by_weight[layer])
            torch.sum(slope, dim=1, keepdim=True, dtype=torch.float32, out=self._by_bias[layer])
            if layer:
                # What entered this layer is no longer needed: its memory takes the gradient by it.
                slope = torch.bmm(slope, self._work[layer].mT, out=inputs[layer]).to(before[layer - 1].dtype)
                slope = torch.ops.aten.silu_backward.grad_input(slope, before[layer - 1], grad_input=slope)

    def _buffer(self, name: str, layer: int, like: Tensor, width: int) -> Tensor:
        """Return memory for one layer; the last batch of an epoch is shorter and uses a part of it."""
        size = like.shape[0] * like.shape[1] * width
        held = self._memory.get((name, layer, width))
        if held is None or len(held) < size:
            held = self._memory[name, layer, width] = like.new_empty(size)
        return held[:size].view(*like.shape[:2], width)


def _gradient(parameter: nn.Parameter) -> Tensor:
    """Give a parameter memory for its gradient, and return it."""
    parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
