"""Live through real actions again, in imagination: what a model would have promised for what was really done.

    imagined/return   mean return of the windows as the model imagines them
    real/return       their real mean return

`learneddyn.agents.diagnostics.return_gap` asks the policy for new actions instead, which a planner is too slow for.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from learneddyn.core import Transitions
from learneddyn.models.base import memory_of
from learneddyn.models.windows import longest_window, window_starts
from learneddyn.world import World


class Relived(NamedTuple):
    """Figures under their logger keys, and the imagined rows."""

    figures: dict[str, float]
    rows: Transitions


@torch.no_grad()
def relive(world: World, fresh: Transitions, horizon: int, rng: torch.Generator) -> Relived:
    """Roll the world along the actions of every window of ``horizon`` steps (see `learneddyn.models.windows`).

    Args:
        world: its sampler decides how it is rolled; the model should not have been fitted on ``fresh`` yet.
        fresh: real rows, episodes in order; windows do not bridge rows that were dropped.
        horizon: steps; those of the longest unbroken stretch where that is shorter.
        rng: on the world's device.
    """
    steps = longest_window(fresh, horizon)
    start = window_starts(fresh, steps)
    state, memory = world.start(fresh.obs[start], rng), memory_of(world.dynamics, fresh)
    state = state if memory is None else state._replace(memory=memory[start])
    alive = torch.ones(len(start), dtype=torch.bool, device=start.device)
    imagined, real = torch.zeros(2, len(start), device=start.device).unbind()
    parts: list[tuple[Tensor, ...]] = []
    for row in (start + step for step in range(steps)):
        before, action = state.obs, fresh.action[row]
        state, outcome = world.step(state, action, rng)
        alive = alive & outcome.trusted
        imagined, real = imagined + outcome.reward * alive, real + fresh.reward[row]
        columns = before, action, outcome.reward, state.obs, outcome.terminated, start
        parts.append(tuple(column[alive] for column in columns))
        alive = alive & ~outcome.terminated
    obs, taken, reward, next_obs, ended, episode = (torch.cat(column) for column in zip(*parts, strict=True))
    rows = Transitions(obs, taken, reward, next_obs, ended, episode, fresh.spaces, "imagined")
    return Relived({"imagined/return": float(imagined.mean()), "real/return": float(real.mean())}, rows)
