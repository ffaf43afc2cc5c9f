"""A model that leaves the finite numbers in the middle of a rollout is noticed, with its members and the step."""

import pytest
import torch
from world_doubles import Shifts, never, still, task

from learneddyn.core import Outcome, generator
from learneddyn.world import Divergence, ModelDiverged, World, strict


class Breaks(Shifts):
    """Every member walks by 1; those chosen answer NaN from the position 3 on."""

    def __init__(self, members, broken):
        super().__init__([[1.0]] * members)
        self.broken = torch.tensor(broken)

    def sample(self, obs, action, member, rng, memory=None, *, noise=True):
        next_obs = super().sample(obs, action, member, rng).next_obs
        bad = torch.isin(member, self.broken) & (obs[:, 0] >= 3)
        return Outcome(torch.where(bad[:, None], torch.nan, next_obs))


def watched(model, **changes):
    seen = []
    return World(model, task(), sampler="tsinf", sentinel=seen.append, **changes), seen


def test_rollouts_name_member_and_step_once():
    world, seen = watched(Breaks(4, [2]))
    rows = world.rollout(torch.zeros(8, 1), still, 6, generator(0))
    assert seen == [Divergence(step=4, members=(2,), rows=2, of=8)]
    assert len(rows) == 6 * 6 + 2 * 3  # and the rows that diverge stop there
    assert rows.next_obs.isfinite().all()


def test_plans_name_members_and_step_once():
    world, seen = watched(Breaks(4, [1, 3]))
    returns = world.returns(torch.zeros(1, 1), torch.zeros(1, 2, 6, 1), generator(0), particles=4)
    assert seen == [Divergence(step=4, members=(1, 3), rows=4, of=8)]
    assert returns.tolist() == [[-torch.inf, -torch.inf]]


def test_rows_that_have_ended_are_no_divergence():
    world, seen = watched(Breaks(2, [0, 1]))
    world.task = task(terminated=lambda next_obs: next_obs[:, 0] >= 3)
    world.returns(torch.zeros(1, 1), torch.zeros(1, 3, 6, 1), generator(0), particles=2)
    assert seen == []


def test_a_sound_model_never_calls_and_the_numbers_do_not_change():
    def refuse(divergence):
        raise AssertionError(divergence)

    plans = torch.rand(1, 5, 4, 1)
    bare, guarded = (
        World(Shifts([[0.3], [-0.1]], std=0.2), task(), sampler="ts1", sentinel=sentinel) for sentinel in (None, refuse)
    )
    first, second = (world.returns(torch.zeros(1, 1), plans, generator(1), 3) for world in (bare, guarded))
    assert torch.equal(first, second)


def test_strict_raises_with_the_names():
    world = World(Breaks(3, [0]), task(terminated=never), sampler="tsinf", sentinel=strict)
    with pytest.raises(ModelDiverged, match="member 0 of the model left the finite numbers at step 4 of a rollout, in"):
        world.rollout(torch.zeros(6, 1), still, 9, generator(0))
    assert issubclass(ModelDiverged, FloatingPointError)
