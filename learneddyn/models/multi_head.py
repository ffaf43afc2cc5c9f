"""The usual answers to forgetting: layers that tasks share, penalties on moving them, rows kept of earlier tasks.

Sources: Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks" (2017), for elastic weight
consolidation; Zenke, Poole, Ganguli, "Continual Learning Through Synaptic Intelligence" (2017); the selection of
baselines is the one of Huang, Xie, Bharadhwaj, Shkurti, "Continual Model-Based Reinforcement Learning with
Hypernetworks" (2021).
"""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import grad, vmap

from learneddyn.models.continual import AbstractContinual, Step, TaskState, check_arguments

_FISHER_ROWS = 256
"""Rows whose gradients are in memory at a time."""


class MultiHead(AbstractContinual):
    """A network whose first layers all tasks share, and whose last ones every task has of its own.

    Two things may keep earlier tasks in place, together or alone:

    - a penalty ``strength * sum_k sum_i importance_ki (theta_i - anchor_ki)^2`` on the shared weights theta, over
      earlier tasks k. "ewc": the importance is half the mean squared gradient of the loss, row by row, and the anchor
      is where task k ended. "si": the importance is the loss that a weight has saved along its path, divided by its
      squared displacement, never below 0, and the anchor is where the last task ended for all k;
    - rehearsal: every update also takes the loss of one earlier task, drawn anew, on rows kept of it, times the number
      of earlier tasks, which is the sum over them on average.

    The source's losses are sums over a batch and ours are means, so that its EWC strength of 10^4 at 100 rows is our
    100; the strength of SI needs no change, because its importances are in units of the loss.

    Args:
        shared_layers: first layers that are shared; None: all but the last. 0 is one network per task.
        penalty: "none", "ewc" or "si".
        strength: of the penalty; None is 100 for "ewc" and 0.1 for "si".
        damping: added to SI's squared displacement.
        memory: rows kept of every task, drawn uniformly; None keeps all, 0 none.
        hidden: see `AbstractContinual` for this and the other arguments.
        head: "gaussian" or "deterministic".
        angles: observation columns in radians.
        learn_reward: add a reward head.
        learn_termination: add a termination head.
        updates: of one call of `fit_task`.
        batch_size: rows per update, and again as many rehearsed.
        learning_rate: of Adam.
        holdout_ratio: share of the rows held out.

    Raises:
        ValueError: an argument outside its range (names it, the value, what is allowed).
    """

    def __init__(
        self,
        shared_layers: int | None = None,
        penalty: str = "none",
        strength: float | None = None,
        damping: float = 1e-3,
        memory: int | None = 0,
        hidden: Sequence[int] = (64, 64),
        head: str = "deterministic",
        angles: Sequence[int] = (),
        learn_reward: bool = False,
        learn_termination: bool = False,
        updates: int = 2000,
        batch_size: int = 100,
        learning_rate: float = 1e-3,
        holdout_ratio: float = 0.2,
    ) -> None:
        super().__init__(
            hidden, head, angles, learn_reward, learn_termination, updates, batch_size, learning_rate, holdout_ratio
        )
        layers = len(self.hidden) + 1
        chosen = layers - 1 if shared_layers is None else shared_layers
        check_arguments(
            ("shared_layers", 0 <= chosen <= layers, shared_layers, f"None or 0 to {layers}"),
            ("penalty", penalty in ("none", "ewc", "si"), penalty, "'none', 'ewc' or 'si'"),
            ("strength", strength is None or strength >= 0, strength, "None or at least 0"),
            ("damping", damping > 0, damping, "positive"),
            ("memory", memory is None or memory >= 0, memory, "None or at least 0"),
        )
        self.shared_layers, self.penalty, self.damping, self.memory = chosen, penalty, damping, memory
        self.strength = {"none": 0.0, "ewc": 100.0, "si": 0.1}[penalty] if strength is None else strength

    def _build_shared(self) -> None:
        self.theta = nn.Parameter(torch.zeros(sum(self.weight_sizes[: 2 * self.shared_layers])))

    def _initialise(self, rng: torch.Generator) -> None:
        with torch.no_grad():
            self.theta.copy_(self._drawn(rng)[: len(self.theta)])

    def _new_task(self, rng: torch.Generator | None) -> TaskState:
        shared = len(self.theta)
        whole = self.theta.new_zeros(sum(self.weight_sizes)) if rng is None else self._drawn(rng)
        network = self._template[0].network
        state = TaskState(whole[shared:].clone(), network, self.head == "gaussian")
        for name in ("importance", "anchor", "path", "origin")[: {"none": 0, "ewc": 2, "si": 4}[self.penalty]]:
            state.register_buffer(
                name, self.theta.detach().clone() if name == "origin" else torch.zeros_like(self.theta)
            )
        if self.memory != 0:
            columns = len(network.input_mean) + len(network.max_logvar) + 1
            state.register_buffer("rows", self.theta.new_zeros(0, columns))
        return state

    def _drawn(self, rng: torch.Generator) -> Float[Tensor, " w"]:
        """Return flat weights as a fresh network has them."""
        parts = []
        for i, j in self._shapes:
            weight = torch.empty(i, j, device=rng.device)
            std = 1.0 / (2.0 * i**0.5)
            nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std, generator=rng)
            parts += [weight.flatten(), torch.zeros(j, device=rng.device)]
        return torch.cat(parts)

    def _weights(self, task: int) -> Float[Tensor, " w"]:
        return torch.cat([self.theta, self.state(task).vector])

    def restraint(self, theta: Float[Tensor, " p"], task: int) -> Float[Tensor, ""]:
        """Return the penalty on shared weights ``theta`` while ``task`` is learned."""
        past = [self.state(k) for k in range(task)]
        importance = torch.stack([state.importance for state in past])
        anchor = torch.stack([(past[-1] if self.penalty == "si" else state).anchor for state in past])
        return self.strength * (importance * (theta - anchor).square()).sum()

    def _steps(self, task: int, rng: torch.Generator) -> Step:
        rehearsed = range(task) if self.memory != 0 else range(0)
        states = [self.state(k) for k in (*rehearsed, task)]
        shared = [self.theta] if len(self.theta) else []
        parameters = [*shared, *(parameter for state in states for parameter in state.trained())]
        optimizer = torch.optim.Adam(parameters, self.learning_rate, fused=True)
        turns: Iterator[int] = iter(())
        if rehearsed:
            turns = iter(torch.randint(task, (self.updates,), generator=rng, device=rng.device).tolist())
        penalised = self.penalty != "none" and task > 0

        def step(batch: Float[Tensor, "b r"]) -> Float[Tensor, ""]:
            loss = total = self._loss(task, self._weights(task), batch)
            if rehearsed:
                total = loss + task * self._rehearsed(next(turns), rng)
            optimizer.zero_grad(set_to_none=True)
            total.backward()
            assert self.theta.grad is not None
            before, slope = self.theta.detach().clone(), self.theta.grad.clone()  # of the losses alone
            if penalised:
                self.restraint(self.theta, task).backward()
            optimizer.step()
            if self.penalty == "si":
                states[-1].path -= slope * (self.theta.detach() - before)
            return loss.detach()

        return step

    def _rehearsed(self, task: int, rng: torch.Generator) -> Float[Tensor, ""]:
        """Return the loss of an earlier task on rows kept of it."""
        rows = self.state(task).rows
        chosen = torch.randint(len(rows), (self.batch_size,), generator=rng, device=rows.device)
        return self._loss(task, self._weights(task), rows.index_select(0, chosen))

    def _finish(self, task: int, rows: Float[Tensor, "n r"], rng: torch.Generator) -> None:
        state, theta = self.state(task), self.theta.detach()
        if self.penalty != "none":
            state.anchor.copy_(theta)
        if self.penalty == "ewc":
            state.importance.copy_(0.5 * self._fisher(task, rows))
        if self.penalty == "si":
            moved = (theta - state.origin).square() + self.damping
            state.importance.copy_(state.path.clamp_min(0.0) / moved)
        if self.memory != 0:
            order = torch.randperm(len(rows), generator=rng, device=rows.device)
            state.rows = rows[order[: self.memory]].clone()

    @torch.no_grad()
    def _fisher(self, task: int, rows: Float[Tensor, "n r"]) -> Float[Tensor, " p"]:
        """Return the mean over rows of the squared gradient of a row's loss in the shared weights."""
        own = self.state(task).vector.detach()

        def loss(theta: Tensor, row: Tensor) -> Tensor:
            return self._loss(task, torch.cat([theta, own]), row[None])

        theta, total = self.theta.detach(), torch.zeros_like(self.theta.detach())
        for part in rows.split(_FISHER_ROWS):
            total += vmap(grad(loss), in_dims=(None, 0))(theta, part).square().sum(dim=0)
        return total / len(rows)
