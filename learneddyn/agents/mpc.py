"""Model predictive control: at every step plan inside a world, execute the first action, plan again."""

import itertools
import time
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from jaxtyping import Float
from stable_baselines3.common.utils import is_vectorized_observation
from torch import Tensor

from learneddyn.core import generator
from learneddyn.models import AbstractDynamics
from learneddyn.planners import AbstractPlanner, PlanState
from learneddyn.spaces import decode, encode
from learneddyn.world import World


class MPC:
    """A policy that plans in a world, with SB3's ``predict``; many environments are planned for at once.

    What planning carries from step to step travels in ``state``, as with SB3's recurrent policies: hand the returned
    state back, with ``episode_start``, and every search starts from the last one; without a state every call plans
    afresh. SB3's ``evaluate_policy`` and `learneddyn.evaluation.evaluate` do the former.

    With ``deterministic=True`` the numbers drawn follow from ``seed`` and the most steps that a lane of ``state``
    counts, so that the same observations and state give the same actions; otherwise every call draws new ones. Worlds
    that draw random numbers draw them for all lanes together; with a deterministic one (the truth, or
    ``sampler="mean"``) a lane's actions do not depend on the others, as long as none is further in its episode.

    Each step costs about `evaluations` model evaluations per lane; fewer where ``budget_ms`` ends the search.

    Args:
        world: where to plan; its penalty counts. Action spaces: a Box with finite bounds, or Discrete with a planner
            for discrete actions. What a model remembers of the real steps so far travels in ``state`` too.
        planner: how to plan.
        particles: imagined futures per plan, see `World.returns`.
        budget_ms: time for one `predict`, milliseconds. No iteration begins that would, as long as the longest one so
            far, end later; the first iteration always runs, and the action is always legal.
        max_evaluations: refuse to plan with more model evaluations per step and lane than this.
        chunk: particles in memory at a time, see `World.returns`.
        seed: of the numbers drawn.
        verbose: 1 prints what a step costs.

    Raises:
        ValueError: an action space that the planner cannot serve, more than ``max_evaluations``, or an argument below
            its least value.
    """

    def __init__(
        self,
        world: World,
        planner: AbstractPlanner,
        *,
        particles: int = 1,
        budget_ms: float | None = None,
        max_evaluations: int | None = None,
        chunk: int = 16_384,
        seed: int = 0,
        verbose: int = 0,
    ) -> None:
        if particles < 1:
            raise ValueError(f"particles must be at least 1, got {particles}")
        if budget_ms is not None and not budget_ms > 0:
            raise ValueError(f"budget_ms must be None or above 0, got {budget_ms}")
        self.world, self.planner, self.particles, self.budget_ms = world, planner, particles, budget_ms
        self.chunk, self.seed = chunk, seed
        self.device = world.dynamics.elites.device
        self._low, self._high = (torch.as_tensor(b, device=self.device) for b in _bounds(world, planner))
        self._calls = itertools.count()
        if max_evaluations is not None and self.evaluations > max_evaluations:
            raise ValueError(f"this MPC needs {self.cost}, allowed are {max_evaluations}")
        if verbose:
            print(f"MPC: {self.cost}")

    @property
    def evaluations(self) -> int:
        """Model evaluations per step and lane, at most."""
        return self.planner.sequences * self.planner.horizon * self.particles

    @property
    def cost(self) -> str:
        """`evaluations` in words."""
        return (
            f"{self.evaluations:,} model evaluations per step and lane ({type(self.planner).__name__}: "
            f"{self.planner.sequences} plans x {self.planner.horizon} steps x {self.particles} particles)"
        )

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """Return the first action of the best plan found, and the planning state.

        Raises:
            ValueError: an observation that is not of the world's space, or a state of another number of lanes.
        """
        deadline = _Deadline(self.budget_ms, self.device)
        space = self.world.spaces.observation
        many = is_vectorized_observation(observation, space)  # type: ignore[arg-type]  # dicts too
        batch: Any = observation if many else _one(observation)
        obs = torch.as_tensor(encode(space, batch), device=self.device)
        with torch.no_grad():
            before, memory = self._resumed(obs, state, episode_start)
        history = (0, int(before.step.max())) if deterministic else (1, next(self._calls))
        seeds = np.random.SeedSequence((self.seed, *history)).generate_state(2)
        # Apart, because a world draws more numbers for more lanes and would set the planner's draws off.
        planning, imagining = (generator(int(seed), self.device) for seed in seeds)

        def score(plans: Float[Tensor, "b s h a"]) -> Float[Tensor, "b s"]:
            return self.world.returns(obs, plans, imagining, self.particles, self.chunk, memory)

        with torch.no_grad():
            plan, after = self.planner.plan(score, before, self._low, self._high, planning, deadline)
            carried = () if memory is None else (self._remembering(obs, plan[:, 0], memory),)
        action = decode(self.world.spaces.action, plan[:, 0].cpu().numpy())
        return action if many else np.asarray(action[0]), tuple(part.cpu().numpy() for part in (*after, *carried))

    def _remembering(self, obs: Tensor, action: Tensor, memory: Tensor) -> Float[Tensor, "b m"]:
        """Return what the model remembers after the step that is taken for real."""
        after = self.world.dynamics.predict(obs, action, memory).memory
        return memory if after is None else after

    def _resumed(
        self, obs: Float[Tensor, "b o"], state: tuple[np.ndarray, ...] | None, episode_start: np.ndarray | None
    ) -> tuple[PlanState, Float[Tensor, "b m"] | None]:
        """Return the planning state and the model's memory of every lane, afresh where an episode starts."""
        lanes, dynamics = len(obs), self.world.dynamics
        fresh = self.planner.start(lanes, self._low, self._high)
        begun = dynamics.begin(obs) if isinstance(dynamics, AbstractDynamics) else None
        if state is None:
            return fresh, begun
        parts = [torch.as_tensor(part, device=self.device) for part in state]
        known = len(PlanState._fields)
        if len(parts) != known + (begun is not None):
            raise ValueError(f"the state must hold {known + (begun is not None)} arrays for this MPC, got {len(parts)}")
        resumed, memory = PlanState(*parts[:known]), None if begun is None else parts[known]
        for name, got, want in zip(PlanState._fields, resumed, fresh, strict=True):
            if got.shape != want.shape:
                raise ValueError(
                    f"the planning state '{name}' must have shape {tuple(want.shape)} for {lanes} lanes and this "
                    f"planner, got {tuple(got.shape)}"
                )
        if memory is not None and begun is not None and memory.shape != begun.shape:
            raise ValueError(f"the model's memory must have shape {tuple(begun.shape)}, got {tuple(memory.shape)}")
        if episode_start is None:
            return resumed, memory
        started = torch.as_tensor(episode_start, dtype=torch.bool, device=self.device)
        if memory is not None and begun is not None:
            memory = torch.where(started[:, None], begun, memory)
        return resumed.restarted(started, fresh), memory


