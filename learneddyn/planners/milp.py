"""Planning with a piecewise-affine model as a mixed-integer linear program, solved to a proven optimum.

Source: Liu, Zhou, He, Marcucci, Fei-Fei, Wu, Li, "Model-Based Control with Sparse Neural Dynamics" (NeurIPS 2023); the
encoding of a ReLU and the tightening of its bounds by linear programs as in Tjeng, Xiao, Tedrake, "Evaluating
Robustness of Neural Networks with Mixed Integer Programming" (2019). The solver is HiGHS, where the source has Gurobi;
costs are therefore absolute values, not squares.

The model comes as a cascade: with v = (observation, action), every pair (W, b) but the last makes units
``y = max(0, W v + b)`` that are appended to v, and the last gives the next observation ``W v + b``.
`learneddyn.models.SparseReLU.cascade` is one. A unit that can be on or off costs one binary per step:

    z = W v + b,   y >= 0,   y >= z,   y <= z - l (1 - on),   y <= u on,   l <= z <= u

The smaller [l, u], the less the solver has to try: each is the smallest interval that the linear relaxation of all that
comes before allows. Units that this leaves only on, or only off, cost nothing.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import gymnasium as gym
import numpy as np
from jaxtyping import Float
from torch import Tensor

from learneddyn.planners.base import check_range
from learneddyn.spaces import Spaces

if TYPE_CHECKING:
    from highspy import Highs

_MARGIN = 1e-6
"""Widening of bounds that come from a linear program, ten times the solver's tolerance; relative to 1 + |bound|."""
_BOUNDING = 0.4
"""Share of the time limit after which bounds are no longer tightened."""

Cascade = Sequence[tuple[Float[Tensor, "_ _"], Float[Tensor, " _"]]]
Array = np.ndarray


class Solved(NamedTuple):
    """A plan, and what is known about it."""

    actions: Float[np.ndarray, "h a"]
    states: Float[np.ndarray, "h o"]
    """Where the model says the plan leads."""
    cost: float
    bound: float
    """No plan costs less, as far as the solver has proven."""
    optimal: bool
    """The bound is within the gap of the cost; otherwise the time limit came first."""
    binaries: int
    seconds: float


