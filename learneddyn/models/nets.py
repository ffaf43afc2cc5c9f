"""n MLPs of one shape as one batched net: one product per layer for all of them, differentiable to any order."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import layer_norm


class BatchedMLP(nn.Module):
    """n nets with weights ``[n, in, out]`` and biases ``[n, 1, out]``.

    Weights start as those of ``torch.nn.Linear``: uniform within ``1 / sqrt(fan_in)``.

    Args:
        count: nets n.
        widths: of the layers, input and output among them.
        activation: after every layer but the last.
        normalise: LayerNorm after each activation, with a gain and an offset per net.
        hidden_bias: start value of the hidden biases, None for that of ``torch.nn.Linear``.
        last_bound: bound of the last layer's start weights and biases, None for that of ``torch.nn.Linear``.
        rng: of the start weights, on the CPU.
    """

    def __init__(
        self,
        count: int,
        widths: Sequence[int],
        *,
        activation: Callable[[Tensor], Tensor] = torch.relu,
        normalise: bool = False,
        hidden_bias: float | None = None,
        last_bound: float | None = None,
        rng: torch.Generator,
    ) -> None:
        super().__init__()
        self.count, self._activation, self._normalise = count, activation, normalise
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        last = len(widths) - 2
        for layer, (inputs, outputs) in enumerate(pairwise(widths)):
            bound = last_bound if layer == last and last_bound is not None else inputs**-0.5
            weight, bias = (
                (2 * torch.rand(count, rows, outputs, generator=rng) - 1).mul_(bound) for rows in (inputs, 1)
            )
            if layer != last and hidden_bias is not None:
                bias.fill_(hidden_bias)
            self.weights.append(nn.Parameter(weight))
            self.biases.append(nn.Parameter(bias))
        hidden = widths[1:-1] if normalise else ()
        self.gains = nn.ParameterList(nn.Parameter(torch.ones(count, 1, width)) for width in hidden)
        self.offsets = nn.ParameterList(nn.Parameter(torch.zeros(count, 1, width)) for width in hidden)
        # The same parameters: reading a ParameterList costs as much as a small product.
        self._layers = list(zip(self.weights, self.biases, strict=True))

    def forward(
        self, x: Float[Tensor, "... b i"], after: Callable[[Tensor], Tensor] | None = None
    ) -> Float[Tensor, "n b k"]:
        """Return every net's output; rows ``[b, i]`` go to all nets, rows ``[n, b, i]`` each to its own.

        ``after`` is applied to the output of every hidden layer ``[n, b, width]``, for example dropout.
        """
        x = x.expand(self.count, -1, -1)
        last = len(self._layers) - 1
        for layer, (weight, bias) in enumerate(self._layers):
            x = torch.baddbmm(bias, x, weight)
            if layer != last:
                x = self._activation(x)
                if self._normalise:
                    x = layer_norm(x, x.shape[-1:]) * self.gains[layer] + self.offsets[layer]
                x = x if after is None else after(x)
        return x