class _Deadline:
    """Answers whether another iteration would end in time, if it took as long as the longest one so far."""

    def __init__(self, budget_ms: float | None, device: torch.device) -> None:
        self._seconds = None if budget_ms is None else budget_ms / 1000
        self._device, self._longest = device, 0.0
        self._begun = self._asked = time.perf_counter()

    def __call__(self) -> bool:
        if self._seconds is None:
            return True
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        self._longest, self._asked = max(self._longest, now - self._asked), now
        return now - self._begun + self._longest <= self._seconds


def _bounds(world: World, planner: AbstractPlanner) -> tuple[np.ndarray, np.ndarray]:
    """Return the bounds of the flat action.

    Raises:
        ValueError: the planner cannot serve the action space.
    """
    space, name = world.spaces.action, type(planner).__name__
    match space:
        case gym.spaces.Discrete() if planner.discrete:
            return np.zeros(int(space.n), np.float32), np.ones(int(space.n), np.float32)
        case gym.spaces.Box() if not planner.discrete and space.is_bounded():
            return encode(space, space.low[None])[0], encode(space, space.high[None])[0]
    wanted = "Discrete" if planner.discrete else "a Box with finite bounds"
    raise ValueError(f"{name} plans actions of {wanted}, got {space}")


def _one(observation: Any) -> Any:
    """Return a batch of one observation."""
    if isinstance(observation, dict):
        return {key: np.asarray(part)[None] for key, part in observation.items()}
    return np.asarray(observation)[None]