class MILP:
    """Find the plan of least cost from an observation; also a policy with SB3's ``predict`` that plans at every step.

    The cost of a plan is ``sum_t final_t sum_i weights_i |obs_i - goal_i| + sum_t sum_j effort_j |action_j|`` over the
    observations that it leads to; ``final_t`` is 1 but for the last step. It is no `AbstractPlanner`: it takes the
    model's weights instead of a score, and a goal instead of a reward.

    Where the time limit ends the search, the answer is the better of the best plan found and the plan it started from
    (the last one, shifted by a step, or the middle of the range): solve times vary by orders of magnitude from one
    observation to the next.

    Args:
        cascade: the model, see above.
        spaces: a Box of observations with one axis, and a bounded Box of actions.
        goal: observation to reach.
        weights: cost per unit of distance and step, by column; 0 leaves a column free.
        effort: cost per unit of action and step.
        final: factor of the last step's distance.
        horizon: steps of a plan.
        time_limit: seconds for one plan, of the wall clock; bounding and solving together.
        gap: relative distance between cost and bound at which a plan counts as optimal.
        tighten: bound every unit by linear programs; otherwise by interval arithmetic.

    Raises:
        ValueError: an argument outside its range, or sizes that do not fit together.
        ImportError: the solver is not installed (names the extra).
    """

    def __init__(
        self,
        cascade: Cascade,
        spaces: Spaces,
        *,
        goal: Sequence[float],
        weights: Sequence[float],
        effort: float = 0.0,
        final: float = 1.0,
        horizon: int = 8,
        time_limit: float = 1.0,
        gap: float = 1e-4,
        tighten: bool = True,
    ) -> None:
        check_range(
            "MILP",
            ("horizon", horizon, 1, 10**4),
            ("effort", effort, 0, 1e9),
            ("final", final, 0, 1e9),
            ("time_limit", time_limit, 1e-3, 1e6),
            ("gap", gap, 0, 1),
        )
        box = spaces.action
        if not isinstance(box, gym.spaces.Box) or not box.is_bounded("both"):
            raise ValueError(f"MILP plans actions of a bounded Box, got {box}")
        if not isinstance(spaces.observation, gym.spaces.Box) or len(spaces.observation.shape) != 1:
            raise ValueError(f"MILP needs observations of a Box with one axis, got {spaces.observation}")
        o, a = spaces.obs_dim, spaces.action_dim
        for name, values in (("goal", goal), ("weights", weights)):
            if len(values) != o or not np.isfinite(values).all():
                raise ValueError(f"MILP: {name} needs {o} finite numbers, one per observation column, got {values}")
        if min(weights) < 0:
            raise ValueError(f"MILP: weights must not be negative, got {weights}")
        self.blocks = [tuple(np.asarray(part.detach().cpu(), np.float64) for part in pair) for pair in cascade]
        stack = o + a
        for index, (weight, bias) in enumerate(self.blocks):
            rows = o if index == len(self.blocks) - 1 else len(weight)
            if weight.shape != (rows, stack) or bias.shape != (rows,):
                raise ValueError(
                    f"MILP: pair {index} of the cascade must have shapes ({rows}, {stack}) and ({rows},), got "
                    f"{weight.shape} and {bias.shape}"
                )
            stack += rows
        _highs()
        self.spaces, self.horizon, self.time_limit = spaces, horizon, time_limit
        self.goal, self.weights = np.asarray(goal, np.float64), np.asarray(weights, np.float64)
        self.effort, self.final, self.gap, self.tighten = effort, final, gap, tighten
        self.low, self.high = (np.asarray(side, np.float64).reshape(-1) for side in (box.low, box.high))

    def plan(self, obs: Array, warm: Array | None = None) -> Solved:
        """Return the best plan from an observation.

        Args:
            obs: ``[o]``.
            warm: a plan ``[h a]`` to start from; by default the middle of the range.

        Raises:
            ValueError: an observation or a plan of another shape, or not finite.
        """
        begun = time.perf_counter()
        obs, warm = self._checked(obs, warm)
        program = _Program(self.blocks, obs, self, begun + _BOUNDING * self.time_limit)
        program.add_cost(self)
        program.start_from(self.replay(obs, warm)[1])
        left = max(1e-3, self.time_limit - (time.perf_counter() - begun))
        found, bound, proven = program.solve(left, self.gap)
        plans = [warm] if found is None else [warm, found.clip(self.low, self.high)]
        costs = [self.cost(obs, plan) for plan in plans]
        best = int(np.argmin(costs))
        states, _ = self.replay(obs, plans[best])
        seconds = time.perf_counter() - begun
        return Solved(plans[best], states, costs[best], bound, proven, len(program.binaries), seconds)

    def cost(self, obs: Array, actions: Array) -> float:
        """Return what a plan ``[h a]`` costs from an observation, by the model itself."""
        states, _ = self.replay(np.asarray(obs, np.float64), np.asarray(actions, np.float64))
        distance = (np.abs(states - self.goal) * self.weights).sum(axis=1)
        distance[-1] *= self.final
        return float(distance.sum() + self.effort * np.abs(actions).sum())

    def replay(self, obs: Array, actions: Array) -> tuple[Float[np.ndarray, "h o"], list[list[Array]]]:
        """Return the observations that a plan leads to, and the inputs of all units by step and pair."""
        states, inputs = [], []
        for action in actions:
            v, before = np.concatenate([obs, action]), []
            for weight, bias in self.blocks[:-1]:
                before.append(weight @ v + bias)
                v = np.concatenate([v, before[-1].clip(0.0)])
            weight, bias = self.blocks[-1]
            obs = weight @ v + bias
            states.append(obs)
            inputs.append(before)
        return np.stack(states), inputs

    def encoded(self, obs: Array, actions: Array) -> Float[np.ndarray, "h o"]:
        """Return the observations that the mixed-integer program allows for a plan: those of `replay`, if it is right.

        The program is the one of `plan`, bounds for all legal actions included; only then the actions are fixed.

        Raises:
            ValueError: a wrong shape, or the program allows none.
        """
        obs, actions = self._checked(obs, actions)
        program = _Program(self.blocks, obs, self, np.inf)
        return program.states_of(actions)

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """Return the first action of the plan; ``state`` carries the plans that the next search starts from.

        Lanes are planned for one after the other. ``deterministic`` changes nothing, but the time limit makes the
        answer depend on the machine.
        """
        rows = np.asarray(observation, np.float64)
        many = rows.ndim == 2
        batch = rows if many else rows[None]
        middle = np.broadcast_to((self.low + self.high) / 2, (len(batch), self.horizon, len(self.low)))
        warm = middle if state is None else np.asarray(state[0], np.float64)
        if episode_start is not None:
            warm = np.where(np.asarray(episode_start, bool)[:, None, None], middle, warm)
        plans = np.stack([self.plan(obs, plan).actions for obs, plan in zip(batch, warm, strict=True)])
        action = plans[:, 0].reshape(len(batch), *(self.spaces.action.shape or ())).astype(self.spaces.action.dtype)
        return action if many else action[0], (np.concatenate([plans[:, 1:], plans[:, -1:]], axis=1),)

    def _checked(self, obs: Array, actions: Array | None) -> tuple[Array, Array]:
        obs = np.asarray(obs, np.float64)
        if actions is None:
            actions = np.broadcast_to((self.low + self.high) / 2, (self.horizon, len(self.low)))
        actions = np.asarray(actions, np.float64).clip(self.low, self.high)
        for name, value, shape in (
            ("the observation", obs, (len(self.goal),)),
            ("the plan", actions, (self.horizon, len(self.low))),
        ):
            if value.shape != shape or not np.isfinite(value).all():
                raise ValueError(f"MILP: {name} must be finite numbers of shape {shape}, got {value}")
        return obs, actions


