"""What may be asked of a chaotic flow: to be watched, or to be held at a state. Units: `learneddyn.plants.chaos`.

Observations are standardised states; actions, if there are any, are pushes in [-1, 1]. Nothing terminates.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from learneddyn.core import InitialFn, Task
from learneddyn.tasks.endless import never


def watched(name: str, *, initial: InitialFn | None = None) -> Task:
    """Return the task of a flow that is only forecast: every reward is zero.

    Args:
        name: of the flow.
        initial: start states, for example `learneddyn.plants.chaos.FlowDynamics.start`.
    """

    def reward(obs: Float[Tensor, "b o"], action: Float[Tensor, "b a"], next_obs: Float[Tensor, "b o"]) -> Tensor:
        return torch.zeros_like(obs[:, 0])

    return Task(f"flow/{name}", reward, never, initial, notes="There is nothing to win: made for forecasts.")


def held(name: str, target: Sequence[float], *, effort: float = 0.01, initial: InitialFn | None = None) -> Task:
    """Return the task of holding a flow at a state: the reward is ``-(|s' - target|^2 + effort |u|^2)``.

    Args:
        name: of the flow.
        target: standardised state, for example a fixed point of the flow without pushes.
        effort: price of the squared actions.
        initial: see `watched`.
    """

    def reward(obs: Float[Tensor, "b o"], action: Float[Tensor, "b a"], next_obs: Float[Tensor, "b o"]) -> Tensor:
        apart = (next_obs - next_obs.new_tensor(list(target))).square().sum(dim=1)
        return -(apart + effort * action.square().sum(dim=1))

    return Task(f"flow/{name}", reward, never, initial)
