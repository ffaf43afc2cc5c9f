"""IWOCS on tables: exact values, so that every statement about the algorithm can be checked.

Source: Zouitine, Geist, Rachelson, "Solving robust MDPs as a sequence of static RL problems" (2024).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from learneddyn.agents.worst_case import Round, every, incremental


@dataclass(frozen=True)
class TabularModels:
    """k models over the same s states and a actions, in float64.

    Raises:
        ValueError: rows that are no distributions, a discount outside [0, 1), or a start that is no state.
    """

    transition: Float[Tensor, "k s a s"]
    reward: Float[Tensor, "k s a"]
    discount: float
    start: int

    def __post_init__(self) -> None:
        total = self.transition.sum(dim=3)
        if bool((self.transition < 0).any()) or not torch.allclose(total, torch.ones_like(total)):
            raise ValueError("every row of transition must be a distribution: entries of at least 0 that sum to 1")
        if not 0 <= self.discount < 1:
            raise ValueError(f"discount must be at least 0 and below 1, got {self.discount}")
        if not 0 <= self.start < self.transition.shape[1]:
            raise ValueError(f"start must be a state, 0 to {self.transition.shape[1] - 1}, got {self.start}")


def optimal_q(models: TabularModels, *, tolerance: float = 1e-10) -> Float[Tensor, "k s a"]:
    """Return the optimal action values of every model by value iteration, to ``tolerance`` in the largest norm."""
    q = torch.zeros_like(models.reward)
    while True:
        value = q.amax(dim=2)
        after = models.reward + models.discount * torch.einsum("ksat,kt->ksa", models.transition, value)
        if _close(after, q, models.discount, tolerance):
            return after
        q = after


def robust_q(models: TabularModels, *, tolerance: float = 1e-10) -> Float[Tensor, "s a"]:
    """Return the action values where an adversary picks a model anew for every state and action (rectangular).

    Whoever faces one model for good does at least as well.
    """
    q = torch.zeros_like(models.reward[0])
    while True:
        value = q.amax(dim=1)
        after = (models.reward + models.discount * models.transition @ value).amin(dim=0)
        if _close(after, q, models.discount, tolerance):
            return after
        q = after


def policy_values(models: TabularModels, policy: Int[Tensor, " s"]) -> Float[Tensor, "k s"]:
    """Return the values of a deterministic policy in every model, exactly."""
    states = torch.arange(len(policy), device=policy.device)
    moved, paid = models.transition[:, states, policy], models.reward[:, states, policy]
    return torch.linalg.solve(
        torch.eye(len(policy), dtype=moved.dtype, device=moved.device) - models.discount * moved, paid
    )


@dataclass(frozen=True)
class TabularIWOCS:
    """What the loop found: the policy, the pointwise minima Q_i of every round, and the rounds (models by number)."""

    policy: Int[Tensor, " s"]
    q: Float[Tensor, "i s a"]
    rounds: list[Round[int]]


def tabular_iwocs(
    models: TabularModels, *, first: int = 0, tolerance: float = 1e-6, rounds: int | None = None
) -> TabularIWOCS:
    """Run IWOCS over a finite set of models.

    Args:
        models: the uncertainty set.
        first: the nominal model.
        tolerance: of the stop rule |V of the policy in the worst model - promised value|.
        rounds: most models to solve; by default all of them.

    Raises:
        ValueError: ``first`` is no model, or rounds or tolerance out of range.
    """
    count = len(models.transition)
    if not 0 <= first < count:
        raise ValueError(f"first must be one of the {count} models, got {first}")
    solved = optimal_q(models)
    minima: list[Tensor] = []

    def combine(solutions: list[Tensor]) -> tuple[Tensor, float]:
        minima.append(torch.stack(solutions).amin(dim=0))
        return minima[-1].argmax(dim=1), float(minima[-1][models.start].max())

    def value(policy: Tensor, which: Sequence[int]) -> list[float]:
        return policy_values(models, policy)[list(which), models.start].tolist()

    policy, history = incremental(
        first,
        lambda model: solved[model],
        combine,
        every(range(count)),
        value,
        tolerance=tolerance,
        rounds=count if rounds is None else rounds,
    )
    return TabularIWOCS(policy, torch.stack(minima), history)


def windy_walk(strengths: Sequence[float], *, discount: float = 0.95) -> TabularModels:
    """Return the source's windy walk, one model per wind strength.

    Three corridors of six cells, joined at both ends, lead from the west end of the first (the start) to its east end
    (the goal, where the walk ends); every step costs 1. In the four inner cells of the corridors a west wind replaces
    the step with probability w, w**3 and w**6: the shortest way is the windiest. The layout of the ends is our reading.

    Raises:
        ValueError: a strength outside [0, 1].
    """
    if not all(0 <= strength <= 1 for strength in strengths):
        raise ValueError(f"wind strengths must lie in [0, 1], got {list(strengths)}")
    powers = {0: 1, 2: 3, 4: 6}
    cells = [(row, column) for row in range(5) for column in range(6) if row in powers or column in (0, 5)]
    number = {cell: index for index, cell in enumerate(cells)}
    wind = torch.tensor(strengths, dtype=torch.float64)
    transition = torch.zeros(len(wind), len(cells), 4, len(cells), dtype=torch.float64)
    reward = torch.full((len(wind), len(cells), 4), -1.0, dtype=torch.float64)
    reward[:, number[0, 5]] = 0.0
    for (row, column), here in number.items():
        west = number.get((row, column - 1), here)
        for action, (down, right) in enumerate(((0, 1), (0, -1), (1, 0), (-1, 0))):
            there = here if (row, column) == (0, 5) else number.get((row + down, column + right), here)
            blown = wind ** powers[row] if row in powers and 0 < column < 5 else torch.zeros_like(wind)
            transition[:, here, action, there] += 1 - blown
            transition[:, here, action, west] += blown
    return TabularModels(transition, reward, discount, start=number[0, 0])


def _close(after: Tensor, before: Tensor, discount: float, tolerance: float) -> bool:
    """Tell whether a contraction by ``discount`` has come within ``tolerance`` of its fixed point."""
    return float((after - before).abs().max()) * discount <= tolerance * (1 - discount)