@dataclass(frozen=True)
class _Unit:
    """A unit that may be on or off: where it stands, and its binary's column."""

    step: int
    pair: int
    row: int
    binary: int


class _Program:
    """The constraints of a horizon in HiGHS, built step by step."""

    def __init__(self, blocks: list[tuple[Array, ...]], obs: Array, planner: MILP, tighten_until: float) -> None:
        self.solver = _solver()
        self.lower: list[float] = []
        self.upper: list[float] = []
        self.binaries: list[_Unit] = []
        self.actions: list[list[int]] = []
        self.states: list[list[int]] = []
        self._until = tighten_until if planner.tighten else 0.0
        state = [self._column(value, value) for value in obs]
        for step in range(planner.horizon):
            action = [self._column(*pair) for pair in zip(planner.low, planner.high, strict=True)]
            stack = [*state, *action]
            for pair, (weight, bias) in enumerate(blocks[:-1]):
                inputs = [self._affine(row, constant, stack) for row, constant in zip(weight, bias, strict=True)]
                stack += [self._rectified(z, step, pair, row) for row, z in enumerate(inputs)]
            weight, bias = blocks[-1]
            state = [self._affine(row, constant, stack) for row, constant in zip(weight, bias, strict=True)]
            self.actions.append(action)
            self.states.append(state)

    def add_cost(self, planner: MILP) -> None:
        """Add the distances to the goal and the sizes of the actions, to be minimised."""
        for step, (state, action) in enumerate(zip(self.states, self.actions, strict=True)):
            factor = planner.final if step == planner.horizon - 1 else 1.0
            for column, goal, weight in zip(state, planner.goal, planner.weights, strict=True):
                self._absolute(column, goal, factor * weight)
            for column in action:
                self._absolute(column, 0.0, planner.effort)

    def start_from(self, inputs: list[list[Array]]) -> None:
        """Hand the solver the binaries of a plan, from the inputs of all units along it; it completes the rest."""
        self._integral()
        columns = np.array([unit.binary for unit in self.binaries], np.int32)
        on = np.array([float(inputs[unit.step][unit.pair][unit.row] > 0) for unit in self.binaries])
        if len(columns):
            self.solver.setSolution(len(columns), columns, on)

    def solve(self, seconds: float, gap: float) -> tuple[Array | None, float, bool]:
        """Return the best actions found, the bound on the cost, and whether they are within the gap of it."""
        highs = _highs()
        self.solver.setOptionValue("time_limit", self.solver.getRunTime() + seconds)
        self.solver.setOptionValue("mip_rel_gap", gap)
        self.solver.run()
        status, info = self.solver.getModelStatus(), self.solver.getInfo()
        proven = status == highs.HighsModelStatus.kOptimal
        bound = info.mip_dual_bound if self.binaries else info.objective_function_value if proven else -np.inf
        if info.primal_solution_status != highs.SolutionStatus.kSolutionStatusFeasible:
            return None, float(bound), False
        values = np.asarray(self.solver.getSolution().col_value)
        return values[np.array(self.actions)], float(bound), proven

    def states_of(self, actions: Array) -> Array:
        """Fix the actions and return the observations that follow."""
        self._integral()
        for columns, values in zip(self.actions, actions, strict=True):
            for column, value in zip(columns, values, strict=True):
                self.solver.changeColBounds(column, value, value)
        self.solver.run()
        if self.solver.getModelStatus() != _highs().HighsModelStatus.kOptimal:
            raise ValueError(f"the program allows no observations for this plan: {self.solver.getModelStatus()}")
        return np.asarray(self.solver.getSolution().col_value)[np.array(self.states)]

    def _integral(self) -> None:
        for unit in self.binaries:
            self.solver.changeColIntegrality(unit.binary, _highs().HighsVarType.kInteger)

    def _column(self, lower: float, upper: float, cost: float = 0.0) -> int:
        self.solver.addCol(cost, lower, upper, 0, np.empty(0, np.int32), np.empty(0))
        self.lower.append(lower)
        self.upper.append(upper)
        return len(self.lower) - 1

    def _row(self, lower: float, upper: float, columns: Sequence[int], values: Sequence[float]) -> None:
        self.solver.addRow(lower, upper, len(columns), np.array(columns, np.int32), np.array(values, np.float64))

    def _affine(self, weight: Array, constant: float, stack: list[int]) -> int:
        """Add a column that equals an affine function of others, within its interval."""
        used = weight.nonzero()[0]
        low, high = (np.array([side[stack[i]] for i in used]) for side in (self.lower, self.upper))
        w = weight[used]
        least, most = (constant + np.where(w > 0, w * a, w * b).sum() for a, b in ((low, high), (high, low)))
        column = self._column(float(least), float(most))
        self._row(constant, constant, [column, *(stack[i] for i in used)], [1.0, *-w])
        return column

    def _rectified(self, z: int, step: int, pair: int, row: int) -> int:
        """Return the column of max(0, z)."""
        infinity = _highs().kHighsInf
        for end in (-1, 1):
            if self.lower[z] < 0 < self.upper[z] and time.perf_counter() < self._until:
                self._tighten(z, end)
        low, high = self.lower[z], self.upper[z]
        if low >= 0:
            return z
        if high <= 0:
            return self._column(0.0, 0.0)
        y, on = self._column(0.0, high), self._column(0.0, 1.0)
        self._row(0.0, infinity, [y, z], [1.0, -1.0])
        self._row(-infinity, -low, [y, z, on], [1.0, -1.0, -low])
        self._row(-infinity, 0.0, [y, on], [1.0, -high])
        self.binaries.append(_Unit(step, pair, row, on))
        return y

    def _tighten(self, column: int, end: int) -> None:
        """Narrow one end of a column (-1 lower, 1 upper) to what the linear relaxation so far allows."""
        self.solver.changeColCost(column, -float(end))
        self.solver.run()
        if self.solver.getModelStatus() == _highs().HighsModelStatus.kOptimal:
            value = -end * self.solver.getInfo().objective_function_value
            value += end * _MARGIN * (1 + abs(value))
            if end < 0:
                self.lower[column] = max(self.lower[column], value)
            else:
                self.upper[column] = min(self.upper[column], value)
            self.solver.changeColBounds(column, self.lower[column], self.upper[column])
        self.solver.changeColCost(column, 0.0)

    def _absolute(self, column: int, goal: float, weight: float) -> None:
        if weight:
            infinity = _highs().kHighsInf
            distance = self._column(0.0, infinity, weight)
            self._row(-goal, infinity, [distance, column], [1.0, -1.0])
            self._row(goal, infinity, [distance, column], [1.0, 1.0])


def _highs() -> Any:
    """Return the solver's package.

    Raises:
        ImportError: it is not installed (names the extra).
    """
    try:
        import highspy
    except ImportError as error:
        raise ImportError("MILP needs highspy: pip install 'learneddyn[models]'") from error
    return highspy


def _solver() -> "Highs":
    solver = _highs().Highs()
    for option, value in (
        ("output_flag", False),
        ("threads", 1),
        ("mip_feasibility_tolerance", 1e-9),
        ("mip_abs_gap", 1e-9),
    ):
        solver.setOptionValue(option, value)
    return solver
