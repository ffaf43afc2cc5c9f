"""The networks of an ensemble as rollouts use them: a frozen copy that answers fast, without autograd.

Rows are grouped by member, so that a row costs one network instead of all of them, in groups of one size, so that a
layer is one batched product. A block of rows runs through all layers in two buffers before the next one begins,
because fresh memory, or memory beyond the cache, costs more than anything else that could be saved here. A single row
goes through NumPy, whose calls cost a fraction of PyTorch's.

Inputs are standardised apart from the first layer: folded into its weights, a large mean over a small deviation would
cancel digits, and the two operations cost less than a hundredth of a step.
"""

import math
import threading
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor
from torch.nn.functional import silu

_BYTES = 1680  # of one hidden column of one member in a block: layers of the usual width then fit a core's cache
# Rows of one member from which float32 products of its own are faster than those of all members at once. In bfloat16
# every product first reorders its weights, so that fewer products pay.
_ALONE = 256
_VIEWS = 64  # shapes of buffers to remember; a world has few, unless the shares of its members change
_ROWS_PER_MEMBER = 10  # the calls of one more batched product cost about as much as this many rows


class Parts(NamedTuple):
    """What an ensemble hands over, float32.

    A network's first q outputs are the means of the targets in units of ``target_scale``, the next q their
    log-variances before the bounds, and one more, if there is one, the logit of a termination.
    """

    weights: Sequence[Float[Tensor, "e _ _"]]
    biases: Sequence[Float[Tensor, "e 1 _"]]
    max_logvar: Float[Tensor, " q"]
    min_logvar: Float[Tensor, " q"]
    input_mean: Float[Tensor, " i"]
    input_std: Float[Tensor, " i"]
    target_mean: Float[Tensor, " q"]
    target_scale: Float[Tensor, " q"]
    """Standard deviation of the targets; zero in columns that are copied instead of learned."""
    least_std: Float[Tensor, " q"]
    """Added to the predicted noise, in environment units."""


class Answer(NamedTuple):
    """Means and standard deviations of the targets in environment units, and the logit of a termination."""

    mean: Float[Tensor, "*e b q"]
    std: Float[Tensor, "*e b q"]
    ended: Float[Tensor, "*e b"] | None


