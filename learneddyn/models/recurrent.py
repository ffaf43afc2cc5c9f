"""Recurrent dynamics for partial observations: what one observation lacks is in those before it.

Sources: Cho et al., "Learning Phrase Representations using RNN Encoder-Decoder for Statistical Machine Translation"
(2014), for gated recurrent units; the state-space layers of `learneddyn.models.state_space` stand in residual blocks as
in Gu, Goel, Re, "Efficiently Modeling Long Sequences with Structured State Spaces" (2022).
"""

import math
import time
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, gelu, glu, silu, softplus
from torch.nn.utils import skip_init
from tqdm import tqdm

from learneddyn.core import Outcome, Prediction, Transitions
from learneddyn.models.attempt import attempt, require_pair
from learneddyn.models.base import AbstractDynamics, FitReport
from learneddyn.models.scale import gaussian_nll, spread
from learneddyn.models.state_space import INITS, AbstractStateSpace, CompanionStateSpace, DiagonalStateSpace
from learneddyn.models.windows import elapsed, remaining
from learneddyn.spaces import Spaces

CELLS = ("gru", "s4d", "companion")
_LOGVAR = (-12.0, 2.0)
"""Soft bounds of the logarithm of the variance of a standardised target."""
_POLES_RATE = 1e-3
"""Largest learning rate of what places eigenvalues."""
_JUDGED = 256
"""Held-out windows that choose the weights: all up to this many, of more every so-manieth, so many at least."""
_MEASURED = 20_000
"""Held-out rows, in stretches from their beginnings, that the noise is measured on: about so many, or all."""
_PADDED = 4
"""Largest number of cells per measured row: short stretches beside a long one are mostly padding."""


class _Heads(NamedTuple):
    """What the network says about standardised targets."""

    mean: Float[Tensor, "*b q"]
    logvar: Float[Tensor, "*b q"]
    ended: Float[Tensor, "*b"] | None


class _GRU(nn.Module):
    """Gated recurrent units; the memory is the hidden state of every layer."""

    def __init__(self, inputs: int, width: int, layers: int) -> None:
        super().__init__()
        self.units = nn.GRU(inputs, width, layers, batch_first=True, device="meta").to_empty(device="cpu")
        self.memory_size = layers * width

    def initialise(self, rng: torch.Generator) -> None:
        for parameter in self.units.parameters():
            _uniform(parameter, self.units.hidden_size**-0.5, rng)

    def entry(self) -> tuple[Tensor, Tensor]:
        """Return weights and biases that inputs meet first."""
        weights = self.units.all_weights[0]
        return weights[0], weights[2]

    def forward(self, x: Float[Tensor, "b t i"]) -> Float[Tensor, "b t w"]:
        return self.units(x)[0]

    def step(self, x: Float[Tensor, "b i"], memory: Float[Tensor, "b m"]) -> tuple[Tensor, Tensor]:
        hidden = memory.view(len(x), self.units.num_layers, self.units.hidden_size).transpose(0, 1).contiguous()
        out, hidden = self.units(x[:, None], hidden)
        return out[:, 0], hidden.transpose(0, 1).flatten(1)


class _Stack(nn.Module):
    """Residual blocks: norm, state-space layer, GELU, gated linear map; the memory is the state of every layer."""

    def __init__(self, inputs: int, layers: list[AbstractStateSpace]) -> None:
        super().__init__()
        width = layers[0].channels
        self.encode = skip_init(nn.Linear, inputs, width)
        self.layers = nn.ModuleList(layers)
        self.mix = nn.ModuleList(skip_init(nn.Linear, width, 2 * width) for _ in layers)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(len(layers) + 1))
        self._sizes = [layer.state_size for layer in layers]
        self.memory_size = sum(self._sizes)

    def initialise(self, rng: torch.Generator) -> None:
        for linear in (self.encode, *self.mix):
            for parameter in linear.parameters():
                _uniform(parameter, linear.in_features**-0.5, rng)
        for layer in self._blocks():
            layer.initialise(rng)

    def entry(self) -> tuple[Tensor, Tensor]:
        """Return weights and biases that inputs meet first."""
        return self.encode.weight, self.encode.bias

    def forward(self, x: Float[Tensor, "b t i"]) -> Float[Tensor, "b t w"]:
        hidden = self.encode(x)
        for norm, layer, mix in zip(self.norms[:-1], self._blocks(), self.mix, strict=True):
            hidden = hidden + glu(mix(gelu(layer(norm(hidden)))))
        return self.norms[-1](hidden)

    def step(self, x: Float[Tensor, "b i"], memory: Float[Tensor, "b m"]) -> tuple[Tensor, Tensor]:
        hidden, states = self.encode(x), []
        parts = memory.split(self._sizes, dim=1)
        for norm, layer, mix, state in zip(self.norms[:-1], self._blocks(), self.mix, parts, strict=True):
            y, state = layer.step(norm(hidden), state)
            hidden = hidden + glu(mix(gelu(y)))
            states.append(state)
        return self.norms[-1](hidden), torch.cat(states, dim=1)

    def _blocks(self) -> list[AbstractStateSpace]:
        return [layer for layer in self.layers if isinstance(layer, AbstractStateSpace)]


