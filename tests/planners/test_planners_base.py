"""What is not finite, the gradient planner, and the check of the contracts itself."""

import pytest
import torch

from learneddyn.core import generator
from learneddyn.planners import CEM, ICEM, GradientPlanner, RandomShooting
from learneddyn.planners.base import Best, Elites, select, shifted
from learneddyn.testing import ContractError, check_planner

LOW, HIGH = torch.tensor([-2.0, 0.0]), torch.tensor([2.0, 1.0])
GOAL = torch.tensor([1.0, 0.8])


def to_goal(plans):
    return -((plans - GOAL) / (HIGH - LOW)).square().sum(dim=(2, 3))


def test_moments_leave_out_what_is_not_finite():
    plans = torch.tensor([[1.0, 3.0, 100.0], [5.0, 6.0, 7.0]])[:, :, None, None]
    elites = Elites(plans, torch.tensor([[2.0, 1.0, -torch.inf], [-torch.inf] * 3]))
    fallback = torch.tensor([-1.0, -2.0])[:, None, None]
    assert elites.mean_or(fallback).flatten().tolist() == [2.0, -2.0]
    assert elites.variance_or(fallback).flatten().tolist() == [1.0, -2.0]


def test_select_and_best_keep_the_best_of_every_lane():
    plans = torch.arange(6.0).view(2, 3, 1, 1)
    elites = select(plans, torch.tensor([[1.0, 3.0, 2.0], [-torch.inf, 5.0, 4.0]]), 2)
    assert elites.plans.flatten().tolist() == [1, 2, 4, 5]
    best = Best.none_yet(torch.full((2, 1, 1), -9.0)).or_better(elites)
    assert best.plan.flatten().tolist() == [1, 4]
    worse = best.or_better(elites._replace(scores=elites.scores - 1, plans=elites.plans + 50))
    assert torch.equal(worse.plan, best.plan)


def test_shift_drops_the_first_action():
    plans = torch.arange(6.0).view(1, 3, 2)
    assert shifted(plans, torch.tensor([9.0, 9.0])).tolist() == [[[2, 3], [4, 5], [9, 9]]]


def test_random_shooting_returns_the_best_of_uniform_plans():
    planner, seen = RandomShooting(3, 2000), []

    def score(plans):
        seen.append(plans)
        return to_goal(plans)

    plan, _ = planner.plan(score, planner.start(1, LOW, HIGH), LOW, HIGH, generator(0))
    torch.testing.assert_close(plan[0], seen[0][0, to_goal(seen[0])[0].argmax()])
    torch.testing.assert_close(seen[0].mean(dim=(0, 1, 2)), (LOW + HIGH) / 2, atol=0.05, rtol=0)
    assert (seen[0].amax(dim=(0, 1, 2)) > 0.98 * HIGH).all()


def test_gradient_ascent_finds_the_optimum_and_needs_few_scores():
    planner = GradientPlanner(4, candidates=2, iterations=100, learning_rate=0.1)
    plan, _ = planner.plan(to_goal, planner.start(2, LOW, HIGH), LOW, HIGH, generator(0))
    torch.testing.assert_close(plan, GOAL.expand(2, 4, 2), atol=0.02, rtol=0)


def test_gradient_ascent_climbs_beside_candidates_that_break():
    def half_broken(plans):
        index = torch.arange(plans.shape[1])
        return (to_goal(plans) / (index % 2)).where(index % 2 == 1, torch.nan)

    planner = GradientPlanner(4, candidates=4, iterations=100)
    plan, state = planner.plan(half_broken, planner.start(1, LOW, HIGH), LOW, HIGH, generator(0))
    torch.testing.assert_close(plan, GOAL.expand(1, 4, 2), atol=0.02, rtol=0)
    assert all(part.isfinite().all() for part in state)


def test_gradient_ascent_refuses_a_score_without_gradient():
    planner = GradientPlanner(3)
    with pytest.raises(ValueError, match="needs a score with a gradient"):
        planner.plan(lambda plans: to_goal(plans.detach()), planner.start(1, LOW, HIGH), LOW, HIGH, generator(0))


class Leaves(RandomShooting):
    """Leaves the bounds."""

    def plan(self, score, state, low, high, rng, more=None):
        plan, after = super().plan(score, state, low, high, rng)
        return 2 * plan + 9, after._replace(last=2 * after.last + 9)


class Remembers(RandomShooting):
    """Hides state: no two calls agree."""

    calls = 0

    def plan(self, score, state, low, high, rng, more=None):
        self.calls += 1
        plan, after = super().plan(score, state, low, high, rng.manual_seed(self.calls))
        return plan, after


class Global(RandomShooting):
    """Draws from the global generator."""

    def plan(self, score, state, low, high, rng, more=None):
        torch.rand(1)
        return super().plan(score, state, low, high, rng)


class Overspends(RandomShooting):
    """Scores more plans than it admits."""

    @property
    def sequences(self):
        return self.candidates - 1


class Mingles(CEM):
    """Averages over lanes."""

    def plan(self, score, state, low, high, rng, more=lambda: True):
        plan, after = super().plan(score, state, low, high, rng, more)
        plan = plan.mean(dim=0, keepdim=True).expand_as(plan)
        return plan, after._replace(last=plan[:, 0])


class Trusting(RandomShooting):
    """Takes NaN for the best score there is."""

    def plan(self, score, state, low, high, rng, more=None):
        return super().plan(lambda plans: score(plans).nan_to_num(nan=1e6), state, low, high, rng)


class Stubborn(ICEM):
    """Never ends early."""

    def plan(self, score, state, low, high, rng, more=None):
        return super().plan(score, state, low, high, rng)


class Idle(RandomShooting):
    """Scores its plans and returns the one it started from."""

    def plan(self, score, state, low, high, rng, more=None):
        _, after = super().plan(score, state, low, high, rng)
        return state.mean, after._replace(last=state.mean[:, 0])


@pytest.mark.parametrize(
    ("planner", "contract"),
    [
        (Leaves, "the plan: within the bounds"),
        (Remembers, "one seed and state give one plan"),
        (Global, "plan draws from its rng only"),
        (Overspends, "plan scores at most 999 sequences"),
        (Mingles, "improve the first action|does not depend on the scores of others"),
        (Trusting, "scores of NaN and \\+inf count as -inf"),
        (Stubborn, "ends the search after one iteration"),
        (Idle, "improve the first action"),
    ],
)
def test_every_broken_contract_is_named(planner, contract):
    with pytest.raises(ContractError, match=contract):
        check_planner(planner())
