"""A single lane in NumPy is the single lane in PyTorch; a penalty costs no second question."""

import numpy as np
import pytest
import torch
from world_doubles import Shifts, first_column, never, task

from learneddyn.core import generator
from learneddyn.models import ProbabilisticEnsemble
from learneddyn.testing import example_transitions
from learneddyn.world import PENALTIES, Row, World, elite, step_row, steps_rows, within_box

HEADS = {"learn_reward": True, "learn_termination": True}
NO_TASK = {"reward": None, "terminated": None}


def fitted(**options):
    model = ProbabilisticEnsemble(**{"num_members": 4, "num_elites": 3, "hidden": (16, 16), "max_epochs": 2} | options)
    model.fit(example_transitions(), rng=generator(0))
    return model


def beyond(next_obs):
    return next_obs[:, 0] > 0.3


WORLDS = {
    "heads": lambda: World(fitted(**HEADS, angles=(1,)), task(**NO_TASK)),
    "task": lambda: World(fitted(), task(terminated=beyond)),
    "every member": lambda: World(fitted(), task(), sampler="ts1"),
    "one member": lambda: World(fitted(), task(), sampler="tsinf"),
    "box": lambda: World(fitted(), task(), trust=within_box(torch.full((3,), -4.0), torch.full((3,), 4.0))),
    "halt": lambda: World(
        fitted(), task(), trust=within_box(torch.full((3,), -4.0), torch.full((3,), 4.0)), halt_reward=-7.0
    ),
    "kept": lambda: World(
        fitted(), task(), trust=within_box(torch.full((3,), -4.0), torch.full((3,), 4.0)), halt_reward="kept"
    ),
    "bf16": lambda: World(fitted(precision="bf16"), task()),
}


@pytest.mark.parametrize("name", WORLDS)
def test_a_row_steps_as_its_world(name):
    world, rng, row_rng = WORLDS[name](), generator(3), generator(3)
    state = world.start(torch.tensor([[0.1, -0.2, 0.3]]), generator(0))
    row = Row(state.obs.numpy()[0], int(state.member))
    assert steps_rows(world)
    seen = set()
    for action in 2 * torch.rand(40, 1, 2, generator=generator(1)) - 1:
        with torch.no_grad():
            state, step = world.step(state, action, rng)
        row, ended = step_row(world, row, action.numpy()[0], row_rng)
        np.testing.assert_allclose(row.obs, state.obs[0].numpy(), rtol=2e-5, atol=2e-6)
        assert row.member == int(state.member)
        assert ended.reward == pytest.approx(float(step.reward), rel=2e-5, abs=2e-6)
        assert (ended.terminated, ended.trusted) == (bool(step.terminated), bool(step.trusted))
        assert row.state().member.tolist() == state.member.tolist()
        state, seen = state._replace(obs=torch.from_numpy(row.obs[None])), seen | {ended[1:]}
    assert torch.equal(rng.get_state(), row_rng.get_state())
    assert len(seen) > (name in ("heads", "task", "box", "halt", "kept"))


def test_a_row_of_a_broken_model_stays_where_it_was():
    world = World(fitted(), task())
    with torch.no_grad():
        world.dynamics.biases[-1].fill_(torch.nan)
    before = Row(np.ones(3, np.float32), 0)
    after, step = step_row(world, before, np.zeros(2, np.float32), generator(0))
    assert after.obs.tolist() == before.obs.tolist()
    assert step == (0.0, False, False)


def test_a_row_sees_new_weights_and_elites():
    world = World(fitted(), task())
    before, action = Row(np.ones(3, np.float32), 0), np.zeros(2, np.float32)
    first = step_row(world, before, action, generator(0))[0]
    with torch.no_grad():
        world.dynamics.weights[0].mul_(1.5)
        world.dynamics.elites.fill_(3)
    second = step_row(world, before, action, generator(0))[0]
    assert second.member == 3
    assert not np.array_equal(first.obs, second.obs)


