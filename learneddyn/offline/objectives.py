"""What a sweep maximises: the worth of a learned policy, told without a simulator or, where that is named, by it.

    name              figure                                                              needs
    fqe               lower end of the interval of fitted Q evaluation on the whole log
    return_in_model   lower end of the interval of the return in a model of its own       ``judge``
    model_error       minus the agent's model's error on held-out episodes                an agent with a model
    real              mean return in the real environment: a choice that saw the truth    ``env_id``

The first three never touch the real environment. None of them is a bound on the truth (`learneddyn.offline.selection`).
A dotted path names a function of your own, `Judgement` to number.
"""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import torch

from learneddyn import tasks
from learneddyn.core import DataError, Json, Transitions, generator
from learneddyn.evaluation.returns import evaluate
from learneddyn.models import AbstractDynamics
from learneddyn.offline.base import OfflineAlgorithm
from learneddyn.offline.fqe import fqe
from learneddyn.offline.model_based import OfflineMBPO, discrepancy
from learneddyn.offline.selection import model_error, return_in_model
from learneddyn.world import PENALTIES, Trust, World, all_trusted, penalty_below

EPISODES, STARTS = 20, 100


class Judgement(NamedTuple):
    """A learned policy and what it may be judged by.

    ``log`` is what it learned from, ``held_out`` are episodes that it did not see, ``judge`` the folder of a model that
    was fitted on both for this purpose, ``env_id`` the real environment or a task's id (None: there is neither),
    ``seed`` that of the judgement, ``env_kwargs`` the environment's arguments.
    """

    agent: OfflineAlgorithm
    log: Transitions
    held_out: Transitions
    judge: Path
    env_id: str | None
    seed: int
    env_kwargs: Json | None = None

    @property
    def everything(self) -> Transitions:
        """All logged rows."""
        return Transitions.cat([self.log, self.held_out])


Objective = Callable[[Judgement], float]


def by_fqe(judged: Judgement) -> float:
    """Return the lower end of the interval of fitted Q evaluation."""
    return fqe(judged.agent, judged.everything, gamma=judged.agent.gamma, seed=judged.seed).value.low


def by_return_in_model(judged: Judgement) -> float:
    """Return the lower end of the interval of the return in the model that was fitted to judge.

    Steps about which its members disagree more than at any logged one are not believed, and pay the worst
    (`learneddyn.offline.selection.return_in_model`). A judge of one member is believed throughout.
    """
    rows = judged.everything
    begins = rows.obs[rows.positions() == 0]
    some = begins[torch.randperm(len(begins), generator=generator(judged.seed))[:STARTS]]
    judge: AbstractDynamics = AbstractDynamics.load(judged.judge, device=rows.device)
    trust: Trust = all_trusted
    if judge.num_members > 1:
        trust = penalty_below(judge, PENALTIES["max_pairwise_diff"], discrepancy(judge, rows))
    assert judged.env_id is not None
    world = World(judge, tasks.get(judged.env_id), trust=trust)
    return return_in_model(judged.agent, world, some, worst=float(rows.reward.min()), seed=judged.seed).low


def by_model_error(judged: Judgement) -> float:
    """Return minus the error of the agent's model, on held-out rows near the policy's actions."""
    agent = judged.agent
    if not isinstance(agent, OfflineMBPO) or agent.model is None:
        raise ValueError(f"model_error judges agents with a model, {type(agent).__name__} has none")
    return -model_error(agent.model, judged.held_out, agent)


def by_real(judged: Judgement) -> float:
    """Return the mean return of real episodes."""
    assert judged.env_id is not None
    kwargs = judged.env_kwargs
    return evaluate(judged.agent, judged.env_id, episodes=EPISODES, seed=judged.seed, env_kwargs=kwargs).mean


OBJECTIVES: dict[str, Objective] = {
    "fqe": by_fqe,
    "return_in_model": by_return_in_model,
    "model_error": by_model_error,
    "real": by_real,
}


def objective(name: str) -> Objective:
    """Return the objective of a name, or the function that a dotted path names.

    Raises:
        ValueError: neither.
    """
    if name in OBJECTIVES:
        return OBJECTIVES[name]
    module, _, function = name.rpartition(".")
    try:
        found: Objective = getattr(import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"objective must be one of {', '.join(OBJECTIVES)} or the path of a function, got {name!r} ({error})"
        ) from error
    return found


def split_log(data: Transitions, share: float = 0.2, *, seed: int = 0) -> tuple[Transitions, Transitions]:
    """Return the rows of most episodes and, apart, those of a share of them, drawn at random.

    Raises:
        DataError: fewer than three episodes: two are learned from at least.
    """
    number, count = torch.unique_consecutive(data.episode, return_inverse=True)[1], len(data.episode.unique())
    if count < 3:
        raise DataError(f"a log of {count} episodes cannot be split into one to learn from and one to judge by")
    held = min(max(1, round(share * count)), count - 2)
    drawn = torch.randperm(count, generator=generator(seed))[:held].to(data.device)
    apart = torch.isin(number, drawn)
    return data[~apart], data[apart]
