"""Models of a sequence of tasks: systems whose dynamics differ, met one after the other.

A continual model makes, for every task, all tensors of one and the same small network; `AbstractContinual.on` hands
them out as a `ProbabilisticEnsemble` of one network, which drops into worlds, planners, environments and files. How a
task's tensors come about, and what keeps earlier tasks in place, is what the methods differ in:

    HyperCRL (`learneddyn.models.hypercrl`)     generated from the task's embedding by a hypernetwork
    `MultiHead()`                               fine-tuning: shared layers, a last layer per task
    `MultiHead(shared_layers=0)`                single: one network per task
    `MultiHead(penalty="ewc")`                  elastic weight consolidation
    `MultiHead(penalty="si")`                   synaptic intelligence
    `MultiHead(memory=30)`                      coreset: 30 rows of every earlier task are rehearsed
    `MultiHead(memory=None)`                    multi-task: all rows of every earlier task are rehearsed
"""

import math
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call
from tqdm import trange

from learneddyn.core import Transitions
from learneddyn.models.attempt import attempt, require_pair
from learneddyn.models.base import AbstractModel, FitReport
from learneddyn.models.ensemble import ProbabilisticEnsemble
from learneddyn.spaces import Spaces

NORMALISERS = ("input_mean", "input_std", "target_mean", "target_std", "learned")
"""Tensors of the network that follow from a task's data."""
BOUNDS = ("max_logvar", "min_logvar")
"""Tensors of the network that a Gaussian head trains for each task."""
_FAR = 40.0
"""Bounds of the log-variance so wide that, in float32, they leave a constant one as it is."""

Step = Callable[[Float[Tensor, "b r"]], Float[Tensor, ""]]
"""One update of a model from a batch of packed rows of the current task; returns the task's loss."""


class TaskState(nn.Module):
    """What belongs to one task alone: a trained vector, the variance, the normalisers, and what a method adds.

    Args:
        vector: the task's own layers, or its embedding.
        network: gives the shapes of the rest.
        gaussian: whether the bounds of the log-variance are trained; otherwise the log-variance is ``logvar``.
    """

    def __init__(self, vector: Float[Tensor, " v"], network: ProbabilisticEnsemble, gaussian: bool) -> None:
        super().__init__()
        self.vector = nn.Parameter(vector)
        for name, far in zip(BOUNDS, (_FAR, -_FAR), strict=True):
            bound = getattr(network, name).detach()
            value = bound.clone() if gaussian else torch.full_like(bound, far)
            setattr(self, name, nn.Parameter(value, requires_grad=gaussian))
        self.register_buffer("logvar", torch.zeros_like(self.max_logvar))
        for name in NORMALISERS:
            self.register_buffer(name, getattr(network, name).clone())

    def trained(self) -> Iterator[nn.Parameter]:
        """Return what training on this task changes, besides what tasks share."""
        return (parameter for parameter in self.parameters() if parameter.requires_grad)

    # Declared for type checkers; `__init__` and the methods register them.
    max_logvar: nn.Parameter
    min_logvar: nn.Parameter
    logvar: Tensor
    importance: Tensor
    anchor: Tensor
    path: Tensor
    origin: Tensor
    rows: Tensor


