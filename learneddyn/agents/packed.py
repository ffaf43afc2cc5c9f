"""Several MLPs of one shape as one batched net in one flat tensor, and Adam on it.

The flat tensors are the storage of the modules' own parameters and of their optimiser's state: nothing is copied back
and forth, and whoever reads, saves or loads the modules sees the current values.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Adam

Views = Callable[[Tensor], list[Tensor]]
"""From a flat tensor (values, gradients or moments) to one view per parameter."""

_ALIGN = 32  # elements: a cache line of bf16
_RARE = ("amsgrad", "maximize", "capturable", "differentiable", "decoupled_weight_decay")
_mask = torch.ops.aten.threshold_backward.grad_input


class PackedMLP:
    """n ReLU nets evaluated together, with gradients by hand, written into the parameters' ``grad``.

    With x_0 the input, z_l = x_l W_lᵀ + b_l, x_{l+1} = relu(z_l), y = z_L and g_l = dL/dz_l:
    dL/dW_l = g_lᵀ x_l, dL/db_l = Σ_rows g_l, dL/dx_l = g_l W_l, g_{l-1} = dL/dx_l ∘ 1{x_l > 0}.

    With ``dtype=torch.bfloat16`` the products between hidden layers and the gradients of activations and inputs are
    bf16. Weights, their gradients, and the products with inputs and to outputs stay float32: observations and values
    may need more than bf16's three digits.

    Args:
        layers: ``layers[l][i]`` are the modules that together make layer l of net i, stacked along the output.
        dtype: of the products between hidden layers.
    """

    def __init__(self, layers: Sequence[Sequence[Sequence[nn.Linear]]], dtype: torch.dtype = torch.float32) -> None:
        self.parameters: list[nn.Parameter] = []
        shapes: list[tuple[int, ...]] = []
        places: list[tuple[int, int, slice]] = []
        for nets in layers:
            for kind in ("weight", "bias"):
                for net, parts in enumerate(nets):
                    rows = 0
                    for part in parts:
                        parameter = getattr(part, kind)
                        self.parameters.append(parameter)
                        places.append((len(shapes), net, slice(rows, rows + len(parameter))))
                        rows += len(parameter)
                shapes.append((len(nets), rows, *parameter.shape[1:]))
        sizes = [torch.Size(shape).numel() for shape in shapes]
        rooms = [-(-size // _ALIGN) * _ALIGN for size in sizes]

        def tensors(flat: Tensor) -> list[Tensor]:
            rooms_of = zip(flat.split(rooms), sizes, shapes, strict=True)
            return [room[:size].view(shape) for room, size, shape in rooms_of]

        def views(flat: Tensor) -> list[Tensor]:
            packed = tensors(flat)
            return [packed[index][net, rows] for index, net, rows in places]

        self.views: Views = views
        self.flat = torch.zeros(sum(rooms), device=self.parameters[0].device)
        self.grad = torch.zeros_like(self.flat)
        for parameter, value, grad in zip(self.parameters, views(self.flat), views(self.grad), strict=True):
            value.copy_(parameter.detach())
            parameter.data, parameter.grad = value, grad
        self._pointers = [parameter.data_ptr() for parameter in self.parameters]
        self._dtype, self._flat_low = dtype, self.flat.to(dtype)
        self._weights, self._biases = _pairs(tensors(self.flat))
        self._weights_low, self._biases_low = _pairs(tensors(self._flat_low))
        self._grads = list(zip(*_pairs(tensors(self.grad)), strict=True))
        self.count, self._rows = len(layers[0]), 0

    @property
    def current(self) -> bool:
        """Whether the modules' parameters still live here (loading keeps them; moving to a device does not)."""
        return all(p.data_ptr() == pointer for p, pointer in zip(self.parameters, self._pointers, strict=True))

    @property
    def layers(self) -> list[tuple[Float[Tensor, "n _ _"], Float[Tensor, "n 1 _"]]]:
        """Weights and biases as they are now, one pair per layer: views, to be followed by `refresh` when written."""
        return list(zip(self._weights, self._biases, strict=True))

    def add_grad(self, grads: Sequence[Tensor]) -> None:
        """Add gradients of weight and bias, layer by layer, to those that `backward` wrote."""
        mine = [grad for pair in self._grads for grad in pair]
        for grad, more in zip(mine, grads, strict=True):
            grad += more

    def refresh(self) -> None:
        """Renew the low-precision copy of the weights: to be called whenever weights have changed."""
        if self._flat_low is not self.flat:
            self._flat_low.copy_(self.flat)

    def forward(self, x: Float[Tensor, "b i"]) -> Float[Tensor, "n b k"]:
        """Return the outputs, and keep the activations for `backward`."""
        self._reserve(len(x))
        self._input = x = x.expand(self.count, -1, -1)
        for layer, hidden in enumerate(self._hidden):
            if layer == 0:
                first = torch.bmm(x, self._weights[0].mT, out=self._first).add_(self._biases[0]).relu_()
                x = first if hidden is first else hidden.copy_(first)
            else:
                torch.bmm(x, self._weights_low[layer].mT, out=hidden)
                x = hidden.add_(self._biases_low[layer]).relu_()
        self._last = x.float()
        return torch.baddbmm(self._biases[-1], self._last, self._weights[-1].mT)

    def backward(self, grad: Float[Tensor, "n b k"]) -> None:
        """Write dL/dweights of the first b rows of the last `forward`, given dL/doutputs."""
        rows = slice(grad.shape[1])
        for layer, g in self._layers(grad):
            weight, bias = self._grads[layer]
            if layer == len(self._grads) - 1:
                torch.bmm(g.mT, self._last[:, rows], out=weight)
            elif layer == 0:  # MKL takes half the time with the short side first
                weight.copy_(torch.bmm(self._input[:, rows].mT, g.float()).mT)
            elif self._dtype == torch.float32:
                torch.bmm(g.mT, self._hidden[layer - 1][:, rows], out=weight)
            else:
                weight.copy_(torch.bmm(g.mT, self._hidden[layer - 1][:, rows]))
            torch.sum(g, 1, keepdim=True, dtype=torch.float32, out=bias)

    def input_grad(self, grad: Float[Tensor, "n b k"], start: int) -> Float[Tensor, "b c"]:
        """Return dL/dinput summed over the nets, for the input columns from ``start`` on."""
        *_, (_, g) = self._layers(grad)
        columns = self._weights_low[0][:, :, start:].mT.contiguous()
        return torch.bmm(columns, g.to(self._dtype).mT).sum(0, dtype=torch.float32).T

    def _layers(self, grad: Float[Tensor, "n b k"]) -> Iterator[tuple[int, Tensor]]:
        """Yield l and g_l from the last layer to the first."""
        rows = slice(grad.shape[1])
        yield len(self._weights) - 1, grad
        g = grad.to(self._dtype)
        for layer in range(len(self._weights) - 1, 0, -1):
            weight, flow = self._weights_low[layer], self._flow[layer - 1][:, rows]
            torch.mul(g, weight, out=flow) if g.shape[2] == 1 else torch.bmm(g, weight, out=flow)
            g = _mask(flow, self._hidden[layer - 1][:, rows], 0, grad_input=flow)
            yield layer - 1, g

    def _reserve(self, rows: int) -> None:
        if rows != self._rows:
            shapes = [(self.count, rows, weight.shape[1]) for weight in self._weights[:-1]]
            self._hidden = [self._flat_low.new_empty(shape) for shape in shapes]
            self._flow = [torch.empty_like(hidden) for hidden in self._hidden]
            self._first = self._hidden[0].float() if shapes else self.flat
            self._rows = rows


