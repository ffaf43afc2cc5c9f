"""Contracts of a planner: legal plans, independent lanes, no hidden state, nothing that is not finite ever wins."""

import torch
from torch import Tensor

from learneddyn.core import generator
from learneddyn.planners import AbstractPlanner, PlanState, Score
from learneddyn.testing.contract import Contracts, close, equal

LANES = 3
STEPS = 4
"""Searches in a row, each warmed by the one before."""


def check_planner(planner: AbstractPlanner) -> None:
    """Check a planner on scores with known answers, in three lanes with two action columns.

    Raises:
        ContractError: a contract is broken.
    """
    contracts = Contracts(type(planner).__name__)
    for name in ("horizon", "sequences"):
        value = getattr(planner, name)
        contracts.holds(isinstance(value, int) and value >= 1, f"{name} is an integer of at least 1", value)
    low, high = (torch.zeros(2), torch.ones(2)) if planner.discrete else (torch.tensor([-2.0, 0.0]), torch.ones(2))
    bounds = low, high
    state = planner.start(LANES, low, high)
    _check_state(planner, state, contracts)
    if not planner.discrete:
        bad = torch.tensor([-torch.inf, 0.0])
        contracts.refuses(ValueError, lambda: planner.start(LANES, bad, high), "infinite bounds are a ValueError")
        contracts.refuses(ValueError, lambda: planner.start(LANES, high, low), "bounds out of order are a ValueError")
    _check_plans(planner, state, bounds, contracts)
    _check_search(planner, state, bounds, contracts)
    _check_lanes(planner, state, bounds, contracts)
    _check_broken_scores(planner, state, bounds, contracts)


def _goal(low: Tensor, high: Tensor) -> Score:
    """Return a score of the first action alone, best in another place in every lane."""
    share = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.8, 0.1]])[:, None]

    def score(plans: Tensor) -> Tensor:
        goal = low + share[: len(plans)] * (high - low)
        return -30 * ((plans[:, :, 0] - goal) / (high - low)).square().sum(dim=2)

    return score


def _check_state(planner: AbstractPlanner, state: PlanState, contracts: Contracts) -> None:
    kept = state.kept.shape[1]
    like = state.mean
    contracts.column("PlanState.mean", state.mean, (LANES, planner.horizon, 2), like)
    contracts.column("PlanState.kept", state.kept, (LANES, kept, planner.horizon, 2), like)
    contracts.column("PlanState.last", state.last, (LANES, 2), like)
    contracts.holds(state.step.tolist() == [0] * LANES, "a new state counts no step", state.step)


def _check_plans(
    planner: AbstractPlanner, state: PlanState, bounds: tuple[Tensor, Tensor], contracts: Contracts
) -> None:
    """Check every candidate and every result over a few steps."""
    low, high = bounds
    goal, count = _goal(low, high), 0

    def score(plans: Tensor) -> Tensor:
        nonlocal count
        count += plans.shape[1]
        shape = LANES, plans.shape[1], planner.horizon, 2
        contracts.column("a batch of candidates", plans, shape, low)
        _legal(planner, plans, bounds, "candidates", contracts)
        return goal(plans)

    rng, before = generator(0), torch.get_rng_state()
    for step in range(1, STEPS + 1):
        copy, count = PlanState(*(part.clone() for part in state)), 0
        plan, after = planner.plan(score, state, low, high, rng)
        contracts.holds(equal(copy, state), "plan leaves the state it is given alone", "a changed state")
        contracts.holds(count <= planner.sequences, f"plan scores at most {planner.sequences} sequences", count)
        contracts.column("the plan", plan, (LANES, planner.horizon, 2), low)
        _legal(planner, plan, bounds, "the plan", contracts)
        same = [old.shape for old in state] == [new.shape for new in after]
        contracts.holds(same, "states keep their shapes", [tuple(part.shape) for part in after])
        contracts.holds(after.step.tolist() == [step] * LANES, "the state counts its steps", after.step)
        contracts.holds(torch.equal(after.last, plan[:, 0]), "the state's last action is the plan's first", after.last)
        state = after
    still = torch.equal(before, torch.get_rng_state())
    contracts.holds(still, "plan draws from its rng only", "torch's global random state moved")


