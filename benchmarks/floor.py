"""What nobody can leave out: the layers of a task alone, or their matrix products, in the order that is fastest here.

No noise, nothing before and nothing after; operands lie in contiguous memory, blocks fit the cache, results go into
memory that is used again. Where a goal is missed, the ratio of these rows says what was left to win.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import relu, silu

ACTIVATIONS: dict[str, Callable[..., Tensor]] = {"silu": silu, "relu": relu}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LAYERS, PRODUCTS = "layers alone", "products alone"
_CACHED = 1680  # bytes of a hidden column in a block, as learneddyn.models.rollout cuts them
_ALONE = 256  # rows from which products member by member are faster than batched ones


def chain(
    widths: Sequence[int],
    networks: int,
    rows: int,
    precision: str,
    device: str = "cpu",
    *,
    times: int = 1,
    activation: str = "silu",
) -> Callable[[], None]:
    """Return a call that passes ``rows`` rows through each of so many networks, ``times`` times over."""
    dtype, layers = DTYPES[precision], list(pairwise(widths))
    most = max(1, _CACHED // dtype.itemsize)
    block = -(-rows // -(-rows // most)) if device == "cpu" else rows
    weights = [torch.randn(networks, *shape, device=device).to(dtype) / shape[0] for shape in layers]
    biases = [torch.randn(networks, 1, shape[1], device=device).to(dtype) for shape in layers]
    memory = [torch.randn(networks, block, width, device=device).to(dtype) for width in widths]
    alone = device == "cpu" and rows >= _ALONE
    each: list[int | slice] = [*range(networks)] if alone else [slice(None)]
    parts = [[[tensor[one] for tensor in kind] for kind in (weights, biases, memory)] for one in each]
    product, act = torch.addmm if alone else torch.baddbmm, ACTIVATIONS[activation]

    @torch.no_grad()
    def run() -> None:
        for _ in range(times * -(-rows // block)):
            for weight, bias, (x, *through) in parts:
                for layer, out in enumerate(through):
                    x = product(bias[layer], x, weight[layer], out=out)
                    if layer < len(weight) - 1:
                        act(x, inplace=True)

    return run


def update(widths: Sequence[int], networks: int, rows: int, precision: str, device: str = "cpu") -> Callable[[], None]:
    """Return a call with the products of one gradient: forward, to activations (but of the inputs), to weights."""
    dtype, layers = DTYPES[precision], list(pairwise(widths))
    weights, grads = ([torch.randn(networks, *shape, device=device).to(dtype) for shape in layers] for _ in range(2))
    memory, back = ([torch.randn(networks, rows, width, device=device).to(dtype) for width in widths] for _ in range(2))

    @torch.no_grad()
    def run() -> None:
        for layer, weight in enumerate(weights):
            torch.bmm(memory[layer], weight, out=memory[layer + 1])
        for layer in reversed(range(len(weights))):
            torch.bmm(memory[layer].mT, back[layer + 1], out=grads[layer])
            if layer:
                torch.bmm(back[layer + 1], weights[layer].mT, out=back[layer])

    return run
