"""What an offline learner accepts as data, and the errors for what it cannot learn from."""

import math
from collections.abc import Sequence
from dataclasses import replace

import gymnasium as gym
import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from learneddyn import tasks
from learneddyn.core import DataError, Task, Transitions
from learneddyn.data.minari import load
from learneddyn.models.windows import linked
from learneddyn.tasks.registry import UnknownTask

Data = Transitions | str | Sequence[str]
"""Transitions, or one or several Minari ids."""
LOOKED_AT = 100_000
"""Rows, evenly spread, that tell how far a step usually leads."""
ROUNDED = 0.01
"""Share of terminal states and flags that may disagree: at a boundary, float32 may round to the other side."""


def read(
    data: Data, task: Task | str | None = None, *, rewards: bool = True, bootstraps: bool = True
) -> tuple[Transitions, Task | None]:
    """Return checked transitions and the task, which Minari data sets may name themselves.

    Args:
        data: transitions, or Minari ids.
        task: of the real environment; None takes the one that the Minari data set names, if it is known.
        rewards: whether the learner learns from rewards.
        bootstraps: whether it goes by what follows a step; else neither time-outs nor terminal flags are checked.

    Raises:
        DataError: rows without an action, NaN or infinity, no spaces, an action space that is no bounded Box, actions
            outside it, a single episode, time-outs whose ``next_obs`` is the start of the next episode, rewards that
            are all equal (unless episodes of different lengths terminate, as where each step costs 1), terminal states
            without their flag, or flags at states that are not terminal.
        DatasetNotFound: a Minari id that is neither here nor to be had.
        UnknownTask: a task id nobody registered.
    """
    if not isinstance(data, Transitions):
        task, data = _named_task(data) if task is None else task, load(data)
    if isinstance(task, str):
        task = tasks.get(task)
    return check(data, task, rewards=rewards, bootstraps=bootstraps), task


def check(data: Transitions, task: Task | None = None, *, rewards: bool = True, bootstraps: bool = True) -> Transitions:
    """Return ``data`` if it can be learned from; `read` lists the errors."""
    name = f"data set {data.source!r}" if data.source else "the data"
    missing = int((~data.labelled()).sum()) if data.action.shape[1] else len(data)
    if missing:
        raise DataError(
            f"{name} holds no action in {missing} of its {len(data)} rows; fill them in with "
            "learneddyn.offline.semi_supervised, or keep data[data.labelled()]"
        )
    data.check()
    if data.spaces is None:
        raise DataError(f"{name} names no spaces: use dataclasses.replace(data, spaces=Spaces(observation, action))")
    low, high = bounds(data.spaces.action, data.device)
    outside = ((data.action < low - 1e-5 * (high - low)) | (data.action > high + 1e-5 * (high - low))).any(1)
    if bool(outside.any()):
        raise DataError(
            f"{int(outside.sum())} of {len(data)} actions of {name} lie outside {data.spaces.action} (the first is row "
            f"{int(outside.nonzero()[0])}); store the action that was executed, or clip it"
        )
    if int(data.episode.max()) == int(data.episode.min()):
        raise DataError(
            f"{name} is one episode of {len(data)} rows: number the episodes in the column 'episode'; where there "
            "really is one, cut it into pieces, for example dataclasses.replace(data, episode=torch.arange(n) // 1000)"
        )
    if bootstraps:
        _check_time_outs(data, name)
    if rewards and bool((data.reward == data.reward[0]).all()):
        lengths = torch.unique_consecutive(data.episode, return_counts=True)[1]
        reward, lasting = float(data.reward[0]), "no episode terminates"
        if bool(data.terminated.any()):
            lasting = "all episodes have the same length" if len(lengths.unique()) == 1 else ""
        if lasting or reward == 0:  # else what an episode is worth depends on how soon it ends
            raise DataError(
                f"all {len(data)} rewards of {name} equal {reward}{lasting and f' and {lasting}'}: no action can be "
                "told from another; give it rewards, or imitate it with BC"
            )
    if bootstraps and task is not None:
        _check_terminations(data, task, name)
    return data


def _check_time_outs(data: Transitions, name: str) -> None:
    """Refuse a log whose time-outs lead to the start of the next episode, as in D4RL's own ``qlearning_dataset``.

    A log that was cut into pieces has the same equality of observations, but there the step is like any other. Here one
    column moves in most of these steps further than in 99.9 % of the others, or (given at least five such steps) most
    columns vary less than a third as much after the step as before it. A single such time-out is not found.
    """
    last = (data.episode[1:] != data.episode[:-1]).nonzero().flatten()
    last = last[~data.terminated[last]]
    copied = last[(data.next_obs[last] == data.obs[last + 1]).all(1)]
    inner = (data.episode[1:] == data.episode[:-1]).nonzero().flatten()
    if len(copied) < 2 or len(copied) <= len(last) / 2 or not len(inner):
        return
    inner = inner[torch.linspace(0, len(inner) - 1, min(len(inner), LOOKED_AT), device=data.device).long()]
    step = data.next_obs[inner] - data.obs[inner]
    # Columns that rest within an episode, as a goal does, may well change between two of them.
    moving = (step.std(0, correction=0) > 0) & (step.abs().median(0).values > 0)
    if not bool(moving.any()):
        return
    limit = step[:, moving].abs().kthvalue(math.ceil(0.999 * len(step)), 0).values
    before, after = data.obs[copied][:, moving], data.next_obs[copied][:, moving]
    far = bool((((after - before).abs() > limit).float().mean(0) > 0.5).any())
    # Where columns jitter no jump stands out, but resets are alike and what precedes them is not.
    alike = len(copied) >= 5 and bool((after.std(0) < before.std(0) / 3).float().mean() > 0.5)
    if far or alike:
        raise DataError(
            f"in {name} the last next_obs of {len(copied)} of {len(last)} episodes that do not terminate is the first "
            f"observation of the next one (the first is row {int(copied[0])}), where no step leads: store the "
            "observation that the last action led to, or drop these rows"
        )


