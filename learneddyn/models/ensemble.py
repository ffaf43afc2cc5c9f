"""Probabilistic ensemble: E Gaussian networks trained on bootstraps of one data set.

Source: Chua, Calandra, McAllister, Levine, "Deep Reinforcement Learning in a Handful of Trials using Probabilistic
Dynamics Models" (2018); elites, hold-out and early stopping as in Janner, Fu, Zhang, Levine, "When to Trust Your
Model: Model-Based Policy Optimization" (2019).
"""

import math
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple
from weakref import WeakSet

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, silu, softplus
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from tqdm import tqdm

from learneddyn.core import DataError, Outcome, Prediction, Transitions
from learneddyn.models.angles import near
from learneddyn.models.attempt import attempt, require_pair
from learneddyn.models.base import AbstractDynamics, FitReport
from learneddyn.models.gradients import TIGHTNESS, Gradients
from learneddyn.models.rollout import Answer, Parts, Snapshot
from learneddyn.models.scale import or_one
from learneddyn.spaces import Spaces

# A column that never changes is copied, not learned; its noise is far below anything a task can feel.
_CONSTANT_STD = 1e-6
# Relative to the column's largest magnitude: below it, float32 rounding is all that changes.
_CONSTANT_RANGE = 1e-6
# Below this cross-entropy (nats) a termination head is as good as certain, and its gains stop counting as progress.
_ENTROPY_FLOOR = 1e-3


class _Heads(NamedTuple):
    """What the networks say, before targets become observations."""

    mean: Float[Tensor, "e b q"]
    logvar: Float[Tensor, "e b q"]
    ended: Float[Tensor, "e b"] | None


class _Score(NamedTuple):
    """Hold-out errors per member; ``watched`` decides early stopping and elites, lower is better."""

    mse: Float[Tensor, " e"]
    nll: Float[Tensor, " e"]
    watched: Float[Tensor, " e"]


class _Frozen(NamedTuple):
    """The networks as they were when the tensors, held here, had these versions and addresses."""

    networks: Snapshot
    versions: list[int]
    addresses: list[int]
    held: list[Tensor]
    relative: np.ndarray
    plain: np.ndarray
    angle: np.ndarray


