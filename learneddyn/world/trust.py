"""Where a world stops believing its model. A Trust judges a finished step, row by row.

Rows it rejects stop in rollouts and are truncated in environments. A World rejects non-finite rows by itself.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from learneddyn.core import Dynamics, Penalty, Transitions

Trust = Callable[[Float[Tensor, "b o"], Float[Tensor, "b a"], Float[Tensor, "b o"]], Bool[Tensor, " b"]]


def all_trusted(obs: Tensor, action: Tensor, next_obs: Tensor) -> Tensor:
    """Trust every row."""
    return torch.ones(len(obs), dtype=torch.bool, device=obs.device)


def within_data(data: Transitions, margin: float = 0.5) -> Trust:
    """Trust next observations inside the box of the data, each side widened by ``margin`` times the column's range.

    Raises:
        DataError: no rows, or NaN or infinite entries.
    """
    data.check()
    seen = torch.cat([data.obs, data.next_obs])
    return within_box(seen.amin(dim=0), seen.amax(dim=0), margin)


def within_box(low: Float[Tensor, " o"], high: Float[Tensor, " o"], margin: float = 0.0) -> Trust:
    """Trust next observations between ``low`` and ``high``, each side widened by ``margin`` times the range."""
    # A constant column has no range; rounding alone must not end a rollout there.
    slack = (margin * (high - low)).clamp_min(1e-4)
    floor, ceiling = low - slack, high + slack

    def trust(obs: Tensor, action: Tensor, next_obs: Tensor) -> Tensor:
        return ((next_obs >= floor) & (next_obs <= ceiling)).all(dim=1)

    return trust


def penalty_below(dynamics: Dynamics, penalty: Penalty, threshold: float) -> Trust:
    """Trust rows whose uncertainty ``penalty(obs, action, prediction)`` is at most ``threshold``; asks every member."""

    def trust(obs: Tensor, action: Tensor, next_obs: Tensor) -> Tensor:
        return penalty(obs, action, dynamics.predict(obs, action)) <= threshold

    return trust
