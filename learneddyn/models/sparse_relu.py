"""A network with few ReLUs, so that planning with it is a small mixed-integer program.

Source: Liu, Zhou, He, Marcucci, Fei-Fei, Wu, Li, "Model-Based Control with Sparse Neural Dynamics" (NeurIPS 2023).
`learneddyn.planners.MILP` solves the program that `SparseReLU.cascade` describes.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from tqdm import tqdm

from learneddyn.core import Transitions
from learneddyn.models.regression import AbstractRegression, Answer
from learneddyn.models.scale import spread
from learneddyn.models.windows import longest_window, window_starts, windows
from learneddyn.spaces import Spaces

RELU, IDENTITY, ZERO = range(3)
"""What a hidden unit does with its input."""
_DENSE, _SPARSE = 0.2, 0.6
"""Shares of the updates after which gates begin to be drawn, and after which they are fixed."""
_GROWTH = 1e3
"""Factor by which the pressure would grow in all, were the number of ReLUs never reached."""


class SparseReLU(AbstractRegression):
    """An MLP whose hidden units each end as ReLU, identity or zero; it predicts the change of the observation.

    Every unit draws its kind from a categorical with logits phi by the Gumbel-softmax trick, one-hot forward and soft
    backward. The loss is the squared error of open-loop predictions over ``horizon`` steps plus a pressure times the
    expected number of ReLUs. The pressure grows while there are more ReLUs than wanted and rests while there are not.
    After 60 % of the updates every unit keeps its likeliest kind (units too many take the better of identity and zero)
    and the weights are trained on.

    Deviations: one run down to the number wanted, where the source goes through a sequence of them; what the source
    leaves open (rates, schedule) is ours.

    Args:
        hidden: widths of the hidden layers.
        relus: ReLUs to keep, at most; None keeps all units as they are.
        horizon: steps predicted open loop in training, or the longest episode's where that is shorter.
        updates: of training.
        batch_size: windows per update.
        learning_rate: of Adam for the weights; falls to zero by a cosine once the kinds are fixed.
        gate_learning_rate: of Adam for the logits; several times that of the weights.
        temperature: of the softmax; below 0.3 the gradient through it is too noisy.
        pressure: first weight of the expected number of ReLUs.
        learn_reward: add a reward output.
        holdout_ratio: share of the rows, the last ones, that measure the noise.

    Raises:
        ValueError: an argument outside its range (names it, the value, what is allowed).
    """

    num_members = 1

    def __init__(
        self,
        hidden: Sequence[int] = (32, 32),
        relus: int | None = 8,
        horizon: int = 3,
        updates: int = 4000,
        batch_size: int = 128,
        learning_rate: float = 5e-3,
        gate_learning_rate: float = 2e-2,
        temperature: float = 1.0,
        pressure: float = 1e-3,
        learn_reward: bool = False,
        holdout_ratio: float = 0.1,
    ) -> None:
        super().__init__()
        for name, ok, value, allowed in (
            ("hidden", len(hidden) > 0 and all(width >= 1 for width in hidden), hidden, "one or more positive widths"),
            ("relus", relus is None or relus >= 0, relus, "None or at least 0"),
            ("horizon", horizon >= 1, horizon, "at least 1"),
            ("updates", updates >= 1, updates, "at least 1"),
            ("batch_size", batch_size >= 1, batch_size, "at least 1"),
            ("temperature", temperature > 0, temperature, "above 0"),
            ("pressure", pressure > 0, pressure, "above 0"),
            ("holdout_ratio", 0 < holdout_ratio < 1, holdout_ratio, "between 0 and 1"),
        ):
            if not ok:
                raise ValueError(f"{name} must be {allowed}, got {value!r}")
        self.hidden, self.relus, self.horizon = list(hidden), relus, horizon
        self.updates, self.batch_size = updates, batch_size
        self.learning_rate, self.gate_learning_rate = learning_rate, gate_learning_rate
        self.temperature, self.pressure = temperature, pressure
        self.learn_reward, self.holdout_ratio = learn_reward, holdout_ratio

    def _build_members(self, spaces: Spaces) -> None:
        o, a = spaces.obs_dim, spaces.action_dim
        widths = [o + a, *self.hidden, o + self.learn_reward]
        self.weights = nn.ParameterList(torch.zeros(i, j) for i, j in pairwise(widths))
        self.biases = nn.ParameterList(torch.zeros(j) for j in widths[1:])
        self.logits = nn.Parameter(torch.zeros(sum(self.hidden), 3))
        self.register_buffer("kinds", torch.full((sum(self.hidden),), RELU))
        self.register_buffer("shift", torch.zeros(o + a))
        self.register_buffer("scale", torch.ones(o + a))
        self.register_buffer("output_shift", torch.zeros(widths[-1]))
        self.register_buffer("output_scale", torch.ones(widths[-1]))

    @property
    def counts(self) -> dict[str, int]:
        """How many hidden units are ReLU, identity and zero."""
        return {name: int((self.kinds == kind).sum()) for kind, name in enumerate(("relu", "identity", "zero"))}

    @torch.no_grad()
    def cascade(self) -> list[tuple[Float[Tensor, "_ _"], Float[Tensor, " _"]]]:
        """Return the mean of the next observation as a cascade of affine maps and ReLUs, exact, in float64.

        With v = (observation, action) in the units of the environment, every pair (W, b) but the last makes units
        ``y = relu(W v + b)`` that are appended to v, and the last gives the next observation ``W v + b``. Layers
        without a ReLU leave no trace: identities are merged, zeros are gone.

        Raises:
            ValueError: the model has not been fitted.
        """
        self._require_fitted()
        shift, scale, output_shift, output_scale, *layers = (
            tensor.double()
            for tensor in (self.shift, self.scale, self.output_shift, self.output_scale, *self.weights, *self.biases)
        )
        weights, biases = layers[: len(self.weights)], layers[len(self.weights) :]
        maps = torch.diag(1 / scale)  # what enters the layer at hand is v @ maps + constant
        constant, pairs = -shift / scale, []
        for weight, bias, kinds in zip(weights[:-1], biases[:-1], self.kinds.split(self.hidden), strict=True):
            maps, constant = maps @ weight, constant @ weight + bias
            rectified = (kinds == RELU).nonzero().flatten()
            if len(rectified):
                pairs.append((maps[:, rectified].T.contiguous(), constant[rectified]))
            keep = (kinds == IDENTITY).to(maps)
            units = maps.new_zeros(len(rectified), len(kinds))
            units[torch.arange(len(rectified)), rectified] = 1.0
            maps, constant = torch.cat([maps * keep, units]), constant * keep
        o = len(shift) - (0 if self.spaces is None else self.spaces.action_dim)
        last = ((maps @ weights[-1]) * output_scale).T[:o].contiguous()
        last[:, :o] += torch.eye(o).to(last)
        return [*pairs, (last, ((constant @ weights[-1] + biases[-1]) * output_scale + output_shift)[:o])]

    def _outputs(self, inputs: Tensor, gates: Sequence[Float[Tensor, "_ 3"]]) -> Tensor:
        """Return standardised changes, and the standardised reward."""
        x = (inputs - self.shift) / self.scale
        for weight, bias, gate in zip(self.weights[:-1], self.biases[:-1], gates, strict=True):
            z = torch.addmm(bias, x, weight)
            x = gate[:, RELU] * z.relu() + gate[:, IDENTITY] * z
        return torch.addmm(self.biases[-1], x, self.weights[-1])

    def _fixed(self) -> Sequence[Float[Tensor, "_ 3"]]:
        return nn.functional.one_hot(self.kinds, 3).to(self.shift).split(self.hidden)

    def _every(self, obs: Float[Tensor, "b o"], action: Float[Tensor, "b a"], memory: Tensor | None) -> Answer:
        said = self._outputs(torch.cat([obs, action], dim=1), self._fixed()) * self.output_scale + self.output_shift
        o = obs.shape[1]
        return Answer(torch.cat([obs + said[:, :o], said[:, o:]], dim=1)[None])

    def _held_out(self, rows: int, count: int, rng: torch.Generator) -> Int[Tensor, " h"]:
        """Return the last rows, so that windows of training rows have no gaps."""
        return torch.arange(rows - count, rows, device=rng.device)

    def _learn(
        self, data: Transitions, rows: Bool[Tensor, " n"], rng: torch.Generator, progress: bool
    ) -> list[dict[str, float]]:
        train = data[rows]
        self._standardise(train)
        self._initialise(rng)
        window = longest_window(train, self.horizon)
        starts = window_starts(train, window)
        target = torch.cat([train.next_obs, train.reward[:, None]], dim=1)
        weights = torch.optim.Adam([*self.weights, *self.biases], self.learning_rate)
        gates = torch.optim.Adam([self.logits], self.gate_learning_rate)
        schedule = torch.optim.lr_scheduler.LambdaLR(weights, self._rate)
        begin, fix = (self.updates if self.relus is None else int(share * self.updates) for share in (_DENSE, _SPARSE))
        pressure, growth, history = self.pressure, _GROWTH ** (1 / max(1, fix - begin)), []
        bar = tqdm(range(self.updates), desc="SparseReLU", disable=not progress)
        for update in bar:
            drawn = begin <= update < fix
            if update == fix:
                self._choose()
            many = drawn and self._likeliest_relus() > (self.relus or 0)
            pressure *= growth if many else 1.0
            chosen = starts[torch.randint(len(starts), (self.batch_size,), generator=rng, device=starts.device)]
            x, u, y = (windows(part, chosen, window) for part in (train.obs, train.action, target))
            error = self._open_loop(x[:, 0], u, y, self._drawn(rng) if drawn else self._fixed())
            loss = error
            if many:
                loss = loss + pressure * self.logits.softmax(dim=1)[:, RELU].sum()
            for optimizer in (weights, gates):
                optimizer.zero_grad(set_to_none=True)
            loss.backward()
            for optimizer in (weights, gates) if drawn else (weights,):
                optimizer.step()
            schedule.step()
            if (update + 1) % max(1, self.updates // 20) == 0:
                entry = {"loss": error.item(), "relus": float(self._likeliest_relus()), "pressure": pressure}
                history.append({"epoch": update + 1.0} | entry)
                bar.set_postfix(entry)
        return history

    def _rate(self, update: int) -> float:
        """Return the share of the learning rate: full until the kinds are fixed, then falling to zero by a cosine."""
        return 0.5 * (1 + math.cos(math.pi * max(0.0, (update / self.updates - _SPARSE) / (1 - _SPARSE))))

    def _standardise(self, train: Transitions) -> None:
        inputs, change = torch.cat([train.obs, train.action], dim=1), train.next_obs - train.obs
        outputs = torch.cat([change, train.reward[:, None]], dim=1) if self.learn_reward else change
        for shift, scale, column in (
            (self.shift, self.scale, inputs),
            (self.output_shift, self.output_scale, outputs),
        ):
            shift.copy_(column.mean(dim=0))
            scale.copy_(spread(column))

    @torch.no_grad()
    def _initialise(self, rng: torch.Generator) -> None:
        for weight, bias in zip(self.weights, self.biases, strict=True):
            bound = weight.shape[0] ** -0.5
            nn.init.uniform_(weight, -bound, bound, generator=rng)
            nn.init.uniform_(bias, -bound, bound, generator=rng)
        self.logits.zero_()
        self.logits[:, RELU] = 2.0
        self.kinds.fill_(RELU)

    def _open_loop(self, obs: Tensor, action: Tensor, target: Tensor, gates: Sequence[Tensor]) -> Tensor:
        """Return the mean squared error along a rollout, in units of one step's spread."""
        o, total = obs.shape[1], torch.zeros((), device=obs.device)
        for step in range(action.shape[1]):
            said = self._outputs(torch.cat([obs, action[:, step]], dim=1), gates) * self.output_scale
            said = said + self.output_shift
            obs = obs + said[:, :o]
            predicted = torch.cat([obs, said[:, o:]], dim=1)
            error = (predicted - target[:, step, : predicted.shape[1]]) / self.output_scale
            total = total + error.square().mean()
        return total / action.shape[1]

    def _drawn(self, rng: torch.Generator) -> Sequence[Float[Tensor, "_ 3"]]:
        """Draw every unit's kind: one-hot, with the gradient of the softmax."""
        uniform = torch.rand(self.logits.shape, generator=rng, device=self.logits.device)
        gumbel = -(-uniform.clamp_min(1e-20).log()).clamp_min(1e-20).log()
        soft = ((self.logits + gumbel) / self.temperature).softmax(dim=1)
        hard = nn.functional.one_hot(soft.argmax(dim=1), 3).to(soft)
        return (hard + soft - soft.detach()).split(self.hidden)

    def _likeliest_relus(self) -> int:
        return int((self.logits.argmax(dim=1) == RELU).sum())

    @torch.no_grad()
    def _choose(self) -> None:
        """Fix every unit's kind: the likeliest, and for ReLUs too many (the least likely ones) the next likeliest."""
        linear = self.logits[:, IDENTITY:].argmax(dim=1) + IDENTITY
        lead = self.logits[:, RELU] - self.logits[:, IDENTITY:].amax(dim=1)
        allowed = len(lead) if self.relus is None else min(self.relus, len(lead))
        best = torch.zeros_like(lead, dtype=torch.bool)
        best[lead.topk(allowed).indices] = True
        self.kinds.copy_(torch.where(best & (lead > 0), RELU, linear))

    # Declared for type checkers; `_build_members` registers them.
    kinds: Tensor
    shift: Tensor
    scale: Tensor
    output_shift: Tensor
    output_scale: Tensor
