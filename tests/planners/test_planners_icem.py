import pytest
import torch

from learneddyn.core import generator
from learneddyn.planners import ICEM

LOW, HIGH = torch.tensor([-2.0, 0.0]), torch.tensor([2.0, 1.0])


def recorded(score, seen):
    def call(plans):
        seen.append(plans.clone())
        return score(plans)

    return call


def to_goal(plans):
    goal = torch.tensor([1.0, 0.8])
    return -((plans - goal) / (HIGH - LOW)).square().sum(dim=(2, 3))


@pytest.mark.parametrize("sequences", [100, 300, 500, 4000])
def test_budgets_are_what_they_say(sequences):
    planner, count = ICEM.of_budget(sequences, horizon=5), 0

    def score(plans):
        nonlocal count
        count += plans.shape[1]
        return to_goal(plans)

    assert planner.sequences == pytest.approx(sequences, rel=0.02)
    planner.plan(score, planner.start(1, LOW, HIGH), LOW, HIGH, generator(0))
    assert count == planner.sequences


def test_finds_the_optimum_of_a_quadratic():
    planner = ICEM(horizon=5, candidates=100, iterations=10, beta=0.5)
    state, rng = planner.start(2, LOW, HIGH), generator(0)
    for _ in range(5):
        plan, state = planner.plan(to_goal, state, LOW, HIGH, rng)
    torch.testing.assert_close(plan, torch.tensor([1.0, 0.8]).expand(2, 5, 2), atol=0.05, rtol=0)


def test_draws_fewer_plans_each_time_but_two_per_elite():
    planner, seen = ICEM(horizon=3, candidates=50, elites=10, iterations=5, decay=1.25, keep=0.3), []
    planner.plan(recorded(to_goal, seen), planner.start(1, LOW, HIGH), LOW, HIGH, generator(0))
    assert [plans.shape[1] for plans in seen] == [53, 40, 32, 25, 20]


def test_best_plans_live_on_shifted_with_a_fresh_last_action():
    planner, seen = ICEM(horizon=4, candidates=40, iterations=2), []
    state = planner.start(2, LOW, HIGH)
    _, state = planner.plan(recorded(to_goal, seen), state, LOW, HIGH, generator(0))
    last_round = seen[-1].gather(1, to_goal(seen[-1]).argmax(dim=1)[:, None, None, None].expand(-1, 1, 4, 2))[:, 0]
    seen.clear()
    planner.plan(recorded(to_goal, seen), state, LOW, HIGH, generator(1))
    revived = seen[0][:, -3:]
    torch.testing.assert_close(revived[:, :, :-1], state.kept[:, :, :-1])
    assert (revived[:, :, -1] != state.kept[:, :, -1]).any()
    best_lived_on = (revived[:, :, :-1] == last_round[:, None, 1:]).all(dim=(2, 3)).any(dim=1)
    assert best_lived_on.any()


def test_nothing_is_kept_at_the_start_of_an_episode():
    """The middle stands where kept plans would: it must not win in a fresh lane, however good it is."""
    planner = ICEM(horizon=3, candidates=40, iterations=2)
    fresh = planner.start(2, LOW, HIGH)
    middle = ((LOW + HIGH) / 2).expand(3, 2)

    def only_middle(plans):
        return (plans[:, :, :-1] - middle[:-1]).abs().sum(dim=(2, 3)).eq(0).float()

    plan, _ = planner.plan(only_middle, fresh, LOW, HIGH, generator(0))
    assert not torch.equal(plan[0, :-1], middle[:-1])
    lane_two_goes_on = fresh._replace(step=torch.tensor([0, 1]))
    plan, _ = planner.plan(only_middle, lane_two_goes_on, LOW, HIGH, generator(0))
    assert not torch.equal(plan[0, :-1], middle[:-1])
    assert torch.equal(plan[1, :-1], middle[:-1])


def test_elites_keep_their_scores_without_being_scored_again():
    """A score that falls with every call: the first round's best must still be the result."""
    planner, calls, seen = ICEM(horizon=3, candidates=40, iterations=3), [], []

    def falling(plans):
        calls.append(1)
        return to_goal(plans) - 100 * len(calls)

    state = planner.start(1, LOW, HIGH)
    plan, _ = planner.plan(recorded(falling, seen), state, LOW, HIGH, generator(0))
    first = seen[0][:, :40]
    torch.testing.assert_close(plan[0], first[0, to_goal(first)[0].argmax()])


def test_the_last_round_scores_the_mean_and_the_next_search_starts_from_it():
    planner, seen = ICEM(horizon=3, candidates=40, iterations=1, momentum=0.0), []
    mean = torch.tensor([[[0.3, 0.4], [0.5, 0.6], [0.7, 0.8]]])
    state = planner.start(1, LOW, HIGH)._replace(mean=mean)
    _, after = planner.plan(recorded(to_goal, seen), state, LOW, HIGH, generator(0))
    torch.testing.assert_close(seen[0][0, 0], mean[0])
    torch.testing.assert_close(after.mean[:, -1], after.mean[:, -2])


def test_restarted_lanes_forget_and_others_do_not():
    planner = ICEM(horizon=3, candidates=40)
    fresh = planner.start(3, LOW, HIGH)
    _, state = planner.plan(to_goal, fresh, LOW, HIGH, generator(0))
    mixed = state.restarted(torch.tensor([False, True, False]), fresh)
    for got, old, new in zip(mixed, state, fresh, strict=True):
        assert torch.equal(got[1], new[1])
        assert torch.equal(got[[0, 2]], old[[0, 2]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"elites": 50}, "ICEM: elites must lie between 1 and 40, got 50"),
        ({"decay": 0.5}, "decay must lie between 1 and 100, got 0.5"),
        ({"keep": 1.5}, "keep must lie between 0 and 1, got 1.5"),
        ({"beta": -1.0}, "beta must lie between 0 and 100, got -1.0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        ICEM(**arguments)


def test_unknown_budget():
    with pytest.raises(ValueError, match=r"ICEM: there are settings for \[100, 300, 500, 4000\] sequences, got 50"):
        ICEM.of_budget(50)
