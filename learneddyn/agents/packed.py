"""Several MLPs of one shape as one batched net, and Adam on its packed weights.

The packed tensors are the storage of the modules' own parameters and of their optimiser's state: nothing is copied back
and forth, and whoever reads, saves or loads the modules sees the current values.
"""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim.adam import Adam, adam

Place = tuple[int, int, slice]
"""Where a parameter lies: index of the packed tensor, index of the net in it, rows."""

_mask = torch.ops.aten.threshold_backward.grad_input
_RARE = ("amsgrad", "maximize", "capturable", "differentiable", "decoupled_weight_decay")


class PackedMLP:
    """n ReLU nets evaluated together, with gradients by hand, written into the parameters' ``grad``.

    With x_0 the input, z_l = x_l W_lᵀ + b_l, x_{l+1} = relu(z_l), y = z_L and g_l = dL/dz_l:
    dL/dW_l = g_lᵀ x_l, dL/db_l = Σ_rows g_l, dL/dx_l = g_l W_l, g_{l-1} = dL/dx_l ∘ 1{x_l > 0}.

    With ``dtype=torch.bfloat16`` the products between hidden layers are taken in bf16. Weights, their gradients, and the
    products with inputs and outputs stay float32: observations may need more than bf16's three digits, so do values.

    Args:
        layers: ``layers[l][i]`` are the modules that together make layer l of net i, stacked along the output.
        dtype: of the products between hidden layers.
    """

    def __init__(self, layers: Sequence[Sequence[Sequence[nn.Linear]]], dtype: torch.dtype = torch.float32) -> None:
        self.tensors: list[Tensor] = []
        self.parameters: list[nn.Parameter] = []
        self.places: list[Place] = []
        for nets in layers:
            for kind in ("weight", "bias"):
                stacked = [torch.cat([getattr(part, kind).detach() for part in parts]) for parts in nets]
                for net, parts in enumerate(nets):
                    start = 0
                    for part in parts:
                        self.parameters.append(getattr(part, kind))
                        self.places.append((len(self.tensors), net, slice(start, start + part.out_features)))
                        start += part.out_features
                self.tensors.append(torch.stack(stacked))
        self.grads = [torch.zeros_like(tensor) for tensor in self.tensors]
        views = zip(views_of(self.tensors, self.places), views_of(self.grads, self.places), strict=True)
        for parameter, (value, grad) in zip(self.parameters, views, strict=True):
            parameter.data, parameter.grad = value, grad
        self._pointers = [parameter.data_ptr() for parameter in self.parameters]
        self._weights, self._biases = self.tensors[0::2], [bias[:, None] for bias in self.tensors[1::2]]
        self._dtype, self._low = dtype, [tensor.to(dtype) for tensor in self.tensors]
        self._rows = 0

    @property
    def current(self) -> bool:
        """Whether the modules' parameters still live here (loading keeps them; moving to a device does not)."""
        return all(p.data_ptr() == pointer for p, pointer in zip(self.parameters, self._pointers, strict=True))

    def refresh(self) -> None:
        """Renew the low-precision copies of the weights: to be called whenever weights have changed."""
        if self._dtype != torch.float32:
            torch._foreach_copy_(self._low, self.tensors)

    def forward(self, x: Float[Tensor, "#n b i"]) -> Float[Tensor, "n b k"]:
        """Return the outputs, and keep the activations for `backward`."""
        self._reserve(x.shape[1])
        self._input = x = x.expand(len(self._weights[0]), -1, -1)
        for layer, hidden in enumerate(self._hidden):
            if layer == 0:
                first = torch.bmm(x, self._weights[0].mT, out=self._first).add_(self._biases[0]).relu_()
                x = first if hidden is first else hidden.copy_(first)
            else:
                torch.bmm(x, self._low[2 * layer].mT, out=hidden)
                x = hidden.add_(self._low[2 * layer + 1][:, None]).relu_()
        self._last = x.float()
        return torch.baddbmm(self._biases[-1], self._last, self._weights[-1].mT)

    def backward(self, grad: Float[Tensor, "n b k"]) -> None:
        """Write dL/dweights of the first b rows of the last `forward`, given dL/doutputs."""
        for layer, g in self._layers(grad):
            weight, bias = self.grads[2 * layer : 2 * layer + 2]
            rows = slice(g.shape[1])
            if layer == len(self._weights) - 1:
                torch.bmm(g.mT, self._last[:, rows], out=weight)
            elif layer == 0:  # tall and thin: MKL takes half the time the other way round
                weight.copy_(torch.bmm(self._input[:, rows].mT, g.float()).mT)
            elif self._dtype == torch.float32:
                torch.bmm(g.mT, self._hidden[layer - 1][:, rows], out=weight)
            else:
                weight.copy_(torch.bmm(g.mT, self._hidden[layer - 1][:, rows]))
            torch.sum(g, 1, dtype=torch.float32, out=bias)

    def input_grad(self, grad: Float[Tensor, "n b k"], start: int) -> Float[Tensor, "b c"]:
        """Return dL/dinput summed over the nets, for the input columns from ``start`` on."""
        for _, last in self._layers(grad):
            g = last
        columns = self._weights[0][:, :, start:].mT.contiguous()
        return torch.bmm(columns, g.float().mT).sum(0).T

    def _layers(self, grad: Float[Tensor, "n b k"]) -> Iterator[tuple[int, Tensor]]:
        """Yield g_l from the last layer to the first."""
        layer, rows = len(self._weights) - 1, slice(grad.shape[1])
        yield layer, grad
        g = grad.to(self._dtype)
        for layer in range(layer, 0, -1):
            flow, hidden = self._flow[layer - 1][:, rows], self._hidden[layer - 1][:, rows]
            g = _mask(torch.bmm(g, self._low[2 * layer], out=flow), hidden, 0, grad_input=flow)
            yield layer - 1, g

    def _reserve(self, rows: int) -> None:
        if rows == self._rows:
            return
        count, device = len(self._weights[0]), self._weights[0].device
        sizes = [weight.shape[1] for weight in self._weights[:-1]]
        self._hidden = [torch.empty(count, rows, size, dtype=self._dtype, device=device) for size in sizes]
        self._flow = [torch.empty_like(hidden) for hidden in self._hidden]
        self._first = self._hidden[0].float() if sizes else None
        self._rows = rows


