import numpy as np
import pytest
import torch

from learneddyn.core import generator
from learneddyn.planners import CEM, CategoricalCEM
from learneddyn.planners.noise import truncated_normal

LOW, HIGH = torch.tensor([-2.0, 0.0]), torch.tensor([2.0, 1.0])


def quadratic(goal):
    """A score that is best where every action is ``goal [b, a]``."""

    def score(plans):
        return -((plans - goal[:, None, None]) / (HIGH - LOW)).square().sum(dim=(2, 3))

    return score


def pets(score, mean, candidates, elites, iterations, rng):
    """The loop of PETS in NumPy, one lane, on the noise that the planner draws."""
    low, high = LOW.numpy(), HIGH.numpy()
    var = np.tile((high - low) ** 2 / 16, (len(mean), 1))
    for _ in range(iterations):
        if var.max() <= 1e-3:
            break
        constrained = np.minimum(np.minimum(((mean - low) / 2) ** 2, ((high - mean) / 2) ** 2), var)
        noise = truncated_normal(candidates, *mean.shape, rng=rng).numpy()
        plans = mean + np.sqrt(constrained) * noise
        best = plans[np.argsort(-score(plans))[:elites]]
        mean = 0.1 * mean + 0.9 * best.mean(axis=0)
        var = 0.1 * var + 0.9 * best.var(axis=0)
    return mean


def test_cem_follows_the_loop_of_pets():
    goal = torch.tensor([[1.5, 0.2], [-1.0, 0.9], [0.0, 0.5]])
    planner = CEM(horizon=4, candidates=100, elites=10, iterations=12)
    state = planner.start(3, LOW, HIGH)
    for seed in range(2):
        plan, after = planner.plan(quadratic(goal), state, LOW, HIGH, generator(seed))
        for lane in range(3):

            def score(plans, lane=lane):
                return quadratic(goal[lane : lane + 1])(torch.as_tensor(plans)[None])[0].numpy()

            want = pets(score, state.mean[lane].numpy(), 100, 10, 12, generator(seed))
            np.testing.assert_allclose(plan[lane], want, atol=2e-4)
        middle = ((LOW + HIGH) / 2).expand(3, 2)
        torch.testing.assert_close(after.mean, torch.cat([plan[:, 1:], middle[:, None]], dim=1))
        state = after


def test_samples_stay_within_bounds_by_a_smaller_variance_not_by_clipping():
    planner = CEM(horizon=2, candidates=5000, elites=10, iterations=1)
    mean = torch.tensor([[[1.8, 0.5], [-1.99, 0.05]]])
    state = planner.start(1, LOW, HIGH)._replace(mean=mean)
    seen = []

    def score(plans):
        seen.append(plans[0])
        return plans.sum(dim=(2, 3))

    planner.plan(score, state, LOW, HIGH, generator(0))
    reach = torch.minimum(mean - LOW, HIGH - mean)
    far = (seen[0] - mean).abs().amax(dim=0)
    assert (far <= reach[0] + 1e-6).all()
    # Sure to come close: the cut, not something narrower, is what bounds the samples.
    assert (far >= 0.98 * torch.minimum(reach[0], (HIGH - LOW) / 2)).all()


def test_a_lane_that_has_converged_stops_by_itself():
    planner = CEM(horizon=3, candidates=64, elites=4, iterations=50, min_variance=0.01)
    goal = torch.tensor([[0.5, 0.5], [1.0, 0.3]])
    state = planner.start(2, LOW, HIGH)
    calls = []

    def score(plans):
        calls.append(1)
        # The second lane sees noise that changes with every call, and so settles later or never.
        noise = torch.rand(plans.shape[1], generator=generator(len(calls)))
        return torch.stack([quadratic(goal)(plans)[0], noise])

    both, _ = planner.plan(score, state, LOW, HIGH, generator(0))
    rounds = len(calls)
    alone_state = type(state)(*(part[:1] for part in state))
    alone, _ = planner.plan(quadratic(goal[:1]), alone_state, LOW, HIGH, generator(0))
    assert rounds > 5
    torch.testing.assert_close(both[:1], alone)


def test_the_mean_of_two_good_plans_is_bad_and_the_best_is_not():
    def two_peaks(plans):
        return -(plans[:, :, 0, 0].abs() - 1.0).abs()

    planners = [CEM(1, 200, 100, 1, execute=execute) for execute in ("mean", "best")]
    first = [p.plan(two_peaks, p.start(1, LOW, HIGH), LOW, HIGH, generator(0))[0][0, 0, 0] for p in planners]
    assert first[0].abs() < 0.5
    assert first[1].abs() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(("sequences", "iterations"), [(100, 2), (300, 3), (500, 4)])
def test_budgets(sequences, iterations):
    planner = CEM.of_budget(sequences)
    assert planner.sequences == sequences
    assert planner.iterations == iterations


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"horizon": 0}, "CEM: horizon must lie between 1 and 1e\\+06, got 0"),
        ({"candidates": 10, "elites": 11}, "CEM: elites must lie between 1 and 10, got 11"),
        ({"momentum": 1.5}, "momentum must lie between 0 and 1, got 1.5"),
        ({"momentum": float("nan")}, "momentum must lie between 0 and 1, got nan"),
        ({"execute": "worst"}, "execute must be 'mean' or 'best', got 'worst'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        CEM(**arguments)


def test_unknown_budget():
    with pytest.raises(ValueError, match=r"CEM: there are settings for \[100, 300, 500\] sequences, got 200"):
        CEM.of_budget(200)


def test_categorical_finds_the_best_sequence_of_actions():
    wanted = torch.tensor([[0, 2, 1, 1, 0, 2], [1, 1, 1, 0, 0, 2]])
    low, high = torch.zeros(3), torch.ones(3)

    def score(plans):
        return (plans.argmax(dim=3) == wanted[:, None]).float().sum(dim=2)

    planner = CategoricalCEM(horizon=6, candidates=200, iterations=6)
    plan, after = planner.plan(score, planner.start(2, low, high), low, high, generator(0))
    assert torch.equal(plan.argmax(dim=2), wanted)
    assert (after.mean.argmax(dim=2)[:, :-1] == wanted[:, 1:]).all()
    torch.testing.assert_close(after.mean[:, -1], torch.full((2, 3), 1 / 3))
    torch.testing.assert_close(after.mean.sum(dim=2), torch.ones(2, 6))


def test_categorical_draws_by_its_probabilities():
    planner = CategoricalCEM(horizon=1, candidates=20_000, elites=1, iterations=1, exploration=0.0)
    low, high = torch.zeros(3), torch.ones(3)
    probability = torch.tensor([[[0.2, 0.5, 0.3]]])
    seen = []

    def score(plans):
        seen.append(plans)
        return plans[:, :, 0, 0]

    planner.plan(score, planner.start(1, low, high)._replace(mean=probability), low, high, generator(0))
    torch.testing.assert_close(seen[0].mean(dim=1), probability, atol=0.02, rtol=0)
