import json
import math

import pytest
import torch
from world_doubles import Shifts

from learneddyn.core import Outcome, State, Task, generator
from learneddyn.tasks.endless import never
from learneddyn.world import Bounded, World

TASK = Task("Bounded-v0", lambda obs, action, after: after[:, 0], never)


def stepped(sampler, obs, shift=(0.0, 0.0, 0.0)):
    world = World(Shifts([list(shift)]), TASK, sampler=sampler)
    state = world.start(torch.tensor([obs]), generator(0))
    after, step = world.step(state, torch.zeros(1, 3), generator(0))
    return after.obs[0], step


def test_pairs_are_normalised_then_angles_wrapped_then_columns_clamped():
    bounded = Bounded("mean", low=[-0.5, None, -1.0], high=[0.5, math.inf, 1.0], unit_pairs=[(0, 1)], angles=[2])
    obs, step = stepped(bounded, [3.0, 4.0, 5.0])
    torch.testing.assert_close(obs, torch.tensor([0.5, 0.8, -1.0]))
    assert step.reward == pytest.approx(0.5), "the reward is that of the observation that goes on"
    assert bool(step.trusted)
    torch.testing.assert_close(
        stepped(Bounded("mean", angles=[2]), [3.0, 4.0, 5.0])[0][2], torch.tensor(5 - 2 * math.pi)
    )


def test_a_prediction_that_has_diverged_does_not_stand_at_the_bound():
    bounded = Bounded("mean", low=[-1.0] * 3, high=[1.0] * 3)
    assert bool(stepped(bounded, [0.0, 0.0, 0.0], shift=(9.0, 0.0, 0.0))[1].trusted)
    for broken in (math.inf, -math.inf, math.nan):
        assert not bool(stepped(bounded, [0.0, 0.0, 0.0], shift=(0.0, broken, 0.0))[1].trusted)


def test_infinite_pairs_and_angles_stay_infinite():
    bounded = Bounded("mean", unit_pairs=[(0, 1)], angles=[2])
    bounded.sampler = lambda state, *_: (state, Outcome(state.obs))
    broken = torch.tensor([[math.inf, 0.5, -math.inf], [0.5, -math.inf, math.inf], [math.inf, math.inf, 1.0]])
    state = State(broken, torch.zeros(3, dtype=torch.long))
    after, outcome = bounded(state, torch.zeros(3, 3), Shifts([[0.0] * 3]), generator(0))
    torch.testing.assert_close(after.obs, broken)
    torch.testing.assert_close(outcome.next_obs, broken)


def test_arguments_are_json_and_make_the_same_bounds():
    bounded = Bounded("ts1", low=[-math.inf, -0.1], high=[2, None], angles=[1])
    arguments = json.loads(json.dumps(bounded.arguments, allow_nan=False))
    assert arguments == {"low": [None, -0.1], "high": [2.0, None], "unit_pairs": [], "angles": [1]}
    again = Bounded("ts1", **arguments)
    assert again.arguments == bounded.arguments
    assert torch.equal(again.low, bounded.low)
    assert Bounded("ts1", unit_pairs=[(0, 1)]).arguments["low"] is None


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"low": [0.0]}, "low and high belong together"),
        ({"low": [0.0], "high": [1.0, 2.0]}, "low and high belong together"),
        ({"low": [2.0], "high": [1.0]}, "low must not exceed high"),
        ({"low": [math.nan], "high": [1.0]}, "low must not exceed high"),
        ({"low": [math.inf], "high": [math.inf]}, "low must not exceed high"),
        ({"unit_pairs": [[0]]}, "pairs of columns"),
        ({"unit_pairs": [[0, 1]], "angles": [1]}, "each once"),
        ({"angles": [-1]}, "integers of at least 0"),
    ],
)
def test_bounds_that_mean_nothing_are_refused(arguments, told):
    with pytest.raises(ValueError, match=told):
        Bounded("elite", **arguments)


def test_a_world_refuses_unknown_samplers_and_columns():
    with pytest.raises(ValueError, match=r"unknown sampler 'best', allowed are \['elite', 'mean'"):
        Bounded("best")
    model = Shifts([[0.0, 0.0]])
    with pytest.raises(ValueError, match="one bound per observation column, 2, got 3"):
        World(model, TASK, sampler=Bounded("elite", low=[0.0] * 3, high=[1.0] * 3))
    with pytest.raises(ValueError, match="columns from 0 to 1, got 2"):
        World(model, TASK, sampler=Bounded("elite", angles=[2]))