class ProbabilisticEnsemble(AbstractDynamics):
    """E networks map (obs, action) to a Gaussian over the change of the observation (and the reward).

    Every network is an MLP with SiLU; its log-variance is bounded softly by two learned vectors shared by all
    networks. Each network trains on its own bootstrap of the data by Gaussian negative log-likelihood, stops early on
    the hold-out squared error, and keeps its best weights; the ``num_elites`` networks with the lowest hold-out error
    are the ones rollouts use. Inputs are standardised by the training rows of the latest fit.

    Where no gradient can be asked (``torch.no_grad``), `sample` and `predict` answer from a copy of the networks laid
    out for speed, equal to float rounding, which is made anew after any change of the weights that PyTorch counts:
    writes through ``tensor.data`` are not counted.

    Three choices lie outside the sources and are off or harmless by default: ``scale_targets`` standardises targets too
    (small changes then weigh as much as large ones); columns whose change is constant in the data (goals, unused
    sensors) are copied exactly instead of learned; with a termination head, what early stopping and elites watch is the
    hold-out squared error times the head's cross-entropy, so that a relative gain of either counts. Adam's moments
    start fresh at every fit, and so does the split: after a warm start the held-out rows may be among those that the
    weights have seen.

    Args:
        num_members: networks E.
        num_elites: networks that rollouts use, 1 to E.
        hidden: widths of the hidden layers.
        learn_reward: add a Gaussian reward head.
        learn_termination: add a logistic termination head, trained by cross-entropy.
        angles: observation columns in radians that enter the network as cosine and sine.
        absolute: observation columns predicted as they are, not as a change.
        scale_targets: standardise the targets.
        learning_rate: of Adam.
        weight_decay: L2 factor per layer, first to last; one number for all layers; None is the published schedule
            2.5e-5, 5e-5, 7.5e-5, 7.5e-5, 1e-4, with as many middle layers of 7.5e-5 as ``hidden`` asks for.
        batch_size: rows per network and update.
        holdout_ratio: share of the rows held out.
        holdout_max: upper bound of held-out rows.
        improvement: relative gain of hold-out error that counts as progress.
        patience: epochs without progress before training stops.
        max_epochs: upper bound of epochs, None for no bound.
        bootstrap: draw each network's rows with replacement; False gives all networks the same rows.
        precision: ``"bf16"`` lets rollouts (`sample` of two rows or more, and `sample_and_predict`, which a penalty
            asks) compute their layers in bfloat16; `predict`, and with it every metric, stays in float32.
        training_precision: ``"bf16"`` lets `fit` compute layers (but the last) and their gradients in bfloat16;
            weights, loss and optimiser stay in float32.

    Raises:
        ValueError: an argument outside its range (names it, the value, what is allowed).
    """

    def __init__(
        self,
        num_members: int = 7,
        num_elites: int = 5,
        hidden: Sequence[int] = (200, 200, 200, 200),
        learn_reward: bool = False,
        learn_termination: bool = False,
        angles: Sequence[int] = (),
        absolute: Sequence[int] = (),
        scale_targets: bool = False,
        learning_rate: float = 1e-3,
        weight_decay: Sequence[float] | float | None = None,
        batch_size: int = 256,
        holdout_ratio: float = 0.2,
        holdout_max: int = 5000,
        improvement: float = 0.01,
        patience: int = 5,
        max_epochs: int | None = None,
        bootstrap: bool = True,
        precision: str = "fp32",
        training_precision: str = "fp32",
    ) -> None:
        super().__init__()
        layers = len(hidden) + 1
        decay = _decay_per_layer(weight_decay, layers)
        for name, ok, value, allowed in (
            ("num_members", num_members >= 1, num_members, "at least 1"),
            ("num_elites", 1 <= num_elites <= num_members, num_elites, f"1 to num_members = {num_members}"),
            ("hidden", all(width >= 1 for width in hidden), hidden, "positive widths"),
            ("weight_decay", len(decay) == layers, weight_decay, f"one number, or one per layer ({layers})"),
            ("batch_size", batch_size >= 1, batch_size, "at least 1"),
            ("holdout_ratio", 0 < holdout_ratio < 1, holdout_ratio, "between 0 and 1"),
            ("patience", patience >= 0, patience, "at least 0"),
            ("max_epochs", max_epochs is None or max_epochs >= 1, max_epochs, "None or at least 1"),
            ("precision", precision in ("fp32", "bf16"), precision, "'fp32' or 'bf16'"),
            ("training_precision", training_precision in ("fp32", "bf16"), training_precision, "'fp32' or 'bf16'"),
        ):
            if not ok:
                raise ValueError(f"{name} must be {allowed}, got {value!r}")
        self.num_members, self.num_elites, self.hidden = num_members, num_elites, list(hidden)
        self.learn_reward, self.learn_termination = learn_reward, learn_termination
        self.angles, self.absolute, self.scale_targets = list(angles), list(absolute), scale_targets
        self.learning_rate, self.weight_decay, self.batch_size = learning_rate, decay, batch_size
        self.holdout_ratio, self.holdout_max = holdout_ratio, holdout_max
        self.improvement, self.patience, self.max_epochs = improvement, patience, max_epochs
        self.bootstrap, self.precision, self.training_precision = bootstrap, precision, training_precision
        self._frozen: _Frozen | None = None

    @property
    def elites(self) -> Int[Tensor, " k"]:
        """Indices of the members with the lowest hold-out error, best first."""
        return self._elites

    def _build(self, spaces: Spaces) -> None:
        o, a, e = spaces.obs_dim, spaces.action_dim, self.num_members
        for name, columns in (("angles", self.angles), ("absolute", self.absolute)):
            if any(not 0 <= column < o for column in columns):
                raise ValueError(f"{name} must name observation columns 0 to {o - 1}, got {columns}")
        inputs, targets = o + len(self.angles) + a, o + self.learn_reward
        widths = [inputs, *self.hidden, 2 * targets + self.learn_termination]
        self.weights = nn.ParameterList(torch.zeros(e, i, j) for i, j in pairwise(widths))
        self.biases = nn.ParameterList(torch.zeros(e, 1, j) for j in widths[1:])
        self.max_logvar = nn.Parameter(torch.full((targets,), 0.5))
        self.min_logvar = nn.Parameter(torch.full((targets,), -10.0))
        # float64, cast where used: sums of squares over long logs lose digits in float32.
        self.register_buffer("input_mean", torch.zeros(inputs, dtype=torch.float64))
        self.register_buffer("input_std", torch.ones(inputs, dtype=torch.float64))
        self.register_buffer("target_mean", torch.zeros(targets, dtype=torch.float64))
        self.register_buffer("target_std", torch.ones(targets, dtype=torch.float64))
        self.register_buffer("learned", torch.ones(targets, dtype=torch.bool))
        self.register_buffer("relative", torch.ones(o))
        self.register_buffer("_elites", torch.arange(self.num_elites))
        self.relative[self.absolute] = 0.0
        plain = [column for column in range(o) if column not in self.angles]
        self.register_buffer("_angle", torch.tensor(self.angles, dtype=torch.long), persistent=False)
        self.register_buffer("_plain", torch.tensor(plain, dtype=torch.long), persistent=False)

    def _initialise(self, rng: torch.Generator) -> None:
        for weight in self.weights:
            std = 1.0 / (2.0 * weight.shape[1] ** 0.5)
            nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std, generator=rng)

    def _inputs(self, obs: Float[Tensor, "b o"], action: Float[Tensor, "b a"]) -> Float[Tensor, "b i"]:
        """Return raw features: observation with angles as cosine and sine, then the action."""
        if not self.angles:
            return torch.cat([obs, action], dim=1)
        angle = obs.index_select(1, self._angle)
        return torch.cat([obs.index_select(1, self._plain), angle.cos(), angle.sin(), action], dim=1)

    def _targets(self, data: Transitions) -> Float[Tensor, "n q"]:
        change = near(data.next_obs, data.obs, self.angles) - self.relative * data.obs
        return torch.cat([change, data.reward[:, None]], dim=1) if self.learn_reward else change

    def _standardised(self, obs: Tensor, action: Tensor) -> Tensor:
        return (self._inputs(obs, action) - self.input_mean.float()) / self.input_std.float()

    def _networks(self, x: Float[Tensor, "e b i"]) -> _Heads:
        last = len(self.weights) - 1
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias, x, weight)
            if layer < last:
                x = silu(x)
        return self._heads(x)

    def _heads(self, out: Float[Tensor, "*e b w"]) -> _Heads:
        q = len(self.max_logvar)
        logvar = self.max_logvar - softplus(self.max_logvar - out[..., q : 2 * q])
        logvar = self.min_logvar + softplus(logvar - self.min_logvar)
        return _Heads(out[..., :q], logvar, out[..., -1] if self.learn_termination else None)

    def _in_units(self, heads: _Heads) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of the targets in environment units; constant columns are exact."""
        scale, shift = self.target_std.float(), self.target_mean.float()
        mean = torch.where(self.learned, heads.mean * scale + shift, shift)
        std = torch.where(self.learned, (0.5 * heads.logvar).exp() * scale, _CONSTANT_STD)
        return mean, std

    def predict(
        self, obs: Float[Tensor, "b o"], action: Float[Tensor, "b a"], memory: Float[Tensor, "b m"] | None = None
    ) -> Prediction:
        """Ask every member. Means and standard deviations come in environment units.

        Raises:
            ValueError: the ensemble has not been fitted.
        """
        self._require_fitted()
        return self._prediction(obs, self._every(obs, action, half=False), memory)

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
        """Ask one member per row. Without noise: the member's mean, and termination where its probability is above 1/2.

        Raises:
            ValueError: the ensemble has not been fitted.
        """
        self._require_fitted()
        frozen = self._frozen_for(obs, action)
        if frozen and obs.shape[0] == 1 and obs.is_cpu:
            return Outcome(*self._sample_one(obs, action, member, rng, noise), memory)
        if frozen:
            answer = frozen.networks.grouped(self._inputs(obs, action), member)
        else:
            heads = self._one_per_row(obs, action, member)
            answer = Answer(*self._in_units(heads), heads.ended)
        return self._outcome(obs, answer, rng, memory, noise)

    def sample_evenly(
        self,
        obs: Float[Tensor, "b o"],
        action: Float[Tensor, "b a"],
        member: Int[Tensor, " b"],
        among: Int[Tensor, " k"],
        rng: torch.Generator,
        memory: Float[Tensor, "b m"] | None = None,
    ) -> Outcome:
        """Draw as `sample` does, of rows that are dealt evenly (up to one row) among the members ``among``.

        Without gradients it never waits for the device, and all shapes are static: for GPUs, where a wait per step
        costs more than the step. On a CPU `sample` is the faster one.

        Raises:
            ValueError: the ensemble has not been fitted.
        """
        self._require_fitted()
        frozen = self._frozen_for(obs, action)
        if not frozen:
            return self.sample(obs, action, member, rng, memory)
        answer = frozen.networks.dealt(self._inputs(obs, action), member, among)
        return self._outcome(obs, answer, rng, memory, noise=True)

    def sample_and_predict(
        self,
        obs: Float[Tensor, "b o"],
        action: Float[Tensor, "b a"],
        member: Int[Tensor, " b"],
        rng: torch.Generator,
        memory: Float[Tensor, "b m"] | None = None,
        *,
        noise: bool = True,
    ) -> tuple[Outcome, Prediction]:
        """Return what `sample` and `predict` say about the same rows, for the price of `predict`.

        The draws are those of `sample`; the layers are computed at ``precision``.

        Raises:
            ValueError: the ensemble has not been fitted.
        """
        self._require_fitted()
        answer = self._every(obs, action, half=True)
        rows = member, torch.arange(len(member), device=member.device)
        own = Answer(answer.mean[rows], answer.std[rows], None if answer.ended is None else answer.ended[rows])
        return self._outcome(obs, own, rng, memory, noise), self._prediction(obs, answer, memory)

    def _every(self, obs: Tensor, action: Tensor, *, half: bool) -> Answer:
        """Ask every member about the targets."""
        if frozen := self._frozen_for(obs, action):
            return frozen.networks.every(self._inputs(obs, action), half)
        heads = self._networks(self._standardised(obs, action).expand(self.num_members, -1, -1))
        return Answer(*self._in_units(heads), heads.ended)

    def _prediction(self, obs: Tensor, answer: Answer, memory: Tensor | None) -> Prediction:
        o = obs.shape[1]
        return Prediction(
            mean=answer.mean[..., :o].addcmul(self.relative, obs),
            std=answer.std[..., :o],
            elites=self.elites,
            reward_mean=answer.mean[..., o] if self.learn_reward else None,
            reward_std=answer.std[..., o] if self.learn_reward else None,
            terminated=None if answer.ended is None else answer.ended.sigmoid(),
            memory=memory,
        )

    def _outcome(
        self, obs: Tensor, answer: Answer, rng: torch.Generator, memory: Tensor | None, noise: bool
    ) -> Outcome:
        """Draw from one member's answer per row."""
        mean, ended = answer.mean, None
        if noise:
            mean = mean.addcmul(answer.std, torch.randn(mean.shape, generator=rng, device=mean.device))
        if answer.ended is not None:
            threshold = torch.rand(len(obs), generator=rng, device=obs.device) if noise else 0.5
            ended = answer.ended.sigmoid() > threshold
        o = obs.shape[1]
        reward = mean[:, o] if self.learn_reward else None
        return Outcome(mean[:, :o].addcmul(self.relative, obs), reward, ended, memory)

    def sample_row(
        self,
        obs: Float32[np.ndarray, " o"],
        action: Float32[np.ndarray, " a"],
        member: int,
        rng: torch.Generator,
        *,
        noise: bool = True,
    ) -> tuple[np.ndarray, float | None, bool | None]:
        """Return next observation, reward and termination of one row: `sample` without the price of tensors.

        On the CPU, in float32, without gradients, with the draws that `sample` makes for one row.

        Raises:
            ValueError: the ensemble has not been fitted.
        """
        self._require_fitted()
        frozen = self._frozen_now()
        parts = [obs, action]
        if self.angles:
            angle = obs[frozen.angle]
            parts = [obs[frozen.plain], np.cos(angle), np.sin(angle), action]
        row, std, logit = frozen.networks.one(np.concatenate(parts), member)
        if noise:
            std *= torch.randn(len(row), generator=rng).numpy()
            row += std
        ended = None
        if logit is not None:
            ended = 0.5 + 0.5 * math.tanh(0.5 * logit) > (torch.rand(1, generator=rng).item() if noise else 0.5)
        o = len(obs)
        next_obs = row[:o]
        next_obs += frozen.relative * obs
        return next_obs, float(row[o]) if self.learn_reward else None, ended

    def _sample_one(
        self, obs: Tensor, action: Tensor, member: Tensor, rng: torch.Generator, noise: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        now, push = obs.detach().numpy()[0], action.detach().numpy()[0]
        next_obs, reward, ended = self.sample_row(now, push, int(member.item()), rng, noise=noise)
        return (
            torch.from_numpy(next_obs[None]),
            None if reward is None else torch.tensor([reward]),
            None if ended is None else torch.tensor([ended]),
        )

    def _one_per_row(self, obs: Tensor, action: Tensor, member: Tensor) -> _Heads:
        """Return what the member of each row says, such that gradients flow."""
        order = member.argsort()
        sizes = torch.bincount(member, minlength=self.num_members).tolist()
        groups = self._standardised(obs, action)[order].split(sizes)
        out = torch.cat([self._one_network(index, x) for index, x in enumerate(groups) if len(x)])
        return self._heads(torch.empty_like(out).index_copy(0, order, out))

    def _one_network(self, index: int, x: Float[Tensor, "b i"]) -> Float[Tensor, "b w"]:
        last = len(self.weights) - 1
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.addmm(bias[index], x, weight[index])
            if layer < last:
                x = silu(x)
        return x

    def fit(
        self,
        data: Transitions,
        *,
        rng: torch.Generator,
        progress: bool = False,
        weights: Float[Tensor, " n"] | None = None,
    ) -> FitReport:
        """Train on all rows of ``data``, from the weights at hand or, the first time, from fresh ones.

        Args:
            data: at least two rows. A first fit builds the model on the data's device; later data moves to the model.
            rng: on this model's device; the same seed and data give the same weights on one machine.
            progress: show a bar with epoch, hold-out error and likelihood.
            weights: positive factors of the rows' losses, see `learneddyn.models.weighting`; only their ratios count.
                They also weigh what early stopping and elites watch, never the reported errors.

        Returns:
            Epochs, seconds, per-epoch history, and of the elites: ``holdout_mse`` (in the units of the targets, scaled
            if ``scale_targets``), ``holdout_nll`` (nats per target), ``train_rows``, ``holdout_rows``.

        Raises:
            DataError: too few rows, NaN or infinite rows, or only constant columns.
            ValueError: the data has other spaces than the model, or weights that are not one positive number per row.
            FloatingPointError: the loss became NaN; the weights before this fit are restored.
        """
        started = time.perf_counter()
        if weights is not None and (len(weights) != len(data) or not bool((weights.isfinite() & (weights > 0)).all())):
            raise ValueError(f"weights must be {len(data)} positive finite numbers, one per row, got {weights}")
        require_pair(data)
        fresh = self.spaces is None
        with attempt(self, data):
            if fresh:
                self._initialise(rng)
            data = data.to(self.max_logvar.device)
            shuffled = torch.randperm(len(data), generator=rng, device=data.device)
            held = max(1, min(int(self.holdout_ratio * len(data)), self.holdout_max))
            weights = None if weights is None else weights.to(data.device)
            self._standardise(data[shuffled[held:]])
            train, test = (
                self._pack(data[rows], None if weights is None else weights[rows])
                for rows in (shuffled[held:], shuffled[:held])
            )
            history = self._train(train, test, rng, progress)
        with torch.no_grad():
            score = self._holdout(test)
        self._elites.copy_(score.watched.argsort()[: self.num_elites])
        metrics = {
            "holdout_mse": float(score.mse[self.elites].mean()),
            "holdout_nll": float(score.nll[self.elites].mean()),
            "train_rows": float(len(data) - held),
            "holdout_rows": float(held),
        }
        return FitReport(len(history), time.perf_counter() - started, metrics, history)

    def _standardise(self, data: Transitions) -> None:
        inputs, targets = self._inputs(data.obs, data.action).double(), self._targets(data).double()
        self.input_mean.copy_(inputs.mean(dim=0))
        self.input_std.copy_(or_one(inputs.std(dim=0, correction=0), inputs))
        span = targets.amax(dim=0) - targets.amin(dim=0)
        magnitude = data.next_obs.abs().amax(dim=0).double()
        if self.learn_reward:
            magnitude = torch.cat([magnitude, data.reward.abs().amax(dim=0, keepdim=True).double()])
        self.learned.copy_(span > _CONSTANT_RANGE * magnitude)
        if not self.learned.any():
            raise DataError("every observation column is constant in this data: there is nothing to learn")
        mean, std = targets.mean(dim=0), or_one(targets.std(dim=0, correction=0), targets)
        unscaled = self.learned & (not self.scale_targets)
        self.target_mean.copy_(torch.where(unscaled, 0.0, mean))
        self.target_std.copy_(torch.where(unscaled, 1.0, std))

    def _pack(self, data: Transitions, weights: Float[Tensor, " n"] | None = None) -> Float[Tensor, "n w"]:
        """Return [standardised inputs | scaled targets | terminated | weight, if any], so that a batch is one gather.

        The weights of these rows are scaled to mean 1.
        """
        targets = (self._targets(data) - self.target_mean.float()) / self.target_std.float()
        columns = [self._standardised(data.obs, data.action), targets, data.terminated.float()[:, None]]
        if weights is not None:
            columns.append((weights / weights.mean()).float()[:, None])
        return torch.cat(columns, dim=1)

    def _train(self, train: Tensor, test: Tensor, rng: torch.Generator, progress: bool) -> list[dict[str, float]]:
        optimizer = self._optimizer()
        rows, device = len(train), train.device
        step = Gradients(
            list(self.weights),
            list(self.biases),
            self.max_logvar,
            self.min_logvar,
            self.learned,
            half=self.training_precision == "bf16",
        )
        if self.bootstrap:
            index = torch.randint(rows, (self.num_members, rows), generator=rng, device=device)
        else:
            index = torch.arange(rows, device=device).expand(self.num_members, -1)
        with torch.no_grad():
            best = self._holdout(test).watched
        kept = [tensor.detach().clone() for tensor in self._member_tensors()]
        history: list[dict[str, float]] = []
        stale = 0
        with tqdm(desc="fit ensemble", unit="epoch", disable=None if progress else True, leave=False) as bar:
            while stale <= self.patience and (self.max_epochs is None or len(history) < self.max_epochs):
                index = self._shuffled(index, rng)
                loss = torch.zeros((), device=device)
                for batch in index.split(self.batch_size, dim=1):
                    picked = train.index_select(0, batch.flatten()).view(*batch.shape, -1)
                    x, target, ended = self._unpack(picked)
                    value = step(x, target, ended if self.learn_termination else None, self._weight(picked))
                    optimizer.step()
                    loss += value * (batch.shape[1] / rows)
                with torch.no_grad():
                    score = self._holdout(test)
                if not bool(loss.isfinite() & score.watched.isfinite().all()):
                    raise FloatingPointError(
                        f"training diverged in epoch {len(history) + 1} (loss {float(loss)}): lower learning_rate "
                        f"(now {self.learning_rate}) or set scale_targets=True; the weights before fit are kept"
                    )
                better = (best - score.watched) / best.clamp_min(1e-30) > self.improvement
                best = torch.where(better, score.watched, best)
                for tensor, good in zip(self._member_tensors(), kept, strict=True):
                    good[better] = tensor.detach()[better]
                stale = 0 if bool(better.any()) else stale + 1
                entry = {"loss": float(loss), "holdout_mse": float(score.mse.mean()), "nll": float(score.nll.mean())}
                history.append(entry)
                bar.update()
                bar.set_postfix(entry)
        with torch.no_grad():
            for tensor, good in zip(self._member_tensors(), kept, strict=True):
                tensor.copy_(good)
        return history

    def _optimizer(self) -> torch.optim.Adam:
        groups: list[dict[str, Any]] = [
            {"params": [weight], "weight_decay": decay}
            for weight, decay in zip(self.weights, self.weight_decay, strict=True)
        ]
        groups.append({"params": [*self.biases, self.max_logvar, self.min_logvar]})
        return torch.optim.Adam(groups, lr=self.learning_rate, fused=True)

    def _shuffled(self, index: Int[Tensor, "e n"], rng: torch.Generator) -> Int[Tensor, "e n"]:
        if not self.bootstrap:
            return index[:, torch.randperm(index.shape[1], generator=rng, device=index.device)]
        return index.gather(1, torch.rand(index.shape, generator=rng, device=index.device).argsort(dim=1))

    def _loss(self, batch: Float[Tensor, "e b w"]) -> Float[Tensor, ""]:
        """Mean over rows and targets, sum over members, plus the penalty that keeps the variance bounds tight.

        The definition of what `fit` minimises; `fit` itself takes the gradients from `learneddyn.models.gradients`.
        """
        x, target, ended = self._unpack(batch)
        heads = self._networks(x)
        inverse = (-heads.logvar).exp()
        nll = (((heads.mean - target).square() * inverse + heads.logvar) * self.learned).sum(dim=2)
        weight = self._weight(batch)
        loss = (nll if weight is None else nll * weight).mean(dim=1).sum() / self.learned.sum()
        loss = loss + TIGHTNESS * ((self.max_logvar - self.min_logvar) * self.learned).sum()
        if heads.ended is not None:
            entropy = binary_cross_entropy_with_logits(heads.ended, ended, weight=weight, reduction="none")
            loss = loss + entropy.mean(dim=1).sum()
        return loss

    def _holdout(self, test: Float[Tensor, "n w"]) -> _Score:
        """Return every member's errors on the held-out rows."""
        x, target, ended = self._unpack(test.expand(self.num_members, -1, -1))
        heads = self._networks(x)
        square = (heads.mean - target).square()
        nll = 0.5 * (square * (-heads.logvar).exp() + heads.logvar + math.log(2 * math.pi))
        mse, nll = (value[..., self.learned].mean(dim=(1, 2)) for value in (square, nll))
        weight = self._weight(test)
        watched = mse if weight is None else (square[..., self.learned].mean(dim=2) * weight).mean(dim=1)
        if heads.ended is None:
            return _Score(mse, nll, watched)
        weight = None if weight is None else weight.expand_as(ended)
        entropy = binary_cross_entropy_with_logits(heads.ended, ended, weight=weight, reduction="none").mean(dim=1)
        return _Score(mse, nll, watched * entropy.clamp_min(_ENTROPY_FLOOR))

    def _unpack(self, batch: Float[Tensor, "e b w"]) -> tuple[Tensor, Tensor, Tensor]:
        i, q = len(self.input_mean), len(self.max_logvar)
        return batch[..., :i], batch[..., i : i + q], batch[..., i + q]

    def _weight(self, batch: Float[Tensor, "*e b w"]) -> Float[Tensor, "*e b"] | None:
        last = len(self.input_mean) + len(self.max_logvar) + 1
        return batch[..., last] if batch.shape[-1] > last else None

    def _frozen_for(self, obs: Tensor, action: Tensor) -> _Frozen | None:
        """Return a copy of the networks as they are now, or None where a gradient may be asked or a graph traced."""
        if torch.compiler.is_compiling():
            return None
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (obs, action, *self.parameters())):
            return None
        return self._frozen_now()

    def _frozen_now(self) -> _Frozen:
        """Return a copy of the networks as they are now, the last one if nothing has changed."""
        # Through the dictionaries: this runs at every step, and modules take a microsecond per attribute.
        layers = self.weights._parameters.values(), self.biases._parameters.values()
        tensors: list[Any] = [*layers[0], *layers[1], *self._parameters.values(), *self._buffers.values()]
        # PyTorch counts the in-place writes of a tensor; a swapped tensor, device or storage changes the address, as
        # long as the old memory is held.
        versions = [tensor._version for tensor in tensors]
        addresses = [tensor.data_ptr() for tensor in tensors]
        frozen = self._frozen
        if frozen is None or versions != frozen.versions or addresses != frozen.addresses:
            frozen = self._frozen = _Frozen(
                self._freeze(),
                versions,
                addresses,
                [tensor.detach() for tensor in tensors],
                *(getattr(self, name).cpu().numpy() for name in ("relative", "_plain", "_angle")),
            )
            _FROZEN.add(self)
        return frozen

    def _freeze(self) -> Snapshot:
        with torch.inference_mode(False), torch.no_grad():
            parts = Parts(
                weights=list(self.weights),
                biases=list(self.biases),
                max_logvar=self.max_logvar,
                min_logvar=self.min_logvar,
                input_mean=self.input_mean.float(),
                input_std=self.input_std.float(),
                target_mean=self.target_mean.float(),
                target_scale=self.target_std.float() * self.learned,
                least_std=_CONSTANT_STD * (~self.learned),
            )
            return Snapshot(parts, half=self.precision == "bf16")

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_frozen": None}

    def _member_tensors(self) -> list[Tensor]:
        return [*self.weights, *self.biases]

    def _require_fitted(self) -> None:
        if self.spaces is None:
            raise ValueError("this ensemble has not been fitted: call fit(data, rng=...) or ProbabilisticEnsemble.load")

    # Declared for type checkers; `_build` registers them.
    input_mean: Tensor
    input_std: Tensor
    target_mean: Tensor
    target_std: Tensor
    learned: Bool[Tensor, " q"]
    relative: Tensor
    _elites: Tensor
    _angle: Tensor
    _plain: Tensor


_FROZEN: WeakSet[ProbabilisticEnsemble] = WeakSet()
"""Ensembles that hold a copy of their networks."""


def _thaw(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Drop the copies of networks that a fused optimiser has just changed: it leaves PyTorch's counters alone."""
    fused = [group for group in optimizer.param_groups if group.get("fused")]
    changed = {id(parameter) for group in fused for parameter in group["params"]}
    for model in list(_FROZEN) if changed else ():
        if any(id(parameter) in changed for parameter in model.parameters()):
            model._frozen = None


register_optimizer_step_post_hook(_thaw)


def _decay_per_layer(weight_decay: Sequence[float] | float | None, layers: int) -> list[float]:
    if weight_decay is None:
        return [*[2.5e-5, 5e-5, *[7.5e-5] * (layers - 3)][: layers - 1], 1e-4]
    return [float(weight_decay)] * layers if isinstance(weight_decay, int | float) else [*map(float, weight_decay)]