class AbstractContinual(AbstractModel):
    """The dynamics of a sequence of tasks, learned one after the other; earlier data is not asked for again.

    `fit_task` begins a task or goes on with the latest one; `on` hands out the dynamics of any task so far. Every task
    has normalisers of its own, from its latest data. Subclasses implement `_build_shared`, `_initialise`, `_new_task`,
    `_weights` and `_steps`.

    All networks have SiLU between their layers, as `ProbabilisticEnsemble` has.

    Args:
        hidden: widths of the dynamics network's hidden layers.
        head: "gaussian" (mean and variance by likelihood) or "deterministic" (mean by squared error; the variance is
            the one of the held-out rows).
        angles: observation columns in radians that enter the network as cosine and sine.
        learn_reward: add a reward head.
        learn_termination: add a termination head.
        updates: of one call of `fit_task`.
        batch_size: rows per update.
        learning_rate: of Adam, whose moments start afresh at every call.
        holdout_ratio: share of the rows held out, to measure the error.

    Raises:
        ValueError: an argument outside its range (names it, the value, what is allowed).
    """

    def __init__(
        self,
        hidden: Sequence[int],
        head: str,
        angles: Sequence[int],
        learn_reward: bool,
        learn_termination: bool,
        updates: int,
        batch_size: int,
        learning_rate: float,
        holdout_ratio: float,
    ) -> None:
        super().__init__()
        check_arguments(
            ("hidden", all(width >= 1 for width in hidden), hidden, "positive widths"),
            ("head", head in ("gaussian", "deterministic"), head, "'gaussian' or 'deterministic'"),
            ("updates", updates >= 1, updates, "at least 1"),
            ("batch_size", batch_size >= 1, batch_size, "at least 1"),
            ("learning_rate", learning_rate > 0, learning_rate, "positive"),
            ("holdout_ratio", 0 < holdout_ratio < 1, holdout_ratio, "between 0 and 1"),
        )
        self.hidden, self.head, self.angles = list(hidden), head, list(angles)
        self.learn_reward, self.learn_termination = learn_reward, learn_termination
        self.updates, self.batch_size, self.learning_rate = updates, batch_size, learning_rate
        self.holdout_ratio = holdout_ratio
        self._tasks = nn.ModuleList()

    @property
    def num_tasks(self) -> int:
        """Tasks begun so far."""
        return len(self._tasks)

    @abstractmethod
    def _build_shared(self) -> None:
        """Create what tasks share, once `weight_sizes` is known."""

    @abstractmethod
    def _initialise(self, rng: torch.Generator) -> None:
        """Draw the initial values of what tasks share."""

    @abstractmethod
    def _new_task(self, rng: torch.Generator | None) -> TaskState:
        """Return the state of a task that begins, with zeros where there is no ``rng`` to draw from."""

    @abstractmethod
    def _weights(self, task: int) -> Float[Tensor, " w"]:
        """Return the flat weights of a task's network: layer after layer, each one's matrix, then its bias."""

    @abstractmethod
    def _steps(self, task: int, rng: torch.Generator) -> Step:
        """Return the update that a call of `fit_task` repeats, its optimiser made."""

    def _finish(self, task: int, rows: Float[Tensor, "n r"], rng: torch.Generator) -> None:
        """Keep what later tasks need of this one; ``rows`` are the packed rows it was trained on."""

    def fit(self, data: Transitions, *, rng: torch.Generator, progress: bool = False) -> FitReport:
        """Go on with the latest task, or begin the first; see `fit_task`."""
        return self.fit_task(max(0, self.num_tasks - 1), data, rng=rng, progress=progress)

    def fit_task(self, task: int, data: Transitions, *, rng: torch.Generator, progress: bool = False) -> FitReport:
        """Learn from the data of a task: the latest one, or the next, whose beginning closes all before it.

        Args:
            task: tasks count from 0.
            data: of this task alone, at least two rows. The first fit builds the model on the data's device; later
                data moves to the model.
            rng: on the model's device.
            progress: show a bar.

        Returns:
            ``holdout_mse`` (of targets in standard deviations of the training rows), ``holdout_nll`` (nats per
            target), ``train_rows``, ``holdout_rows``.

        Raises:
            DataError: too few rows, NaN or infinite rows, or only constant columns; the model is left as it was.
            ValueError: the data has other spaces than the model, or a task that is closed or too far ahead.
            FloatingPointError: training diverged; the model is left as it was.
        """
        started = time.perf_counter()
        require_pair(data)
        latest = self.num_tasks - 1
        if not max(0, latest) <= task <= latest + 1:
            allowed = "0" if latest < 0 else f"{latest} (go on with the latest) or {latest + 1} (begin the next)"
            raise ValueError(f"task must be {allowed}, got {task}: earlier tasks are closed")
        with attempt(self, data):
            metrics = self._fitted(task, data.to(self.device), rng, progress)
        epochs = math.ceil(self.updates * self.batch_size / metrics["train_rows"])
        return FitReport(epochs, time.perf_counter() - started, metrics, [metrics])

    @torch.no_grad()
    def on(self, task: int) -> ProbabilisticEnsemble:
        """Return a task's dynamics as they are now: a copy, which later learning does not change.

        Raises:
            ValueError: the task has not begun.
        """
        if not 0 <= task < self.num_tasks:
            raise ValueError(f"task must be one of the {self.num_tasks} that have begun, 0 first, got {task}")
        assert self.spaces is not None
        network = self._network(self.spaces).to(self.device)
        network.spaces, network.source = self.spaces, self.source
        network.load_state_dict(network.state_dict() | self._tensors(task, self._weights(task)))
        return network

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.parameters()).device

    def state(self, task: int) -> TaskState:
        """Return what belongs to one task alone."""
        state = self._tasks[task]
        assert isinstance(state, TaskState)
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load tensors; tasks come and go, and a task's memory grows and shrinks, as these tensors have it."""
        own = [name.split(".") for name in state_dict if name.startswith("_tasks.")]
        count = max((int(parts[1]) + 1 for parts in own), default=0)
        del self._tasks[count:]
        while self.num_tasks < count:
            self._tasks.append(self._new_task(None).to(self.device))
        for _, task, name in own:
            if name == "rows":
                self.state(int(task)).rows = torch.empty_like(state_dict[f"_tasks.{task}.rows"], device=self.device)
        return super().load_state_dict(state_dict, strict, assign)

    def _build(self, spaces: Spaces) -> None:
        network = self._network(spaces)
        widths = [network.weights[0].shape[1], *(bias.shape[2] for bias in network.biases)]
        if self.head == "deterministic":
            widths[-1] -= len(network.max_logvar)
        self._shapes = list(pairwise(widths))
        self.weight_sizes = [size for i, j in self._shapes for size in (i * j, j)]
        self._tasks = nn.ModuleList()
        # In a list, because its tensors are replaced by those of a task and are no part of this model.
        self._template = [_Objective(network)]
        self._build_shared()

    def _network(self, spaces: Spaces) -> ProbabilisticEnsemble:
        """Return a network of the tasks' form, its tensors to be filled."""
        network = ProbabilisticEnsemble(
            1,
            1,
            self.hidden,
            self.learn_reward,
            self.learn_termination,
            self.angles,
            scale_targets=True,
            learning_rate=self.learning_rate,
            weight_decay=0.0,
            batch_size=self.batch_size,
            holdout_ratio=self.holdout_ratio,
        )
        network._build(spaces)
        return network

    def _fitted(self, task: int, data: Transitions, rng: torch.Generator, progress: bool) -> dict[str, float]:
        """Train on a task and return the errors on the held-out rows."""
        network = self._template[0].to(self.device).network
        shuffled = torch.randperm(len(data), generator=rng, device=data.device)
        held = max(1, int(self.holdout_ratio * len(data)))
        network._standardise(data[shuffled[held:]])
        if task == self.num_tasks:
            if task == 0:
                self._initialise(rng)
            self._tasks.append(self._new_task(rng))
        for name in NORMALISERS:
            getattr(self.state(task), name).copy_(getattr(network, name))
        train, test = (network._pack(data[rows]) for rows in (shuffled[held:], shuffled[:held]))
        step, loss = self._steps(task, rng), torch.zeros(())
        for _ in trange(self.updates, desc=f"fit task {task}", disable=None if progress else True, leave=False):
            chosen = torch.randint(len(train), (self.batch_size,), generator=rng, device=train.device)
            loss = step(train.index_select(0, chosen))
        if not bool(loss.isfinite()):
            raise FloatingPointError(
                f"training on task {task} diverged: lower learning_rate (now {self.learning_rate})"
            )
        self._finish(task, train, rng)
        return self._measured(task, test) | {"train_rows": float(len(train)), "holdout_rows": float(held)}

    @torch.no_grad()
    def _measured(self, task: int, test: Float[Tensor, "n r"]) -> dict[str, float]:
        """Return the errors on held-out rows, which a deterministic head takes for its variance."""
        network = self.on(task)
        if self.head == "deterministic":
            x, target, _ = network._unpack(test[None])
            error = (network._networks(x).mean[0] - target[0]).square().mean(dim=0)
            self.state(task).logvar.copy_(error.clamp_min(1e-12).log())
            network = self.on(task)
        score = network._holdout(test)
        return {"holdout_mse": float(score.mse.mean()), "holdout_nll": float(score.nll.mean())}

    def _loss(self, task: int, weights: Float[Tensor, " w"], batch: Float[Tensor, "b r"]) -> Float[Tensor, ""]:
        """Return a task's loss if its network had these flat weights: mean over rows and targets.

        Of a deterministic head it is the squared error, up to a constant.
        """
        tensors = self._tensors(task, weights, logvar=torch.zeros_like(self.state(task).logvar))
        named = {f"network.{name}": tensor for name, tensor in tensors.items()}
        return functional_call(self._template[0], named, (batch[None],))

    def _tensors(
        self, task: int, weights: Float[Tensor, " w"], logvar: Float[Tensor, " q"] | None = None
    ) -> dict[str, Tensor]:
        """Return the tensors of a task's network by their names there.

        A deterministic head has no columns for the log-variance: constant ones are put in their place.
        """
        state = self.state(task)
        tensors = {name: getattr(state, name) for name in NORMALISERS + BOUNDS}
        parts, last = weights.split(self.weight_sizes), len(self._shapes) - 1
        for layer, (i, j) in enumerate(self._shapes):
            weight, bias = parts[2 * layer].view(1, i, j), parts[2 * layer + 1].view(1, 1, j)
            if layer == last and self.head == "deterministic":
                constant = (state.logvar if logvar is None else logvar).view(1, 1, -1)
                q = constant.shape[2]
                weight = torch.cat([weight[..., :q], weight.new_zeros(1, i, q), weight[..., q:]], dim=2)
                bias = torch.cat([bias[..., :q], constant, bias[..., q:]], dim=2)
            tensors[f"weights.{layer}"], tensors[f"biases.{layer}"] = weight, bias
        return tensors


class _Objective(nn.Module):
    """The loss of a network whose tensors `functional_call` replaces."""

    def __init__(self, network: ProbabilisticEnsemble) -> None:
        super().__init__()
        self.network = network

    def forward(self, batch: Float[Tensor, "1 b r"]) -> Float[Tensor, ""]:
        return self.network._loss(batch)


def check_arguments(*checks: tuple[str, bool, Any, str]) -> None:
    """Raise ValueError for the first argument that is not as it must be: (name, whether it is, value, allowed)."""
    for name, ok, value, allowed in checks:
        if not ok:
            raise ValueError(f"{name} must be {allowed}, got {value!r}")
