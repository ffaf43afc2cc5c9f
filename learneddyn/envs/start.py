"""Where imagined episodes begin: the task's start states, the rows of a table, or anywhere in logged experience."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from learneddyn.core import InitialFn, Transitions
from learneddyn.world import World

Start = Literal["task"] | Float[Tensor, "n o"] | Transitions | None
"""``"task"`` or None: as the real environment starts. A tensor ``[n o]``: its rows, drawn uniformly. Transitions: any
of their observations, drawn uniformly, so that imagined episodes branch off logged ones mid-trajectory."""


def start_states(start: Start, world: World) -> InitialFn:
    """Return the function that draws start observations of ``world``.

    Raises:
        ValueError: unknown name, no rows, wrong columns, NaN or infinite rows, or a task without start states.
    """
    if start is None or isinstance(start, str):
        if start not in (None, "task"):
            raise ValueError(f"unknown start {start!r}, allowed are 'task', a tensor of observations, or Transitions")
        if world.task.initial is None:
            raise ValueError(
                f"the task of {world.task.real_id} defines no start states: pass start=data (Transitions) or a tensor "
                "of observations"
            )
        return world.initial
    table = start.obs if isinstance(start, Transitions) else start
    width = world.spaces.obs_dim
    if table.ndim != 2 or table.shape[1] != width or len(table) == 0 or not table.isfinite().all():
        raise ValueError(
            f"start observations must be finite, of shape (n >= 1, {width}), got shape {tuple(table.shape)} with "
            f"{int((~table.isfinite()).sum())} non-finite entries"
        )
    table = table.to(world.dynamics.elites.device, torch.float32)

    def draw(lanes: int, rng: torch.Generator) -> Tensor:
        return table[torch.randint(len(table), (lanes,), generator=rng, device=table.device)]

    return draw


def first_observations(data: Transitions) -> Float[Tensor, "n o"]:
    """Return the first observation of every logged episode, to start where the logs started."""
    first = torch.ones(len(data), dtype=torch.bool, device=data.device)
    first[1:] = data.episode[1:] != data.episode[:-1]
    return data.obs[first]