class RecurrentDynamics(AbstractDynamics):
    """One recurrent network maps what has been observed and done so far to a Gaussian over the observation's change.

    Every step takes the observation that it is given and the action into the memory, which travels in the State; an
    episode begins with zeros. Training sees windows of episodes side by side, each from an empty memory: diagonal and
    companion layers answer a window at once by FFT. Shorter episodes take part as they are. The last rows are held out;
    the weights with the lowest negative log-likelihood of held-out windows are kept. A second fit goes on from the
    weights, which it keeps unless it finds better ones; its held-out rows may be among those that they have seen.

    The standard deviation is the network's own: large where an episode begins and velocities are unknown, small later.
    It is widened, column by column, to the errors on held-out stretches with all that is remembered from their
    beginnings: in a rollout memory grows older than any window that was trained on, and there errors grow. So that they
    grow little, the modes of an "s4d" begin with time constants of at most half a window. It is one member; penalties
    that ask how much members disagree have nothing to compare.

    Args:
        cell: "gru", "s4d" or "companion" (see `learneddyn.models.state_space`).
        width: hidden units, or channels of the state-space layers.
        layers: of the cell.
        order: states per channel of a state-space layer.
        init: of "s4d", one of `learneddyn.models.state_space.INITS`.
        window: steps of a training sequence.
        batch_size: sequences per update.
        updates: training updates.
        learning_rate: of AdamW, falling to a hundredth along a cosine; at most 0.001 for eigenvalues and time steps.
        weight_decay: of AdamW, none for eigenvalues and time steps.
        clip: norm that gradients are clipped to.
        learn_reward: add a Gaussian reward head.
        learn_termination: add a logistic termination head.
        holdout_ratio: share of the rows, the last ones, that choose the weights.

    Raises:
        ValueError: an argument outside its range (names it, the value, what is allowed).
    """

    num_members = 1

    def __init__(
        self,
        cell: str = "gru",
        width: int = 64,
        layers: int = 1,
        order: int = 32,
        init: str = "lin",
        window: int = 64,
        batch_size: int = 32,
        updates: int = 1000,
        learning_rate: float = 4e-3,
        weight_decay: float = 0.01,
        clip: float = 1.0,
        learn_reward: bool = False,
        learn_termination: bool = False,
        holdout_ratio: float = 0.2,
    ) -> None:
        super().__init__()
        for name, ok, value, allowed in (
            ("cell", cell in CELLS, cell, f"one of {CELLS}"),
            ("init", init in INITS, init, f"one of {INITS}"),
            ("width", width >= 1, width, "at least 1"),
            ("layers", layers >= 1, layers, "at least 1"),
            ("order", order >= 2 and order % 2 == 0, order, "even and at least 2"),
            ("window", window >= 1, window, "at least 1"),
            ("batch_size", batch_size >= 1, batch_size, "at least 1"),
            ("updates", updates >= 1, updates, "at least 1"),
            ("holdout_ratio", 0 < holdout_ratio < 1, holdout_ratio, "between 0 and 1"),
        ):
            if not ok:
                raise ValueError(f"{name} must be {allowed}, got {value!r}")
        self.cell, self.width, self.layers, self.order, self.init = cell, width, layers, order, init
        self.window, self.batch_size, self.updates = window, batch_size, updates
        self.learning_rate, self.weight_decay, self.clip = learning_rate, weight_decay, clip
        self.learn_reward, self.learn_termination = learn_reward, learn_termination
        self.holdout_ratio = holdout_ratio

    @property
    def elites(self) -> Int[Tensor, " k"]:
        """The one member."""
        return self._elites

    def _build(self, spaces: Spaces) -> None:
        inputs, q = spaces.obs_dim + spaces.action_dim, spaces.obs_dim + self.learn_reward
        self.core = self._core(inputs)
        self.inner = skip_init(nn.Linear, self.width, self.width)
        self.outer = skip_init(nn.Linear, self.width, 2 * q + self.learn_termination)
        for name, columns in (("input", inputs), ("target", q)):
            self.register_buffer(f"{name}_mean", torch.zeros(columns))
            self.register_buffer(f"{name}_std", torch.ones(columns))
        self.register_buffer("widening", torch.ones(q))
        self.register_buffer("_elites", torch.zeros(1, dtype=torch.long), persistent=False)

    def _core(self, inputs: int) -> _GRU | _Stack:
        if self.cell == "gru":
            return _GRU(inputs, self.width, self.layers)
        longest = 0.5
        return _Stack(
            inputs,
            [
                DiagonalStateSpace(self.width, self.order, self.init, min(4 / self.window, longest), longest)
                if self.cell == "s4d"
                else CompanionStateSpace(self.width, self.order)
                for _ in range(self.layers)
            ],
        )

    def _initialise(self, rng: torch.Generator) -> None:
        self.core.initialise(rng)
        for linear in (self.inner, self.outer):
            for parameter in linear.parameters():
                _uniform(parameter, linear.in_features**-0.5, rng)

    def begin(self, obs: Float[Tensor, "b o"]) -> Float[Tensor, "b m"]:
        """Return the memory of an episode that starts at ``obs``: empty, since the step takes ``obs`` in."""
        return obs.new_zeros(len(obs), self.core.memory_size)

    def predict(
        self, obs: Float[Tensor, "b o"], action: Float[Tensor, "b a"], memory: Float[Tensor, "b m"] | None = None
    ) -> Prediction:
        """Ask the network about the next step; without memory the episode begins here.

        Raises:
            ValueError: the model has not been fitted.
        """
        mean, std, ended, memory = self._answer(obs, action, memory)
        o = obs.shape[1]
        return Prediction(
            mean=mean[None, :, :o],
            std=std[None, :, :o],
            elites=self.elites,
            reward_mean=mean[None, :, o] if self.learn_reward else None,
            reward_std=std[None, :, o] if self.learn_reward else None,
            terminated=None if ended is None else ended.sigmoid()[None],
            memory=memory,
        )

    def sample(
        self,
        obs: Float[Tensor, "b o"],
        action: Float[Tensor, "b a"],
        member: Int[Tensor, " b"],
        rng: torch.Generator,
        memory: Float[Tensor, "b m"] | None = None,
        *,
        noise: bool = True,
    ) -> Outcome:
        """Draw the next step. Without noise: the mean, and termination where its probability is above 1/2.

        Raises:
            ValueError: the model has not been fitted.
        """
        mean, std, ended, memory = self._answer(obs, action, memory)
        o, over = obs.shape[1], None
        if noise:
            mean = mean.addcmul(std, torch.randn(mean.shape, generator=rng, device=mean.device))
        if ended is not None:
            level = torch.rand(len(obs), generator=rng, device=obs.device) if noise else 0.5
            over = ended.sigmoid() > level
        return Outcome(mean[:, :o], mean[:, o] if self.learn_reward else None, over, memory)

    def _answer(
        self, obs: Tensor, action: Tensor, memory: Tensor | None
    ) -> tuple[Float[Tensor, "b q"], Float[Tensor, "b q"], Float[Tensor, " b"] | None, Float[Tensor, "b m"]]:
        """Return mean and standard deviation in environment units, termination's logit, and the memory after."""
        self._require_fitted()
        hidden, after = self.core.step(self._inputs(obs, action), self.begin(obs) if memory is None else memory)
        heads = self._heads(hidden)
        mean = heads.mean * self.target_std + self.target_mean
        still = nn.functional.pad(obs, (0, 1)) if self.learn_reward else obs
        return mean + still, (0.5 * heads.logvar).exp() * self.target_std * self.widening, heads.ended, after

    def _inputs(self, obs: Tensor, action: Tensor) -> Tensor:
        return (torch.cat([obs, action], dim=-1) - self.input_mean) / self.input_std

    def _heads(self, hidden: Float[Tensor, "*b w"]) -> _Heads:
        out, q = self.outer(silu(self.inner(hidden))), len(self.target_mean)
        low, high = _LOGVAR
        logvar = low + softplus(high - softplus(high - out[..., q : 2 * q]) - low)
        return _Heads(out[..., :q], logvar, out[..., -1] if self.learn_termination else None)

    def fit(self, data: Transitions, *, rng: torch.Generator, progress: bool = False) -> FitReport:
        """Learn from the data; a second call goes on from the weights at hand.

        Returns:
            ``holdout_mse`` (environment units, mean over columns) and ``holdout_nll`` (nats per column, termination's
            left out) over the longest held-out stretches, each from an empty memory (about 20,000 rows at most),
            ``train_rows``, ``holdout_rows``.

        Raises:
            DataError: fewer than two rows, or NaN or infinite rows.
            ValueError: the data has other spaces than the model.
            FloatingPointError: what was learned is not finite; the model is left as it was.
        """
        started = time.perf_counter()
        require_pair(data)
        fresh = self.spaces is None
        with attempt(self, data):
            if fresh:
                self._initialise(rng)
            data = data.to(self._elites.device)
            held = max(1, int(self.holdout_ratio * len(data)))
            train, test = _Sequences(data[:-held]), _Sequences(data[-held:])
            self._standardise(train.data, fresh)
            history = self._learn(train, test, fresh, rng, progress)
            metrics = self._measure(test)
        metrics |= {"train_rows": float(len(data) - held), "holdout_rows": float(held)}
        return FitReport(len(history), time.perf_counter() - started, metrics, history)

    @torch.no_grad()
    def _standardise(self, data: Transitions, fresh: bool) -> None:
        """Take the scales of these rows, and change weights at hand so that they say the same in them.

        Means stay what they were; standard deviations do within the soft bounds, which belong to the scales.
        """
        columns = torch.cat([data.obs, data.action], dim=1), self._changes(data)
        scales = [(part.mean(dim=0), spread(part)) for part in columns]
        if not fresh:
            (mean, std), (target_mean, target_std) = scales
            weight, bias = self.core.entry()
            bias += weight @ ((mean - self.input_mean) / self.input_std)
            weight *= std / self.input_std
            q, ratio = len(target_std), self.target_std / target_std
            self.outer.weight[:q] *= ratio[:, None]
            self.outer.bias[:q] = self.outer.bias[:q] * ratio + (self.target_mean - target_mean) / target_std
            self.outer.bias[q : 2 * q] += 2 * ratio.log()
        for name, (mean, std) in zip(("input", "target"), scales, strict=True):
            getattr(self, f"{name}_mean").copy_(mean)
            getattr(self, f"{name}_std").copy_(std)

    def _learn(
        self, train: "_Sequences", test: "_Sequences", fresh: bool, rng: torch.Generator, progress: bool
    ) -> list[dict[str, float]]:
        columns, judged = self._columns(train), self._columns(test)
        optimizer = torch.optim.AdamW(self._groups(), self.learning_rate)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda done: 0.505 + 0.495 * math.cos(math.pi * done / self.updates)
        )
        best, kept, history = math.inf, self._weights(), []
        if not fresh:
            with torch.no_grad():
                best = float(self._loss(judged, *test.tiles(self.window)))
        bar = tqdm(range(self.updates), desc=f"RecurrentDynamics {self.cell}", disable=not progress)
        for update in bar:
            row = torch.randint(len(train.data), (self.batch_size,), generator=rng, device=rng.device)
            loss = self._loss(columns, *train.windows(row, self.window))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(self.parameters(), self.clip)
            optimizer.step()
            schedule.step()
            if (update + 1) % max(1, self.updates // 20) == 0 or update + 1 == self.updates:
                with torch.no_grad():
                    score = float(self._loss(judged, *test.tiles(self.window)))
                history.append({"epoch": float(update + 1), "loss": loss.item(), "holdout": score})
                bar.set_postfix(loss=loss.item(), holdout=score)
                if score < best or not math.isfinite(best):
                    best, kept = score, self._weights()
        if not any(math.isfinite(entry["holdout"]) for entry in history):
            raise FloatingPointError(
                f"RecurrentDynamics found no finite loss in {self.updates} updates: lower the learning rate"
            )
        with torch.no_grad():
            for parameter, good in zip(self.parameters(), kept, strict=True):
                parameter.copy_(good)
        return history

    def _weights(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.parameters()]

    def _groups(self) -> list[dict[str, object]]:
        """Return the optimiser's groups: eigenvalues and time steps apart."""
        poles = [p for layer in self.modules() if isinstance(layer, AbstractStateSpace) for p in layer.poles()]
        known = {id(parameter) for parameter in poles}
        rest = [parameter for parameter in self.parameters() if id(parameter) not in known]
        slow = {"params": poles, "lr": min(self.learning_rate, _POLES_RATE), "weight_decay": 0.0}
        return [{"params": rest, "weight_decay": self.weight_decay}, *([slow] if poles else [])]

    def _changes(self, data: Transitions) -> Float[Tensor, "n q"]:
        change = data.next_obs - data.obs
        return torch.cat([change, data.reward[:, None]], dim=1) if self.learn_reward else change

    def _columns(self, part: "_Sequences") -> tuple[Tensor, Tensor, Tensor]:
        """Return what the loss looks at, row by row: standardised inputs and targets, and terminations."""
        data = part.data
        target = (self._changes(data) - self.target_mean) / self.target_std
        return self._inputs(data.obs, data.action), target, data.terminated.to(target)

    def _loss(
        self, columns: tuple[Tensor, Tensor, Tensor], index: Int[Tensor, "b t"], inside: Bool[Tensor, "b t"]
    ) -> Float[Tensor, ""]:
        """Return the mean negative log-likelihood of the steps inside, up to constants."""
        x, target, terminated = (column[index] for column in columns)
        heads = self._heads(self.core(x))
        nll = 0.5 * ((heads.mean - target).square() * (-heads.logvar).exp() + heads.logvar)
        loss = nll[inside].mean()
        if heads.ended is not None:
            loss = loss + binary_cross_entropy_with_logits(heads.ended[inside], terminated[inside])
        return loss

    @torch.no_grad()
    def _measure(self, test: "_Sequences") -> dict[str, float]:
        """Widen the standard deviation to the errors on held-out stretches, and return them."""
        index, inside = test.stretches(_MEASURED)
        x, target, _ = (column[index] for column in self._columns(test))
        heads = self._heads(self.core(x))
        error = (heads.mean - target)[inside]
        if not bool(error.isfinite().all()):
            raise FloatingPointError("RecurrentDynamics learned something that is not finite: lower the learning rate")
        std = (0.5 * heads.logvar[inside]).exp()
        self.widening.copy_((error / std).square().mean(dim=0).sqrt().clamp_min(1.0))
        error, std = error * self.target_std, std * self.target_std * self.widening
        return {"holdout_mse": float(error.square().mean()), "holdout_nll": float(gaussian_nll(error, std))}

    def _require_fitted(self) -> None:
        if self.spaces is None:
            raise ValueError("RecurrentDynamics has not been fitted: call fit(data) or load a model first")

    # Declared for type checkers; `_build` registers them.
    core: _GRU | _Stack
    input_mean: Tensor
    input_std: Tensor
    target_mean: Tensor
    target_std: Tensor
    widening: Tensor
    _elites: Tensor


class _Sequences:
    """Windows of at most so many steps within one unbroken stretch each, padded behind its end."""

    def __init__(self, data: Transitions) -> None:
        self.data, self._position = data, elapsed(data)
        row = torch.arange(len(data), device=data.device)
        self._first, self._last = row - self._position, row + remaining(data) - 1
        self._longest = int(self._position.max()) + 1

    def windows(self, row: Int[Tensor, " b"], steps: int) -> tuple[Int[Tensor, "b t"], Bool[Tensor, "b t"]]:
        """Return rows of windows that hold ``row``, as long as the episode allows, and which are no padding."""
        begin = torch.maximum(torch.minimum(row, self._last[row] - steps + 1), self._first[row])
        return self._from(begin, steps)

    def tiles(self, steps: int) -> tuple[Int[Tensor, "b t"], Bool[Tensor, "b t"]]:
        """Return windows that lie side by side: all, or every so-manieth of those that are judged."""
        begin = (self._position % steps == 0).nonzero().flatten()
        return self._from(begin[:: max(1, len(begin) // _JUDGED)], steps)

    def stretches(self, rows: int) -> tuple[Int[Tensor, "b t"], Bool[Tensor, "b t"]]:
        """Return stretches from their beginnings, the longest first, until they hold ``rows`` rows: at least one.

        Each is cut after ``rows`` steps and padded to the longest. The shortest are left out where they would need more
        than `_PADDED` cells per row, so that memory is bounded whatever the lengths.
        """
        begin = (self._position == 0).nonzero().flatten()
        length, order = (self._last[begin] - begin + 1).clamp_max(rows).sort(descending=True, stable=True)
        longest = int(length[0])
        chosen = order[length.cumsum(dim=0) - length < rows][: _PADDED * rows // longest]
        return self._from(begin[chosen], longest)

    def _from(self, begin: Int[Tensor, " b"], steps: int) -> tuple[Int[Tensor, "b t"], Bool[Tensor, "b t"]]:
        index = begin[:, None] + torch.arange(min(steps, self._longest), device=begin.device)
        last = self._last[begin][:, None]
        return torch.minimum(index, last), index <= last


def _uniform(parameter: Tensor, bound: float, rng: torch.Generator) -> None:
    nn.init.uniform_(parameter, -bound, bound, generator=rng)