class Snapshot:
    """A copy of an ensemble's networks; it does not follow later changes of the weights.

    The softly bounded log-variance of the model has ``exp(logvar) = exp(min) + exp(max) sigmoid(raw - max)``: a
    standard deviation costs a sigmoid and a root here instead of two softplus and an exponential.

    Args:
        parts: the ensemble's tensors.
        half: let `grouped`, and `every` where it is asked, compute layers in bfloat16; inputs are standardised and
            answers formed in float32.
    """

    def __init__(self, parts: Parts, half: bool = False) -> None:
        q, last = len(parts.max_logvar), parts.weights[-1]
        self._targets, self._width = q, last.shape[2]
        scale, shift = last.new_ones(self._width), last.new_zeros(self._width)
        scale[:q], shift[:q], shift[q : 2 * q] = parts.target_scale, parts.target_mean, -parts.max_logvar
        weights, biases = [*parts.weights[:-1], last * scale], [*parts.biases[:-1], parts.biases[-1] * scale + shift]
        self._full = _Layers([each.clone() for each in weights], [each.clone() for each in biases])
        self._fast = _Layers([w.bfloat16() for w in weights], [b.bfloat16() for b in biases]) if half else self._full
        self._input_mean, self._input_gain = parts.input_mean.clone(), 1 / parts.input_std
        self._least = parts.target_scale.square() * parts.min_logvar.exp() + parts.least_std.square()
        self._range = parts.target_scale.square() * parts.max_logvar.exp()
        self._buffers = _Buffers()
        if last.is_cpu:
            units = self._input_mean, self._input_gain, self._least, self._range
            self._one = _OneRow(self._full, units, q)

    def one(self, x: Float32[np.ndarray, " i"], member: int) -> tuple[np.ndarray, np.ndarray, float | None]:
        """Return mean, standard deviation and termination logit of one row of features; on the CPU, in float32.

        Writes into ``x``.
        """
        return self._one(x, member)

    def grouped(self, x: Float[Tensor, "b i"], member: Int[Tensor, " b"]) -> Answer:
        """Ask one member per row, in groups of any size. Waits for the device once, for the sizes."""
        order = member.argsort()
        counts = tuple(torch.bincount(member, minlength=self._full.members).tolist())
        alone = _ALONE if self._fast is self._full else len(x) + 1
        layout = _layout(counts, _BYTES // self._fast.itemsize, alone, x.device)
        rows = self._standardised(x.index_select(0, order.index_select(0, layout.window)), self._fast)
        out = self._buffers.take("out", rows, len(rows), self._width)
        for block in layout.blocks:
            self._through(self._fast.of(block.members), block.of(rows), block.of(out))
        place = torch.empty_like(order).index_copy_(0, order, layout.place)
        return self._answer(out.index_select(0, place).float())

    def dealt(self, x: Float[Tensor, "b i"], member: Int[Tensor, " b"], among: Int[Tensor, " k"]) -> Answer:
        """Ask one member per row, where the rows are dealt evenly (up to one row) among the members ``among``.

        Every shape follows from the shapes of the inputs, so that nothing waits for the device, and a CUDA graph can
        hold the call. Rows that are not dealt evenly get wrong answers: `grouped` is for those.
        """
        lanes, share = len(x), -(-len(x) // len(among))
        asked = among.sort().values
        order = member.argsort()
        group = torch.searchsorted(asked, member.index_select(0, order))
        turn = torch.arange(lanes, device=x.device)
        start = torch.searchsorted(group, torch.arange(len(asked), device=x.device))
        window = (start[:, None] + turn[:share]).clamp_(max=lanes - 1)
        rows = self._standardised(x.index_select(0, order.index_select(0, window.flatten())), self._fast)
        rows = rows.view(*window.shape, -1)
        out = self._buffers.take("out", rows, *window.shape, self._width)
        self._through(self._fast.chosen(asked), rows, out)
        place = torch.empty_like(order).index_copy_(0, order, group * share + turn - start[group])
        return self._answer(out.flatten(0, 1).index_select(0, place).float())

    def every(self, x: Float[Tensor, "b i"], half: bool = False) -> Answer:
        """Ask every member about every row; ``half`` lets bfloat16 layers answer if the snapshot has them."""
        networks = self._fast if half else self._full
        rows, size = self._standardised(x.clone(), networks), _BYTES // networks.itemsize
        mean, std = (x.new_empty(networks.members, len(x), self._targets) for _ in range(2))
        ended = x.new_empty(mean.shape[:2]) if self._width > 2 * self._targets else None
        everyone = range(networks.members)
        alone = len(everyone) == 1 or (networks is self._full and len(x) >= _ALONE)
        for members in [(member,) for member in everyone] if alone else [tuple(everyone)]:
            layers, chosen = networks.of(members), members[0] if alone else slice(None)
            for start in range(0, len(x), size):
                part = slice(start, start + size)
                h = rows[part] if alone else rows[part].expand(networks.members, -1, -1)
                out = self._through(layers, h, self._buffers.take("out", h, *h.shape[:-1], self._width))
                answer = self._answer(out.float(), std[chosen, part])
                mean[chosen, part] = answer.mean
                if ended is not None and answer.ended is not None:
                    ended[chosen, part] = answer.ended
        return Answer(mean, std, ended)

    def _standardised(self, x: Float[Tensor, "b i"], networks: "_Layers") -> Float[Tensor, "b i"]:
        """Return the inputs of these networks, computed in the memory of ``x``."""
        return x.sub_(self._input_mean).mul_(self._input_gain).to(networks.weights[0].dtype)

    def _through(self, layers: "_Layers", h: Float[Tensor, "*k c i"], out: Float[Tensor, "*k c w"]) -> Tensor:
        """Write the raw outputs into ``out``, and return it."""
        last, product = len(layers.weights) - 1, torch.addmm if h.ndim == 2 else torch.baddbmm
        for layer, (weight, bias) in enumerate(zip(layers.weights, layers.biases, strict=True)):
            # Fresh memory costs more than the activation.
            to = out if layer == last else self._buffers.take(f"h{layer % 2}", h, *h.shape[:-1], weight.shape[-1])
            h = product(bias, h, weight, out=to)
            if layer < last:
                silu(h, inplace=True)
        return out

    def _answer(self, out: Float[Tensor, "*e b w"], std: Float[Tensor, "*e b q"] | None = None) -> Answer:
        """Return what raw float32 outputs mean, with standard deviations in the memory ``std`` if that is given."""
        q = self._targets
        std = torch.sigmoid(out[..., q : 2 * q], out=std)
        torch.addcmul(self._least, self._range, std, out=std).sqrt_()
        return Answer(out[..., :q], std, out[..., -1] if self._width > 2 * q else None)


class _Layers:
    """Weights and biases of some members."""

    def __init__(self, weights: list[Float[Tensor, "*e _ _"]], biases: list[Float[Tensor, "*e 1 _"]]) -> None:
        self.weights, self.biases, self.members = weights, biases, len(weights[0])
        self.itemsize = weights[0].itemsize
        self.of = lru_cache(maxsize=64)(self._of)

    def _of(self, members: tuple[int, ...]) -> "_Layers":
        """Return the chosen members: a view where they are neighbours, else a contiguous copy; one without its axis."""
        first = members[0]
        index: Tensor | slice | int = slice(first, first + len(members))
        if len(members) == 1:
            index = first
        elif members != tuple(range(first, first + len(members))):
            index = torch.tensor(members, device=self.weights[0].device)
        return self.chosen(index)

    def chosen(self, members: Tensor | slice | int) -> "_Layers":
        """Return the chosen members."""
        return _Layers([weight[members] for weight in self.weights], [bias[members] for bias in self.biases])


class _Buffers(threading.local):
    """Memory that calls use again, apart for every thread; its content is lost at the next call."""

    def __init__(self) -> None:
        self._memory: dict[tuple[str, torch.dtype], Tensor] = {}
        self._views: dict[tuple[str, torch.dtype, tuple[int, ...]], Tensor] = {}

    def take(self, name: str, like: Tensor, *shape: int) -> Tensor:
        """Return memory of this shape, of the type and on the device of ``like``."""
        key = name, like.dtype, shape
        view = self._views.get(key)
        if view is None:
            size, held = math.prod(shape), self._memory.get(key[:2])
            # Memory made in inference mode could not be written outside of it.
            with torch.inference_mode(False):
                if held is None or len(held) < size:
                    held = self._memory[key[:2]] = torch.empty(size, dtype=like.dtype, device=like.device)
                    self._views.clear()
                if len(self._views) == _VIEWS:
                    self._views.clear()
                view = self._views[key] = held[:size].view(shape)
        return view


class _OneRow:
    """One row through one member in NumPy, where a matrix-vector product wants the transposed weights.

    With z half of what enters it, ``silu`` is ``z (1 + tanh z)``, three calls that cannot overflow; hidden layers are
    therefore halved beforehand, which is exact.
    """

    def __init__(self, layers: _Layers, units: tuple[Tensor, ...], targets: int) -> None:
        self._layers, self._targets = layers, targets
        self._mean, self._gain, self._least, self._range = (part.numpy() for part in units)
        self._member = cache(self._transposed)

    def __call__(self, x: Float32[np.ndarray, " i"], member: int) -> tuple[np.ndarray, np.ndarray, float | None]:
        """Return mean, standard deviation and termination logit."""
        hidden, weight, bias = self._member(member)
        q = self._targets
        # An exponential that overflows gives the right quotient, zero; what is not finite, the world refuses.
        with np.errstate(over="ignore", invalid="ignore"):
            x -= self._mean
            x *= self._gain
            for half_weight, half_bias in hidden:
                h = half_weight.dot(x)
                h += half_bias
                x = np.tanh(h)
                x += 1
                x *= h
            out = weight.dot(x)
            out += bias
            std = np.exp(-out[q : 2 * q])
            std += 1
            np.divide(self._range, std, out=std)
            std += self._least
            np.sqrt(std, out=std)
        return out[:q], std, float(out[-1]) if len(out) > 2 * q else None

    def _transposed(self, member: int) -> tuple[list[tuple[np.ndarray, np.ndarray]], np.ndarray, np.ndarray]:
        weights = [np.ascontiguousarray(weight[member].numpy().T) for weight in self._layers.weights]
        biases = [bias[member, 0].numpy() for bias in self._layers.biases]
        hidden = [(weight / 2, bias / 2) for weight, bias in zip(weights[:-1], biases[:-1], strict=True)]
        return hidden, weights[-1], biases[-1]


class _Block(NamedTuple):
    """As many rows of every member named, which go through the networks together: a stretch of the laid out rows."""

    members: tuple[int, ...]
    start: int
    rows: int

    def of(self, laid_out: Float[Tensor, "p _"]) -> Float[Tensor, "*k c _"]:
        """Return this block's rows, without the axis of members if there is only one."""
        part, many = laid_out[self.start : self.start + len(self.members) * self.rows], len(self.members)
        return part if many == 1 else part.view(many, self.rows, -1)


class _Layout(NamedTuple):
    """Where rows that are sorted by member stand while they go through the networks, some of them twice."""

    blocks: list[_Block]
    window: Int[Tensor, " p"]
    """The sorted row that stands at each place."""
    place: Int[Tensor, " b"]
    """The place where each sorted row is answered."""


@lru_cache(maxsize=16)  # which members have the odd rows changes from draw to draw
def _layout(counts: tuple[int, ...], most: int, alone: int, device: torch.device) -> _Layout:
    """Cut rows that are sorted by member, ``counts`` of each, into blocks of at most ``most`` rows per member.

    Members go together, unless one has ``alone`` rows or rows computed in vain would cost more than calls. All blocks
    of a group are of one size, by reaching into rows that another block answers: few shapes, which bfloat16 products
    need.
    """
    rows = sum(counts)
    used = [(member, sum(counts[:member]), count) for member, count in enumerate(counts) if count]
    longest = max(counts)
    vain = len(used) * longest - rows
    together = longest < alone and vain <= _ROWS_PER_MEMBER * len(used) + rows // 20
    blocks, windows, place, laid = [], [np.zeros(0, np.int64)], np.zeros(rows, np.int64), 0
    for group in [used] if together and used else [[one] for one in used]:
        longest = max(count for _, _, count in group)
        size = -(-longest // -(-longest // most))
        for begin in range(0, longest, size):
            blocks.append(_Block(tuple(member for member, _, _ in group), laid, size))
            for _, start, count in group:
                first, last = start + min(begin, count), start + min(begin + size, count)
                window = max(0, min(first, rows - size))
                windows.append(np.arange(window, window + size))
                place[first:last] = np.arange(laid + first - window, laid + last - window)
                laid += size
    return _Layout(blocks, *(torch.from_numpy(each).to(device) for each in (np.concatenate(windows), place)))