def test_other_worlds_do_not_step_rows():
    class Tired(World):
        pass

    model = fitted()
    assert not steps_rows(World(model, task(), sampler="mean"))
    assert not steps_rows(World(model, task(), penalty=PENALTIES["ensemble_std"], penalty_weight=1.0))
    assert not steps_rows(Tired(model, task()))
    assert not steps_rows(World(Shifts([[0.0]]), task()))
    assert not steps_rows(World(model, task(), sampler=lambda *parts: elite(*parts)))
    with pytest.raises(ValueError, match="has no reward head"):
        world = World(model, task())
        world.task = task(reward=None)
        step_row(world, Row(np.ones(3, np.float32), 0), np.zeros(2, np.float32), generator(0))


@pytest.mark.parametrize("lanes", [1, 3, 300])
@pytest.mark.parametrize("sampler", ["elite", "ts1", "mean"])
def test_a_penalty_is_subtracted_from_the_same_draw(lanes, sampler):
    model = fitted(learn_reward=True)
    obs, action = torch.randn(lanes, 3, generator=generator(0)), torch.zeros(lanes, 2)
    free = World(model, task(reward=None), sampler=sampler)
    paid = World(model, task(reward=None), sampler=sampler, penalty=PENALTIES["loo_kl"], penalty_weight=0.1)
    start = free.start(obs, generator(1))
    with torch.no_grad():
        after, step = free.step(start, action, generator(2))
        same, charged = paid.step(start, action, generator(2))
        penalty = PENALTIES["loo_kl"](obs, action, model.predict(obs, action), after)
    torch.testing.assert_close(same.obs, after.obs, rtol=2e-5, atol=2e-6)
    assert same.member.tolist() == after.member.tolist()
    torch.testing.assert_close(charged.reward, step.reward - 0.1 * penalty, rtol=1e-4, atol=1e-4)


def test_gradients_flow_through_a_penalised_step():
    model = fitted()
    world = World(model, task(), penalty=PENALTIES["ensemble_std"], penalty_weight=1.0)
    action = torch.zeros(5, 2, requires_grad=True)
    _, step = world.step(world.start(torch.zeros(5, 3), generator(0)), action, generator(0))
    step.reward.sum().backward()
    assert action.grad.abs().sum() > 0


def test_a_sampler_that_asks_about_other_rows_gets_a_penalty_for_its_own():
    class Counted(Shifts):
        asked = 0

        def predict(self, obs, action, memory=None):
            self.asked += 1
            return super().predict(obs, action, memory)

        def sample_and_predict(self, obs, action, member, rng, memory=None, *, noise=True):
            return self.sample(obs, action, member, rng, memory, noise=noise), super().predict(obs, action, memory)

    def elsewhere(state, action, dynamics, rng):
        return elite(state._replace(obs=state.obs + 100), action, dynamics, rng)

    def where(obs, action, prediction, after):
        return prediction.mean[0, :, 0]

    for sampler, asked in (("elite", 0), ("mean", 1), (elsewhere, 1)):
        model = Counted([[0.0], [0.0]])
        world = World(model, task(reward=first_column, terminated=never), sampler=sampler, penalty=where)
        world.penalty_weight = 1.0
        _, step = world.step(world.start(torch.full((2, 1), 5.0), generator(0)), torch.zeros(2, 1), generator(0))
        assert model.asked == asked
        assert step.reward.tolist() == ([100.0] * 2 if sampler is elsewhere else [0.0] * 2)


def test_bf16_penalties_differ_little():
    full, half = fitted(hidden=(64, 64)), fitted(hidden=(64, 64), precision="bf16")
    half.load_state_dict(full.state_dict())
    obs, action = torch.randn(600, 3, generator=generator(0)), torch.zeros(600, 2)
    rewards = []
    for model in (full, half):
        world = World(
            model, task(reward=lambda *_: torch.zeros(600)), penalty=PENALTIES["max_aleatoric"], penalty_weight=1.0
        )
        with torch.no_grad():
            rewards.append(world.step(world.start(obs, generator(1)), action, generator(2))[1].reward)
    off = ((rewards[1] - rewards[0]) / rewards[0]).abs()
    assert 0 < off.median() < 0.01
    assert off.max() < 0.1
