"""The loop over worst cases, its searches, and its tabular form with known optima."""

import numpy as np
import pytest
import torch

from learneddyn.agents.iwocs_tabular import (
    TabularModels,
    optimal_q,
    policy_values,
    robust_q,
    tabular_iwocs,
    windy_walk,
)
from learneddyn.agents.worst_case import cma_es, every, grid, incremental
from learneddyn.core import generator

WINDS = np.linspace(0, 0.5, 25).tolist()


def random_models(count=6, states=5, actions=3, seed=0):
    rng = generator(seed)
    transition = torch.rand(count, states, actions, states, generator=rng, dtype=torch.float64) ** 4
    reward = torch.rand(count, states, actions, generator=rng, dtype=torch.float64)
    return TabularModels(transition / transition.sum(dim=3, keepdim=True), reward, 0.9, 0)


def test_windy_walk_is_solved_in_two_rounds():
    """Five steps without wind; with wind the second corridor, at the value of the rectangular robust optimum."""
    models = windy_walk(WINDS)
    found = tabular_iwocs(models)
    first, second = found.rounds
    assert first.promised == pytest.approx(-(1 - 0.95**5) / 0.05)
    assert first.value == pytest.approx(-12.348, abs=1e-3)
    assert (first.solved, first.worst) == (0, 24)
    assert second.promised == pytest.approx(-8.141, abs=1e-3)
    assert second.value == pytest.approx(second.promised, abs=1e-6)
    assert float(robust_q(models)[models.start].max()) == pytest.approx(-8.141, abs=1e-3)


@pytest.mark.parametrize("models", [windy_walk(WINDS), random_models(), random_models(seed=1)], ids=["walk", "a", "b"])
def test_minima_fall_and_stay_above_the_rectangular_robust_value(models):
    found, robust = tabular_iwocs(models, tolerance=0.0), robust_q(models)
    assert len(found.q) > 1
    assert (found.q.diff(dim=0) <= 1e-12).all()
    assert (found.q >= robust - 1e-8).all()
    assert [turn.promised for turn in found.rounds] == sorted((turn.promised for turn in found.rounds), reverse=True)
    # The worst value is at least what the rectangular adversary leaves of this very policy.
    assert found.rounds[-1].value == pytest.approx(float(policy_values(models, found.policy)[:, models.start].min()))


def test_one_model_is_an_ordinary_problem():
    models = random_models(count=1)
    found = tabular_iwocs(models)
    assert len(found.rounds) == 1
    torch.testing.assert_close(found.q[0], optimal_q(models)[0])
    torch.testing.assert_close(robust_q(models), optimal_q(models)[0])
    values = policy_values(models, found.policy)
    torch.testing.assert_close(values, found.q.amax(dim=2), atol=1e-8, rtol=0)


def test_optimal_policies_are_best_in_their_models():
    models = random_models()
    q = optimal_q(models)
    every_policy = torch.cartesian_prod(*[torch.arange(3)] * 5)
    best = torch.stack([policy_values(models, policy) for policy in every_policy]).amax(dim=0)
    torch.testing.assert_close(q.amax(dim=2), best, atol=1e-8, rtol=0)


def test_the_loop_stops_by_promise_by_budget_and_at_a_known_model():
    """Models are numbers; a policy is the least of those solved, promises it, and is worth a given number in each."""

    def run(worth, tolerance=0.0, rounds=9):
        return incremental(
            3,
            float,
            lambda solved: (min(solved), min(solved)),
            every(list(range(4))),
            lambda policy, models: [worth(policy, model) for model in models],
            tolerance=tolerance,
            rounds=rounds,
        )[1]

    kept = run(lambda policy, model: max(policy, model))
    assert [(turn.solved, turn.worst) for turn in kept] == [(3, 0)]
    falling = run(lambda policy, model: model + 0.5 if model > policy - 2 else 9.0)
    assert [turn.solved for turn in falling] == [3, 2, 1, 0]  # 0 would be solved again
    assert falling[-1].worst == 0
    assert len(run(lambda policy, model: model + 0.5 if model > policy - 2 else 9.0, rounds=2)) == 2
    assert len(run(lambda policy, model: model + 0.5 if model > policy - 2 else 9.0, tolerance=0.5)) == 1


def test_a_grid_holds_the_corners():
    assert grid((1.0, 10.0), (3.0, 20.0), 2) == [(1.0, 10.0), (1.0, 20.0), (3.0, 10.0), (3.0, 20.0)]
    assert len(grid([0.0] * 3, [1.0] * 3, 5)) == 125


def test_cma_es_finds_the_minimum_and_stays_in_the_box():
    asked = []

    def value(models):
        asked.extend(models)
        return [(x - 1.5) ** 2 + (y - 30.0) ** 2 for x, y in models]

    worst, least = cma_es((1.0, 10.0), (2.0, 20.0), generations=20, population=10, seed=3)(value)
    assert least == min((x - 1.5) ** 2 + (y - 30.0) ** 2 for x, y in asked)
    assert worst == pytest.approx((1.5, 20.0), abs=0.02)
    assert len(asked) == 200
    assert all(1 <= x <= 2 and 10 <= y <= 20 for x, y in asked)
    again, _ = cma_es((1.0, 10.0), (2.0, 20.0), generations=20, population=10, seed=3)(value)
    assert again == worst


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: every([]), "at least one model"),
        (lambda: grid((0.0,), (0.0,), 3), "every low below its high"),
        (lambda: grid((0.0,), (1.0, 2.0), 3), "as many low as high"),
        (lambda: grid((0.0,), (1.0,), 1), "at least 2 points"),
        (lambda: cma_es((0.0,), (1.0,), population=1), "population must be at least"),
        (lambda: tabular_iwocs(random_models(), first=6), "one of the 6 models, got 6"),
        (lambda: tabular_iwocs(random_models(), rounds=0), "rounds must be at least 1"),
        (lambda: windy_walk([1.5]), r"in \[0, 1\]"),
        (lambda: TabularModels(torch.ones(1, 2, 1, 2).double(), torch.zeros(1, 2, 1).double(), 0.9, 0), "distribution"),
        (
            lambda: TabularModels(torch.eye(2).double()[None, :, None], torch.zeros(1, 2, 1).double(), 1.0, 0),
            "discount",
        ),
        (lambda: TabularModels(torch.eye(2).double()[None, :, None], torch.zeros(1, 2, 1).double(), 0.9, 2), "start"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
