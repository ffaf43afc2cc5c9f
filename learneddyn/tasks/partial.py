"""Tasks of environments whose observation lacks columns, see `learneddyn.data.partial`."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from learneddyn.core import Task
from learneddyn.tasks.endless import never


def partially_observed(task: Task, columns: Sequence[int], real_id: str) -> Task:
    """Return the task of the environment ``real_id``, which hides ``columns`` of the observation of ``task``.

    Reward and termination may depend on what is hidden: the model's own heads answer them (``learn_reward=True``,
    ``learn_termination=True``), except where the task never terminates. Start states lose the same columns.
    """
    hidden, start = sorted(set(columns)), task.initial

    def initial(lanes: int, rng: torch.Generator) -> Float[Tensor, "b o"]:
        assert start is not None
        obs = start(lanes, rng)
        kept = [column for column in range(obs.shape[1]) if column not in hidden]
        return obs[:, kept]

    return replace(
        task,
        real_id=real_id,
        reward=None,
        terminated=task.terminated if task.terminated is never else None,
        initial=None if start is None else initial,
        codec=None,
        angles=tuple(column - sum(h < column for h in hidden) for column in task.angles if column not in hidden),
        notes=f"{task.real_id} without its observation columns {hidden}.",
    )
