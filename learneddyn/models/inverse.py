"""Inverse dynamics: which action led from one state to the next. It labels logs that hold states only.

Source: Zheng, Henaff, Amos, Grover, "Semi-Supervised Offline Reinforcement Learning with Action-Free Trajectories",
2023: p(a_t | s_{t-k}, ..., s_t, s_{t+1}). With k = 0 it is the classic model of one transition; past states help where
one observation does not hold the whole state (velocities that are not measured), or where several policies acted.
"""

import math
import time
from collections.abc import Sequence
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from tqdm import tqdm

from learneddyn.core import DataError, Transitions
from learneddyn.models.attempt import attempt
from learneddyn.models.base import AbstractModel, FitReport
from learneddyn.models.nets import BatchedMLP
from learneddyn.models.windows import elapsed, linked
from learneddyn.spaces import Spaces

LOG_STD = (-5.0, 2.0)
"""Bounds of the log standard deviation before the tanh."""
_NODES = 31  # of the Gauss-Hermite quadrature that takes moments through the tanh
_CHUNK = 16_384


class ActionBelief(NamedTuple):
    """What a model believes about the actions behind a log, in environment units, inside the box of actions.

    ``std`` is the standard deviation of the mixture of all members: their noise and their disagreement.
    """

    mean: Float[Tensor, "n a"]
    std: Float[Tensor, "n a"]


