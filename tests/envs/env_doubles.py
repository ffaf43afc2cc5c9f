"""Dynamics with known answers: linear, so that episodes end where arithmetic says so, and no training is needed."""

from typing import Any

import torch
from gymnasium import spaces
from torch import Tensor

from learneddyn.core import Outcome, Prediction, Task, Transitions
from learneddyn.models.base import AbstractDynamics, FitReport
from learneddyn.spaces import Spaces
from learneddyn.world import World

BOX = Spaces(spaces.Box(-10.0, 10.0, (3,)), spaces.Box(-1.0, 1.0, (3,)))


class Linear(AbstractDynamics):
    """``next = obs + 0.5 action (+ noise)``; member i adds ``0.01 i``. Loaded back from disk by its dotted path."""

    num_members = 2

    def __init__(self, noise: float = 0.0) -> None:
        super().__init__()
        self.noise = noise
        self.gain = torch.nn.Parameter(torch.tensor(0.5))

    @property
    def elites(self) -> Tensor:
        return torch.arange(2)

    def _build(self, spaces: Spaces) -> None:
        pass

    def fit(self, data: Transitions, *, rng: torch.Generator, progress: bool = False) -> FitReport:
        self.check_spaces(data)
        return FitReport(0, 0.0, {})

    def predict(self, obs: Tensor, action: Tensor, memory: Tensor | None = None) -> Prediction:
        mean = torch.stack([self._mean(obs, action, torch.full((len(obs),), i)) for i in range(2)])
        return Prediction(mean, torch.full_like(mean, self.noise), self.elites)

    def sample(
        self,
        obs: Tensor,
        action: Tensor,
        member: Tensor,
        rng: torch.Generator,
        memory: Tensor | None = None,
        *,
        noise: bool = True,
    ) -> Outcome:
        drawn = torch.randn(obs.shape, generator=rng) * self.noise if noise else 0.0
        return Outcome(self._mean(obs, action, member) + drawn)

    def _mean(self, obs: Tensor, action: Tensor, member: Tensor) -> Tensor:
        width = min(obs.shape[1], action.shape[1])
        moved = obs.clone()
        moved[:, :width] += self.gain * action[:, :width]
        return moved + 0.01 * member[:, None]


def far_out(next_obs: Tensor) -> Tensor:
    return next_obs[:, 0] > 2.0


def initial(lanes: int, rng: torch.Generator) -> Tensor:
    return torch.zeros(lanes, 3).uniform_(-0.1, 0.1, generator=rng)


TASK = Task(
    "Linear-v0",
    reward=lambda obs, action, next_obs: next_obs.sum(dim=1) - 0.1 * action.square().sum(dim=1),
    terminated=far_out,
    initial=initial,
    max_episode_steps=50,
)

ANY_TASK = Task(
    "Any-v0",
    reward=lambda obs, action, next_obs: next_obs.sum(dim=1),
    terminated=lambda next_obs: next_obs[:, 0] > 1.5,
)
COMPOSITE = spaces.Dict({"joint": spaces.Box(-9.0, 9.0, (2, 2)), "mode": spaces.Discrete(3, start=5)})


def linear_world(
    *, noise: float = 0.0, sampler: str = "mean", spaces: Spaces = BOX, task: Task = TASK, reach: float | None = None
) -> World:
    """A world that terminates at ``obs[0] > 2`` and, with a reach, distrusts ``|obs[1]| > reach``."""
    model = Linear(noise)
    model.spaces = spaces

    def trust(state: Any, action: Tensor, after: Any) -> Tensor:
        return torch.ones(len(after.obs), dtype=torch.bool) if reach is None else after.obs[:, 1].abs() <= reach

    return World(model, task, sampler=sampler, trust=trust)
