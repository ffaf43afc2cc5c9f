"""Model predictive control of a lifted linear system: one convex program per step, solved to its optimum.

Source: Korda, Mezic, "Linear predictors for nonlinear dynamical systems: Koopman operator meets model predictive
control" (2018). The lifted state is eliminated from the program, whose size depends on the horizon and the actions
alone. Deviation: bounds on actions only, none on states; what is undesired about states belongs into the weights.

The system comes as matrices on rows: with psi the lifted observation (a constant 1 may be among its entries),

    psi' = psi @ transition + action @ inputs,   y = psi @ readout

`learneddyn.models.Koopman.linear_system` is one, with its lift::

    LinearMPC(*model.linear_system(), model.spaces, goal=[...], weights=[...])
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from learneddyn.planners.base import check_range
from learneddyn.planners.quadratic import box_minimum
from learneddyn.spaces import Spaces, decode, encode

_LEAST = 1e-13
"""Smallest eigenvalue of a program, relative to its largest, that float64 can tell from zero."""

Lift = Callable[[Float[Tensor, "b o"]], Float[Tensor, "b n"]]


class Planned(NamedTuple):
    """Optimal plans, and where the model says they lead."""

    actions: Float[Tensor, "b h a"]
    outputs: Float[Tensor, "b h q"]
    cost: Float[Tensor, " b"]
    gap: Float[Tensor, " b"]
    """No plan within the bounds costs less by more."""


class LinearMPC:
    """Find the plan of least cost from an observation; also a policy with SB3's ``predict`` that plans at every step.

    The cost of a plan is ``sum_t final_t sum_i weights_i (y_i - goal_i)^2 + effort sum_t sum_j action_j^2`` over the
    outputs y that it leads to; ``final_t`` is 1 but for the last step. The lifted state is eliminated, so that a plan
    costs one program of horizon x actions unknowns, whatever the dictionary's size; all lanes are solved together, in
    float64. It is no `AbstractPlanner`: it takes matrices instead of a score, and a goal instead of a reward.

    Args:
        transition: see above.
        inputs: see above; actions in the environment's units.
        readout: see above.
        lift: observations to lifted rows.
        spaces: of the environment; a bounded Box of actions.
        goal: output to reach.
        weights: cost per squared unit of distance and step, by output; 0 leaves one free.
        effort: cost per squared unit of action and step, above 0.
        final: factor of the last step's distance.
        horizon: steps of a plan.

    Raises:
        ValueError: an argument outside its range, sizes that do not fit together, or a system that leaves the finite
            numbers within the horizon.
    """

    def __init__(
        self,
        transition: Float[Tensor, "n n"],
        inputs: Float[Tensor, "a n"],
        readout: Float[Tensor, "n q"],
        lift: Lift,
        spaces: Spaces,
        *,
        goal: Sequence[float],
        weights: Sequence[float],
        effort: float = 1e-3,
        final: float = 1.0,
        horizon: int = 20,
    ) -> None:
        check_range(
            "LinearMPC", ("horizon", horizon, 1, 10**4), ("effort", effort, 1e-12, 1e9), ("final", final, 0, 1e9)
        )
        box = spaces.action
        if not isinstance(box, gym.spaces.Box) or not box.is_bounded("both"):
            raise ValueError(f"LinearMPC plans actions of a bounded Box, got {box}")
        if not isinstance(spaces.observation, gym.spaces.Box) or len(spaces.observation.shape) != 1:
            raise ValueError(f"LinearMPC needs observations of a Box with one axis, got {spaces.observation}")
        if len(inputs) != spaces.action_dim:
            raise ValueError(f"LinearMPC: inputs must have {spaces.action_dim} rows, one per action, got {len(inputs)}")
        outputs = readout.shape[1]
        for name, values in (("goal", goal), ("weights", weights)):
            if len(values) != outputs or not np.isfinite(values).all():
                raise ValueError(f"LinearMPC: {name} needs {outputs} finite numbers, one per output, got {values}")
        if min(weights) < 0:
            raise ValueError(f"LinearMPC: weights must not be negative, got {weights}")
        self.spaces, self.horizon, self.effort, self.final, self.lift = spaces, horizon, effort, final, lift
        self.device = transition.device
        transition, inputs, readout = (part.detach().double() for part in (transition, inputs, readout))
        self.low, self.high = (self._tensor(encode(box, side[None])[0]) for side in (box.low, box.high))
        if not bool((self.low < self.high).all()):
            raise ValueError(f"LinearMPC: every action needs room between its bounds, got {box}")
        self.goal = self._tensor(goal)
        factor = torch.ones(horizon, 1, dtype=torch.float64, device=self.device)
        factor[-1] = final
        self._weights = factor * self._tensor(weights)
        self._coast, self._push = _responses(transition, inputs, readout, horizon)
        if not bool(self._coast.isfinite().all() and self._push.isfinite().all()):
            raise ValueError(f"LinearMPC: the system leaves the finite numbers within {horizon} steps; shorten horizon")
        flat = self._push.flatten(2).flatten(0, 1)  # [h a, h q]
        unknowns = torch.eye(len(flat), dtype=torch.float64, device=self.device)
        self._pull = 2 * flat * self._weights.flatten()
        self._hessian = self._pull @ flat.T + 2 * effort * unknowns
        unit = self._hessian.diagonal().rsqrt()
        spectrum = torch.linalg.eigvalsh(unit[:, None] * self._hessian * unit)
        if not float(spectrum[0]) > _LEAST * float(spectrum[-1]):
            raise ValueError(
                f"LinearMPC: over {horizon} steps the effects of actions differ by more than float64 can hold (its "
                "largest eigenvalue is unstable, often one that the data does not support); shorten horizon, or raise "
                "effort"
            )

    def plan(self, obs: Float[Tensor, "b o"]) -> Planned:
        """Return the best plan from every observation; ``obs`` is on the system's device.

        A lane whose observation, or where the model says it leads, is not finite has no best plan: as with every
        planner here it gets the one that stays in the middle of the range, its cost and gap are infinite and its
        outputs NaN. The other lanes do not notice.
        """
        with torch.no_grad():
            coast = torch.einsum("bn,ntq->btq", self.lift(obs).double(), self._coast) - self.goal
        bounds = self.low.repeat(self.horizon), self.high.repeat(self.horizon)
        linear = coast.flatten(1) @ self._pull.T
        sound = coast.flatten(1).isfinite().all(dim=1, keepdim=True) & linear.isfinite().all(dim=1, keepdim=True)
        found = box_minimum(self._hessian, torch.where(sound, linear, 0.0), *bounds)
        actions = torch.where(sound, found.x, (bounds[0] + bounds[1]) / 2).view(len(obs), self.horizon, -1)
        off = torch.where(sound[:, :, None], coast, torch.nan) + torch.einsum("bja,jatq->btq", actions, self._push)
        cost = (self._weights * off.square()).sum(dim=(1, 2)) + self.effort * actions.square().sum(dim=(1, 2))
        cost, gap = (torch.where(sound[:, 0], part, torch.inf) for part in (cost, found.gap))
        return Planned(actions, off + self.goal, cost, gap)

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """Return the first action of the best plan, and ``state`` as it came: nothing is carried from step to step.

        All lanes are planned for together, and no lane depends on another. ``deterministic`` changes nothing.
        """
        rows = np.asarray(observation, np.float32)
        many = rows.ndim == 2
        plans = self.plan(torch.as_tensor(rows if many else rows[None], device=self.device)).actions
        action = decode(self.spaces.action, plans[:, 0].float().cpu().numpy())
        return action if many else np.asarray(action[0]), state

    def _tensor(self, values: np.ndarray | Sequence[float]) -> Tensor:
        return torch.as_tensor(np.asarray(values, np.float64), device=self.device)


def _responses(
    transition: Float[Tensor, "n n"], inputs: Float[Tensor, "a n"], readout: Float[Tensor, "n q"], horizon: int
) -> tuple[Float[Tensor, "n t q"], Float[Tensor, "j a t q"]]:
    """Return how the outputs after 1 ... horizon steps follow from the lifted state, and from the action of step j."""
    after = [readout]
    for _ in range(horizon):
        after.append(transition @ after[-1])
    echoes = torch.stack([inputs @ part for part in after[:-1]], dim=1)  # [a, t, q]: an action's echo t steps later
    step = torch.arange(horizon, device=transition.device)
    lag: Int[Tensor, "j t"] = step[None, :] - step[:, None]
    push = echoes[:, lag.clamp_min(0)].movedim(0, 1)  # [j, a, t, q]
    return torch.stack(after[1:], dim=1), torch.where((lag >= 0)[:, None, :, None], push, 0.0)
