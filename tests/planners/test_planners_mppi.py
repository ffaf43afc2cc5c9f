import pytest
import torch

from learneddyn.core import generator
from learneddyn.planners import MPPI

LOW, HIGH = torch.tensor([-2.0, 0.0]), torch.tensor([2.0, 1.0])
FORMS = ["information", "smoothed"]


def to_goal(plans):
    goal = torch.tensor([1.0, 0.8])
    return -((plans - goal) / (HIGH - LOW)).square().sum(dim=(2, 3))


def searched(planner, score=to_goal, state=None, seed=0):
    seen = []

    def call(plans):
        seen.append(plans)
        return score(plans)

    state = planner.start(2, LOW, HIGH) if state is None else state
    plan, after = planner.plan(call, state, LOW, HIGH, generator(seed))
    return plan, after, seen


@pytest.mark.parametrize("form", FORMS)
def test_a_hot_average_is_the_plain_mean_of_the_plans(form):
    plan, _, seen = searched(MPPI(4, 50, temperature=1e9, form=form))
    torch.testing.assert_close(plan, seen[0].mean(dim=1))


@pytest.mark.parametrize("form", FORMS)
def test_a_cold_average_is_the_best_plan(form):
    plan, _, seen = searched(MPPI(4, 50, temperature=1e-9, form=form))
    best = seen[0][torch.arange(2), to_goal(seen[0]).argmax(dim=1)]
    torch.testing.assert_close(plan, best)


@pytest.mark.parametrize("form", FORMS)
def test_constants_change_nothing(form):
    planner = MPPI(4, 50, iterations=3, form=form)
    plain, _, _ = searched(planner)
    moved, _, _ = searched(planner, lambda plans: to_goal(plans) + 512)
    torch.testing.assert_close(plain, moved, atol=1e-4, rtol=0)


def test_smoothed_plans_are_filtered_from_the_last_action_on():
    planner = MPPI(3, 20, form="smoothed", smoothing=0.25, std=1e-6)
    start = planner.start(1, LOW, HIGH)
    state = start._replace(mean=torch.full((1, 3, 2), 0.8), last=torch.tensor([[0.0, 0.4]]))
    _, _, (plans,) = searched(planner, state=state)
    want = [[0.2, 0.5], [0.35, 0.575], [0.4625, 0.63125]]
    torch.testing.assert_close(plans[0, 0], torch.tensor(want), atol=1e-4, rtol=0)


def test_the_information_form_charges_the_noise_that_the_clip_leaves():
    """With one wide-open score the weights are the control cost alone, computed here by hand."""
    planner = MPPI(2, 30, temperature=2.0, std=0.5, form="information")
    mean = torch.tensor([[[1.0, 0.9], [-1.5, 0.5]]])
    state = planner.start(1, LOW, HIGH)._replace(mean=mean)
    plan, after, (plans,) = searched(planner, lambda plans: torch.zeros(plans.shape[:2]), state)
    noise, std = plans[0] - mean[0], torch.tensor([1.0, 0.25])
    assert plans.amin(dim=(0, 1, 2)).ge(LOW).all()
    middle = (LOW + HIGH) / 2
    cost = 2.0 * ((mean[0] - middle) * noise / std**2).sum(dim=(1, 2))
    weight = (-cost / 2.0).softmax(dim=0)
    torch.testing.assert_close(plan[0], mean[0] + (weight[:, None, None] * noise).sum(dim=0))
    torch.testing.assert_close(after.mean[0, -1], middle)


@pytest.mark.parametrize("form", FORMS)
def test_repeated_averages_approach_the_optimum(form):
    planner = MPPI(3, 500, iterations=20, temperature=1e-3, std=0.2, form=form)
    plan, _, _ = searched(planner)
    torch.testing.assert_close(plan, torch.tensor([1.0, 0.8]).expand(2, 3, 2), atol=0.2, rtol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": 0.0}, "temperature must lie between 1e-12 and 1e\\+12, got 0.0"),
        ({"smoothing": 0.0}, "smoothing must lie between 1e-06 and 1, got 0.0"),
        ({"form": "pddm"}, "form must be 'information' or 'smoothed', got 'pddm'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        MPPI(**arguments)
