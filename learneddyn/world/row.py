"""One lane of a world in NumPy, where PyTorch's calls would cost several times what the model does.

`step_row` gives what `World.step` gives for a single row, from the same draws, to float rounding.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor

from learneddyn.core import State
from learneddyn.world.sampling import elite, ts1, tsinf
from learneddyn.world.trust import all_trusted
from learneddyn.world.world import World, unanswered


class Row(NamedTuple):
    """A `State` of one lane, without memory."""

    obs: Float32[np.ndarray, " o"]
    member: int

    def state(self) -> State:
        """Return the same in tensors."""
        return State(_batch(self.obs), torch.tensor([self.member]))


class RowStep(NamedTuple):
    """A `Step` of one lane."""

    reward: float
    terminated: bool
    trusted: bool


def steps_rows(world: World) -> bool:
    """Say whether `step_row` knows this world.

    It must be a `World` itself (a subclass may step otherwise) on the CPU, without penalty, with one member per row,
    and its model must have ``sample_row`` (see `learneddyn.models.ProbabilisticEnsemble.sample_row`).
    """
    return (
        type(world) is World
        and world.sampler in (elite, ts1, tsinf)
        and (world.penalty is None or not world.penalty_weight)
        and hasattr(world.dynamics, "sample_row")
        and world.dynamics.elites.is_cpu
    )


def step_row(world: World, row: Row, action: Float32[np.ndarray, " a"], rng: torch.Generator) -> tuple[Row, RowStep]:
    """Advance a single lane by one step of the model, without gradients; see `World.step`.

    Raises:
        ValueError: neither the task nor the model answers reward or termination.
    """
    dynamics: Any = world.dynamics
    member = _member(world, row, rng)
    next_obs, reward, terminated = dynamics.sample_row(row.obs, action, member, rng)
    task = world.task
    if task.reward is not None:
        reward = task.reward(_batch(row.obs), _batch(action), _batch(next_obs)).item()
    elif reward is None:
        raise unanswered(task, "reward", world.dynamics)
    finite = math.isfinite(reward) and (math.isfinite(sum(next_obs.tolist())) or bool(np.isfinite(next_obs).all()))
    after = Row(next_obs if finite else row.obs, member)
    if task.terminated is not None:
        terminated = task.terminated(_batch(after.obs)).item()
    elif terminated is None:
        raise unanswered(task, "termination", world.dynamics)
    trusted = finite
    if world.trust is not all_trusted:
        with torch.no_grad():  # some ask the model, which is faster where nobody asks for gradients
            trusted = finite and bool(world.trust(row.state(), _batch(action), after.state()).item())
    if isinstance(world.halt_reward, float | int) and not trusted:
        return after, RowStep(world.halt_reward, True, True)
    if world.halt_reward == "kept" and finite and not trusted:
        return after, RowStep(reward, True, True)
    return after, RowStep(reward if finite else 0.0, bool(terminated and finite), trusted)


def _member(world: World, row: Row, rng: torch.Generator) -> int:
    """Draw as `learneddyn.world.sampling` draws for one lane."""
    if world.sampler is tsinf:
        return row.member
    members = world.dynamics.elites.tolist() if world.sampler is elite else range(world.dynamics.num_members)
    return members[int(torch.randint(len(members), (1,), generator=rng).item())]


def _batch(row: Float32[np.ndarray, " _"]) -> Tensor:
    return torch.from_numpy(row[None])