class PackedAdam:
    """Steps an optimiser that Stable-Baselines3 made, whose parameters live in packed tensors.

    Adam runs on the packed tensors, and the optimiser's own state becomes views of the packed moments, so that its
    ``state_dict`` is always current. Another optimiser, or a rare option of Adam, steps the parameters themselves.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: Sequence[nn.Parameter],
        places: Sequence[Place],
        tensors: list[Tensor],
        grads: list[Tensor],
    ) -> None:
        self.optimizer, self._parameters, self._places = optimizer, parameters, places
        self._tensors, self._grads = tensors, grads
        self._plain = type(optimizer) is Adam and len(optimizer.param_groups) == 1
        self._plain = self._plain and not any(optimizer.param_groups[0].get(option) for option in _RARE)
        if self._plain:
            self._adopt()

    def _adopt(self) -> None:
        self._moments = [[torch.zeros_like(tensor) for tensor in self._tensors] for _ in range(2)]
        self._steps = torch.zeros(len(self._parameters))
        first, second = (views_of(moments, self._places) for moments in self._moments)
        self._held = []
        for parameter, mean, square, step in zip(self._parameters, first, second, self._steps, strict=True):
            mine = {"step": step, "exp_avg": mean, "exp_avg_sq": square}
            for name, value in self.optimizer.state.get(parameter, {}).items():
                mine[name].copy_(value)
            self.optimizer.state[parameter] = mine
            self._held.append((parameter, mine))
        self._ticks = [self._steps[0].clone() for _ in self._tensors]

    @property
    def current(self) -> bool:
        """Whether the optimiser's state is still the packed one (loading a state replaces it)."""
        state = self.optimizer.state
        return not self._plain or all(state.get(parameter) is mine for parameter, mine in self._held)

    def step(self) -> None:
        """Do what ``optimizer.step()`` does, with the gradients at hand."""
        if not self._plain:
            for parameter, grad in zip(self._parameters, views_of(self._grads, self._places), strict=True):
                parameter.grad = grad
            self.optimizer.step()
            return
        group = self.optimizer.param_groups[0]
        on_cpu = self._tensors[0].device.type == "cpu"
        adam(
            self._tensors,
            self._grads,
            *self._moments,
            [],
            self._ticks,
            fused=on_cpu,
            foreach=not on_cpu,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        self._steps += 1


def views_of(tensors: Sequence[Tensor], places: Sequence[Place]) -> list[Tensor]:
    """Return one view per parameter of packed tensors (values, gradients or moments)."""
    return [tensors[index][net, rows] for index, net, rows in places]