class InverseDynamics(AbstractModel):
    """E pairs of networks map a window of states to a Gaussian before a tanh, one network its mean, one its deviation.

    Networks are ReLU with dropout and orthogonal start weights, trained by negative log-likelihood. A share of the
    labelled *trajectories* is held out; every member ends with the weights that were best on it. The source's networks
    are 2 x 1024 wide, its batches 1024 rows, its rate 1e-4.

    Deviations: a belief's mean and deviation are those of the action itself, after the tanh (the source labels with
    the tanh of the mean, which is the median); a window enters as s_t, the change to s_{t+1} and, for the past, how
    much each change differs from the one before, which is the same information on the scale that actions act on (the
    second difference of a position whose velocity is not seen is a small part of its changes); actions are kept away
    from the ends of their box, whose inverse tanh is infinite, by ``bound``.

    Args:
        past: k, past states in a window besides s_t. Before an episode's first row, and before the first one after
            rows that were dropped, a slot holds 0, the mean.
        num_members: pairs of networks E; each starts from its own weights and sees its own batches.
        hidden: widths of the hidden layers.
        dropout: share of hidden units dropped in training.
        learning_rate: of Adam.
        batch_size: rows per member and update.
        holdout_ratio: share of the labelled trajectories held out, at least one.
        updates: upper bound of updates.
        check_every: updates between looks at the held-out trajectories.
        patience: looks without a gain of any member before training stops.
        bound: actions are clipped to this share of their box for training.

    Raises:
        ValueError: an argument outside its range (names it, the value, what is allowed).
    """

    def __init__(
        self,
        past: int = 1,
        num_members: int = 1,
        hidden: Sequence[int] = (256, 256),
        dropout: float = 0.1,
        learning_rate: float = 3e-4,
        batch_size: int = 256,
        holdout_ratio: float = 0.1,
        updates: int = 20_000,
        check_every: int = 250,
        patience: int = 10,
        bound: float = 0.999,
    ) -> None:
        super().__init__()
        for name, ok, value, allowed in (
            ("past", past >= 0, past, "at least 0"),
            ("num_members", num_members >= 1, num_members, "at least 1"),
            ("hidden", all(width >= 1 for width in hidden), hidden, "positive widths"),
            ("dropout", 0 <= dropout < 1, dropout, "in [0, 1)"),
            ("batch_size", batch_size >= 1, batch_size, "at least 1"),
            ("holdout_ratio", 0 < holdout_ratio < 1, holdout_ratio, "between 0 and 1"),
            ("updates", updates >= 1, updates, "at least 1"),
            ("check_every", check_every >= 1, check_every, "at least 1"),
            ("patience", patience >= 1, patience, "at least 1"),
            ("bound", 0 < bound < 1, bound, "between 0 and 1"),
        ):
            if not ok:
                raise ValueError(f"{name} must be {allowed}, got {value!r}")
        self.past, self.num_members, self.hidden, self.dropout = past, num_members, list(hidden), dropout
        self.learning_rate, self.batch_size, self.holdout_ratio = learning_rate, batch_size, holdout_ratio
        self.updates, self.check_every, self.patience, self.bound = updates, check_every, patience, bound

    def _build(self, spaces: Spaces) -> None:
        box = spaces.action
        if not isinstance(box, gym.spaces.Box) or not box.is_bounded("both") or bool((box.low == box.high).any()):
            raise ValueError(f"inverse dynamics need a bounded Box as action space, got {box}")
        o, a, nets = spaces.obs_dim, spaces.action_dim, 2 * self.num_members
        widths = [(self.past + 2) * o, *self.hidden, a]
        self.nets = BatchedMLP(nets, widths, rng=torch.Generator())
        for part in ("obs", "change", "bend"):
            self.register_buffer(f"{part}_mean", torch.zeros(o))
            self.register_buffer(f"{part}_scale", torch.ones(o))
        for name, side in (("low", box.low), ("high", box.high)):
            self.register_buffer(name, torch.as_tensor(np.asarray(side, np.float32).reshape(-1)))
        nodes, weights = np.polynomial.hermite_e.hermegauss(_NODES)
        self.register_buffer("nodes", torch.as_tensor(nodes, dtype=torch.float32), persistent=False)
        shares = torch.as_tensor(weights / weights.sum(), dtype=torch.float32)
        self.register_buffer("shares", shares, persistent=False)

    def fit(self, data: Transitions, *, rng: torch.Generator, progress: bool = False) -> FitReport:
        """Learn from the rows that hold an action; those that hold none (see `Transitions.labelled`) give scales only.

        A second call goes on from the weights at hand, with fresh moments of Adam and a new split.

        Returns:
            ``holdout_nll`` (nats, actions scaled to [-1, 1], mean over rows and members), ``holdout_r2`` (share of the
            held-out actions' variance that the mixture's mean explains, mean over the columns that vary),
            ``train_rows``, ``holdout_rows``; an epoch is ``check_every`` updates.

        Raises:
            DataError: no row with an action, labels in fewer than two trajectories, NaN or infinite rows, or actions
                outside their box.
            ValueError: the data has other spaces than the model, or no bounded Box of actions.
            FloatingPointError: the loss is not finite; the model is left as it was.
        """
        started = time.perf_counter()
        data.check(actions=False)
        labelled = data.labelled()
        episodes = data.episode[labelled].unique()
        if len(episodes) < 2:
            raise DataError(
                f"inverse dynamics learn from actions in at least two trajectories, one of them held out; got "
                f"{int(labelled.sum())} rows with actions in {len(episodes)} of {len(data.episode.unique())}"
            )
        fresh = self.spaces is None
        with attempt(self, data):
            data = data.to(self.low.device)
            actions = self._scaled(data.action[labelled])
            if fresh:
                for weight, bias in zip(self.nets.weights, self.nets.biases, strict=True):
                    nn.init.zeros_(bias)
                    for net in weight:
                        nn.init.orthogonal_(net, generator=rng)
            self._take_scales(data)
            held = max(1, round(self.holdout_ratio * len(episodes)))
            out = episodes[torch.randperm(len(episodes), generator=rng, device=rng.device)[:held]]
            held_out = torch.isin(data.episode[labelled], out)
            windows = self._windows(data)[labelled]
            train, test = ((windows[rows], actions[rows]) for rows in (~held_out, held_out))
            history = self._train(*train, *test, rng, progress)
        belief = self._belief(windows[held_out])
        metrics = {
            "holdout_nll": float(self._nll(windows[held_out], actions[held_out]).mean()),
            "holdout_r2": r_squared(belief.mean, data.action[labelled][held_out]),
            "train_rows": float((~held_out).sum()),
            "holdout_rows": float(held_out.sum()),
        }
        return FitReport(len(history), time.perf_counter() - started, metrics, history)

    def predict(self, data: Transitions) -> ActionBelief:
        """Return the belief about the action of every row; actions that the data may hold are not looked at.

        The last row of an episode has its successor in ``next_obs``, as every other.

        Raises:
            ValueError: the model has not been fitted, or the data has other spaces.
            DataError: no rows, or NaN or infinite states.
        """
        if self.spaces is None:
            raise ValueError("this InverseDynamics has not been fitted: call fit(data, rng=...) or load one")
        if data.spaces is not None and data.spaces != self.spaces:
            raise ValueError(f"this model was fitted on {self.spaces}, the data has {data.spaces}")
        data.check(actions=False)
        return self._belief(self._windows(data.to(self.low.device)))

    def _scaled(self, action: Float[Tensor, "n a"]) -> Float[Tensor, "n a"]:
        """Return actions in [-bound, bound]."""
        scaled = (action - self.low) / (self.high - self.low) * 2 - 1
        outside = (scaled.abs() > 1 + 1e-5).any(1)
        if bool(outside.any()):
            raise DataError(
                f"{int(outside.sum())} of {len(action)} actions lie outside their box; store the action that was "
                "executed, or clip it"
            )
        return scaled.clamp(-self.bound, self.bound)

    def _take_scales(self, data: Transitions) -> None:
        """Take mean and deviation of states, changes and their differences; columns that only round get scale 1."""
        rounding = 1e-6 * data.obs.abs().amax(0).double()
        change = data.next_obs.double() - data.obs.double()
        bend = (change[1:] - change[:-1])[linked(data)[1:]]
        for name, values in (("obs", data.obs.double()), ("change", change), ("bend", bend)):
            if len(values):
                spread = values.std(0, correction=0)
                getattr(self, f"{name}_mean").copy_(values.mean(0))
                getattr(self, f"{name}_scale").copy_(torch.where(spread > rounding, spread, torch.ones_like(spread)))

    def _windows(self, data: Transitions) -> Float[Tensor, "n w"]:
        """Return inputs, all standardised: s_t, the change after it, and by how much changes differ, latest first."""
        position, row = elapsed(data), torch.arange(len(data), device=data.device)
        change = data.next_obs - data.obs
        slots = [(data.obs - self.obs_mean) / self.obs_scale, (change - self.change_mean) / self.change_scale]
        for back in range(1, self.past + 1):
            before, after = (change[(row - lag).clamp_min(0)] for lag in (back, back - 1))
            bend = (after - before - self.bend_mean) / self.bend_scale
            # 0 is padded after standardising: the mean, not the value that happens to be 0 in the plant's units.
            slots.append(bend * (position >= back)[:, None])
        return torch.cat(slots, dim=1)

    def _networks(
        self, x: Float[Tensor, "*e b w"], rng: torch.Generator | None = None
    ) -> tuple[Float[Tensor, "e b a"], Float[Tensor, "e b a"]]:
        """Return mean and log deviation before the tanh; units are dropped where ``rng`` is given."""

        def dropped(hidden: Tensor) -> Tensor:
            return hidden * torch.empty_like(hidden).bernoulli_(1 - self.dropout, generator=rng) / (1 - self.dropout)

        members, (low, high) = self.num_members, LOG_STD
        x = torch.cat((x, x)) if x.ndim == 3 else x
        x = self.nets(x, dropped if rng is not None and self.dropout else None)
        return x[:members], low + 0.5 * (high - low) * (x[members:].tanh() + 1)

    def _likelihood(
        self, mean: Float[Tensor, "e b a"], log_std: Float[Tensor, "e b a"], action: Float[Tensor, "*e b a"]
    ) -> Float[Tensor, " e"]:
        """Return every member's mean negative log density of actions in [-1, 1]."""
        z = (action.atanh() - mean) / log_std.exp()
        squash = (1 - action.square()).log()
        nll = 0.5 * z.square() + log_std + 0.5 * math.log(2 * math.pi) + squash
        return nll.sum(dim=2).mean(dim=1)

    @torch.no_grad()
    def _nll(self, windows: Float[Tensor, "n w"], action: Float[Tensor, "n a"]) -> Float[Tensor, " e"]:
        parts = zip(windows.split(_CHUNK), action.split(_CHUNK), strict=True)
        sums = [self._likelihood(*self._networks(x), a) * len(x) for x, a in parts]
        return torch.stack(sums).sum(0) / len(windows)

    @torch.no_grad()
    def _belief(self, windows: Float[Tensor, "n w"]) -> ActionBelief:
        half = (self.high - self.low) / 2
        parts = []
        for x in windows.split(_CHUNK):
            mean, log_std = self._networks(x)
            squashed = (mean[..., None] + log_std.exp()[..., None] * self.nodes).tanh()
            first = (squashed @ self.shares).mean(0)
            second = (squashed.square() @ self.shares).mean(0)
            parts.append(ActionBelief(first, (second - first.square()).clamp_min(0).sqrt()))
        mean, std = (torch.cat(column) for column in zip(*parts, strict=True))
        return ActionBelief(self.low + half * (mean + 1), half * std)

    def _train(
        self,
        windows: Float[Tensor, "n w"],
        action: Float[Tensor, "n a"],
        held_windows: Float[Tensor, "h w"],
        held_action: Float[Tensor, "h a"],
        rng: torch.Generator,
        progress: bool,
    ) -> list[dict[str, float]]:
        """Descend until no member gains any more, and leave every member with its best weights."""
        tensors: list[Tensor] = [*self.nets.parameters()]
        optimizer = torch.optim.Adam(tensors, lr=self.learning_rate)
        least = self._nll(held_windows, held_action)
        best = [tensor.detach().clone() for tensor in tensors]
        history: list[dict[str, float]] = []
        waited, shape = 0, (self.num_members, self.batch_size)
        bar = tqdm(range(1, self.updates + 1), desc="fit", unit="update", disable=not progress)
        for update in bar:
            rows = torch.randint(len(windows), shape, generator=rng, device=windows.device)
            loss = self._likelihood(*self._networks(windows[rows], rng), action[rows]).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if update % self.check_every and update < self.updates:
                continue
            now = self._nll(held_windows, held_action)
            if not bool(now.isfinite().all()):
                raise FloatingPointError(f"the held-out loss is not finite after {update} updates: lower learning_rate")
            history.append({"updates": float(update), "holdout_nll": float(now.mean())})
            better = now < least
            self._keep(best, tensors, better)
            least = torch.where(better, now, least)
            waited = 0 if bool(better.any()) else waited + 1
            if waited == self.patience:
                break
        bar.close()
        with torch.no_grad():
            for tensor, kept in zip(tensors, best, strict=True):
                tensor.copy_(kept)
        return history

    def _keep(self, best: list[Tensor], tensors: list[Tensor], better: Bool[Tensor, " e"]) -> None:
        both: Int[Tensor, " k"] = better.repeat(2).nonzero().flatten()
        for kept, tensor in zip(best, tensors, strict=True):
            kept[both] = tensor.detach()[both]

    # Declared for type checkers; `_build` registers them.
    obs_mean: Tensor
    obs_scale: Tensor
    change_mean: Tensor
    change_scale: Tensor
    bend_mean: Tensor
    bend_scale: Tensor
    low: Tensor
    high: Tensor
    nodes: Tensor
    shares: Tensor


def r_squared(predicted: Float[Tensor, "n a"], true: Float[Tensor, "n a"]) -> float:
    """Return ``1 - mean squared error / variance``, mean over the columns of ``true`` that vary; NaN if none does."""
    true = true.double()
    variance = true.var(0, correction=0)
    error = (predicted.double() - true).square().mean(0)
    varying = variance > 1e-12
    return float((1 - error[varying] / variance[varying]).mean()) if bool(varying.any()) else math.nan