def _check_terminations(data: Transitions, task: Task, name: str) -> None:
    """Refuse a log with wrong terminal flags, by what the task says or, where it cannot tell, by episodes' lengths."""
    flagged = data.terminated
    if task.terminated is not None:
        ends = task.terminated(data.next_obs)
        missing, extra = ends & ~flagged, flagged & ~ends
        allowed = max(1, ROUNDED * int((ends | flagged).sum()))
        if int(missing.sum()) > allowed or (bool(missing.any()) and not bool(flagged.any())):
            flags = f"only {int(flagged.sum())} terminations" if bool(flagged.any()) else "no termination"
            raise DataError(
                f"{name} flags {flags}, but {int(missing.sum())} more of its {len(data)} next observations are terminal"
                f" states of {task.real_id} (the first is row {int(missing.nonzero()[0])}); set them with "
                "dataclasses.replace(data, terminated=task.terminated(data.next_obs))"
            )
        if int(extra.sum()) > allowed:
            raise DataError(
                f"{name} flags {int(flagged.sum())} terminations, but {int(extra.sum())} of them lead to no terminal "
                f"state of {task.real_id} (the first is row {int(extra.nonzero()[0])}): these look like time limits, "
                "after which values go on; set the flags with dataclasses.replace(data, "
                "terminated=task.terminated(data.next_obs))"
            )
    elif task.max_episode_steps is not None and not bool(flagged.any()):
        lengths = torch.unique_consecutive(data.episode, return_counts=True)[1]
        early = lengths[lengths < task.max_episode_steps]
        # A time limit of its own ends all episodes alike, and the log may stop before the last of them does.
        if len(early) > len(lengths) / 2 and len(early.unique()) > 2:
            raise DataError(
                f"{name} flags no termination, but {len(early)} of its {len(lengths)} episodes end before the time "
                f"limit of {task.real_id}, {task.max_episode_steps} steps, and not all alike: set the column "
                "'terminated', which observations do not tell here; if none of them failed, pass "
                f"task=Task({task.real_id!r}, ..., terminated=learneddyn.tasks.endless.never) or drop the rows of the "
                "episodes that were cut"
            )


def bounds(space: gym.Space[object], device: torch.device) -> tuple[Float[Tensor, " a"], Float[Tensor, " a"]]:
    """Return the flat bounds of a bounded Box of actions.

    Raises:
        DataError: the space is something else.
    """
    if not isinstance(space, gym.spaces.Box) or not space.is_bounded("both") or bool((space.low == space.high).any()):
        raise DataError(f"offline learners need a bounded Box as action space, got {space}")
    sides = (np.asarray(side, np.float32).reshape(-1) for side in (space.low, space.high))
    low, high = (torch.as_tensor(side, device=device) for side in sides)
    return low, high


def scaled(data: Transitions) -> Transitions:
    """Return the same rows with actions scaled from their box to [-1, 1]."""
    assert data.spaces is not None
    low, high = bounds(data.spaces.action, data.device)
    return replace(data, action=((data.action - low) / (high - low) * 2 - 1).clamp(-1, 1))


def next_actions(data: Transitions) -> tuple[Float[Tensor, "n a"], Bool[Tensor, " n"]]:
    """Return the action that followed each row, and whether the log holds it.

    It does not at the end of an episode, nor before a row that was dropped: the next row begins where this one ends.
    """
    known = linked(data).roll(-1) & ~data.terminated
    return data.action.roll(-1, 0) * known[:, None], known


def episode_returns(data: Transitions) -> tuple[Int[Tensor, " n"], Float[Tensor, " e"]]:
    """Return the number of every row's episode, counted from 0, and every episode's undiscounted return (float64)."""
    number = torch.unique_consecutive(data.episode, return_inverse=True)[1]
    returns = torch.zeros(int(number[-1]) + 1, dtype=torch.float64, device=data.device)
    return number, returns.index_add_(0, number, data.reward.double())


def return_range(data: Transitions) -> float:
    """Return the largest minus the smallest return of an episode.

    Raises:
        DataError: all episodes have the same return.
    """
    returns = episode_returns(data)[1]
    spread = float(returns.max() - returns.min())
    if spread == 0:
        raise DataError(
            f"all {len(returns)} episodes have the same return ({float(returns[0]):g}), so rewards cannot be scaled by "
            "the range of returns; pass reward_scale as a number"
        )
    return spread


def _named_task(data: str | Sequence[str]) -> Task | None:
    """Return the task of the environment that a Minari data set was collected in, if it is known."""
    import minari

    first = data if isinstance(data, str) else data[0]
    load(data, max_episodes=1)  # fetches it, or says why it cannot be had
    spec = minari.load_dataset(first).env_spec
    try:
        return None if spec is None else tasks.get(spec.id)
    except (UnknownTask, ModuleNotFoundError):
        return None
