"""Where a world stops believing its model. A Trust judges a finished step (state before, action, state after) by row.

Rows it rejects stop in rollouts and are truncated in environments. A World rejects non-finite rows by itself.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from learneddyn.core import Dynamics, Penalty, State, Transitions

Trust = Callable[[State, Float[Tensor, "b a"], State], Bool[Tensor, " b"]]


def all_trusted(state: State, action: Tensor, after: State) -> Tensor:
    """Trust every row."""
    return torch.ones(len(state.obs), dtype=torch.bool, device=state.obs.device)


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

    def trust(state: State, action: Tensor, after: State) -> Tensor:
        return ((after.obs >= floor) & (after.obs <= ceiling)).all(dim=1)

    return trust


def penalty_below(dynamics: Dynamics, penalty: Penalty, threshold: float) -> Trust:
    """Trust rows whose uncertainty ``penalty(obs, action, prediction, after)`` is at most ``threshold``.

    Every member is asked once more at every step. With `penalties.max_pairwise_diff` and a threshold taken from the
    data this is the unknown-state detector of Kidambi et al., "MOReL: Model-Based Offline Reinforcement
    Learning", 2020.
    """

    def trust(state: State, action: Tensor, after: State) -> Tensor:
        prediction = dynamics.predict(state.obs, action, state.memory)
        return penalty(state.obs, action, prediction, after) <= threshold

    return trust