class PackedAdam:
    """Steps an optimiser that Stable-Baselines3 made, whose parameters are views of one flat tensor.

    Adam runs on the flat tensor, and the optimiser's own state becomes views of the flat moments, so that its
    ``state_dict`` is always current. Another optimiser, or a rare option of Adam, steps the parameters themselves.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: Sequence[Tensor],
        flat: Float[Tensor, " p"],
        grad: Float[Tensor, " p"],
        views: Views,
    ) -> None:
        self.optimizer, self._parameters, self._flat, self._grad, self._views = optimizer, parameters, flat, grad, views
        groups = optimizer.param_groups
        self._plain = type(optimizer) is Adam and len(groups) == 1 and not any(groups[0].get(name) for name in _RARE)
        if self._plain:
            self._adopt()

    def _adopt(self) -> None:
        self._moments = torch.zeros_like(self._flat), torch.zeros_like(self._flat)
        self._steps = torch.zeros(len(self._parameters))
        self._state = []
        for parameter, *mine in zip(self._parameters, self._steps, *map(self._views, self._moments), strict=True):
            state = dict(zip(("step", "exp_avg", "exp_avg_sq"), mine, strict=True))
            for name, value in self.optimizer.state.get(parameter, {}).items():
                state[name].copy_(value)
            self.optimizer.state[parameter] = state
            self._state.append(state)

    @property
    def current(self) -> bool:
        """Whether the optimiser's state is still the packed one (loading a state replaces it)."""
        states = map(self.optimizer.state.get, self._parameters)
        return not self._plain or all(now is mine for now, mine in zip(states, self._state, strict=True))

    def step(self) -> None:
        """Do what ``optimizer.step()`` does, with the gradients at hand."""
        if not self._plain:
            for parameter, grad in zip(self._parameters, self._views(self._grad), strict=True):
                parameter.grad = grad
            self.optimizer.step()
            return
        group = self.optimizer.param_groups[0]
        self._steps += 1
        mean, square = self._moments
        torch._fused_adam_(
            [self._flat],
            [self._grad],
            [mean],
            [square],
            [],
            [self._steps[0].to(self._flat.device)],
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )


def _pairs(tensors: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Return weights ``[n, out, in]`` and biases ``[n, 1, out]``."""
    return tensors[0::2], [bias[:, None] for bias in tensors[1::2]]