def _check_search(
    planner: AbstractPlanner, state: PlanState, bounds: tuple[Tensor, Tensor], contracts: Contracts
) -> None:
    score, rounds = _goal(*bounds), 0

    def counted(plans: Tensor) -> Tensor:
        nonlocal rounds
        rounds += 1
        return score(plans)

    one, two = (planner.plan(score, state, *bounds, generator(1)) for _ in range(2))
    contracts.holds(equal((one[0], *one[1]), (two[0], *two[1])), "one seed and state give one plan", "two plans")
    first, rng = score(state.mean[:, None]), generator(2)
    warm = state
    for _ in range(STEPS):
        plan, warm = planner.plan(score, warm, *bounds, rng)
    better = score(plan[:, None]) > first
    contracts.holds(better.all(), f"{STEPS} searches improve the first action", (score(plan[:, None]), first))
    plan, _ = planner.plan(counted, state, *bounds, generator(3), lambda: False)
    contracts.holds(rounds == 1, "more() answering False ends the search after one iteration", f"{rounds} calls")
    _legal(planner, plan, bounds, "a plan cut short", contracts)
    contracts.refuses(
        ValueError,
        lambda: planner.plan(lambda plans: score(plans)[:, :1], state, *bounds, generator(0)),
        "a score of another shape than [b, s] is a ValueError",
    )


def _check_lanes(
    planner: AbstractPlanner, state: PlanState, bounds: tuple[Tensor, Tensor], contracts: Contracts
) -> None:
    score = _goal(*bounds)

    def disturbed(plans: Tensor) -> Tensor:
        scores = score(plans)
        return torch.cat([scores[:1], -scores[1:]])

    together, _ = planner.plan(score, state, *bounds, generator(4))
    beside, _ = planner.plan(disturbed, state, *bounds, generator(4))
    same = torch.equal(together[0], beside[0])
    contracts.holds(same, "a lane's plan does not depend on the scores of others", (together[0], beside[0]))
    alone, _ = planner.plan(score, PlanState(*(part[:1] for part in state)), *bounds, generator(4))
    contracts.holds(close(alone, together[:1]), "a lane alone is planned for as among others", (alone, together[0]))


def _check_broken_scores(
    planner: AbstractPlanner, state: PlanState, bounds: tuple[Tensor, Tensor], contracts: Contracts
) -> None:
    score = _goal(*bounds)
    plans = {}
    for value in (-torch.inf, torch.nan, torch.inf):

        def some_broken(plans: Tensor, value: float = value) -> Tensor:
            every_third = torch.arange(plans.shape[1]) % 3 == 0
            return score(plans).where(~every_third, value)

        def all_broken(plans: Tensor, value: float = value) -> Tensor:
            return score(plans) * 0 + value

        plans[value], after = planner.plan(some_broken, state, *bounds, generator(5))
        finite = all(bool(part.isfinite().all()) for part in after)
        contracts.holds(finite, f"states are finite where some scores are {value}", after)
        plan, after = planner.plan(all_broken, state, *bounds, generator(5))
        _legal(planner, plan, bounds, f"the plan where every score is {value}", contracts)
        finite = all(bool(part.isfinite().all()) for part in after)
        contracts.holds(finite, f"states are finite where every score is {value}", after)
    same = all(torch.equal(plan, plans[-torch.inf]) for plan in plans.values())
    contracts.holds(same, "scores of NaN and +inf count as -inf", plans)


def _legal(
    planner: AbstractPlanner, plans: Tensor, bounds: tuple[Tensor, Tensor], what: str, contracts: Contracts
) -> None:
    if planner.discrete:
        one_hot = ((plans == 0) | (plans == 1)).all() & (plans.sum(dim=-1) == 1).all()
        contracts.holds(one_hot, f"{what}: rows are one-hot", plans)
    else:
        inside = ((plans >= bounds[0]) & (plans <= bounds[1])).all()
        contracts.holds(inside, f"{what}: within the bounds", (plans.amin(dim=(0, 1)), plans.amax(dim=(0, 1))))
