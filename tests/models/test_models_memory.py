"""Models with a memory: it holds what the observation does not show, grows along logs, and begins anew with episodes.

What is seen now comes from the observation; what came before, from the memory.
"""

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode

from learneddyn.agents import MPC
from learneddyn.agents.diagnostics import change_scale, depth_error, model_error
from learneddyn.core import Task, generator
from learneddyn.envs import LearnedVectorEnv
from learneddyn.evaluation.calibration import normal_nll, one_step_calibration
from learneddyn.evaluation.fidelity import fidelity_of_log, step_accuracy
from learneddyn.evaluation.mismatch import log_likelihood
from learneddyn.models import PLRNN, Koopman
from learneddyn.planners import RandomShooting
from learneddyn.testing import example_transitions
from learneddyn.world import World

TASK = Task("X-v0", reward=lambda obs, action, after: after[:, 0], terminated=lambda obs: obs[:, 0] > 1e9)
KINDS = {
    "delays": lambda: Koopman(degree=1, delays=3),
    "linear for good": lambda: Koopman(degree=2, relift=False),
    "recurrent": lambda: PLRNN(latent=5, hidden=4, updates=2, window=4),
}


@pytest.fixture(params=KINDS, ids=str)
def model(request):
    built = KINDS[request.param]()
    built.fit(example_transitions(), rng=generator(0))
    return built


def test_no_memory_is_the_memory_of_a_start(model):
    data = example_transitions()[:20]
    fresh, begun = (model.predict(data.obs, data.action, memory) for memory in (None, model.begin(data.obs)))
    torch.testing.assert_close(fresh.mean, begun.mean)
    torch.testing.assert_close(fresh.memory, begun.memory)


def test_a_free_run_is_the_models_own_path(model):
    """Given its own answers, a model goes on as if its memory alone drove it."""
    data, member = example_transitions()[:9], torch.zeros(9, dtype=torch.long)
    obs, memory, path = data.obs, model.begin(data.obs), []
    for step in range(5):
        action = data.action.roll(step, 0)
        after = model.predict(obs, action, memory)
        again = model.sample(obs, action, member, generator(0), memory, noise=False)
        torch.testing.assert_close(again.next_obs, after.mean[0])
        torch.testing.assert_close(again.memory, after.memory)
        obs, memory = after.mean[0], after.memory
        path.append(obs)
    for step, expected in enumerate(own_path(model, data), start=0):
        torch.testing.assert_close(path[step], expected, rtol=1e-4, atol=1e-5)


def own_path(model, data):
    """Yield five observations of a free run, computed from the model's parts and never from an observation."""
    if isinstance(model, PLRNN):
        z = model.begin(data.obs)
        for step in range(5):
            z = model.advance(z, (data.action.roll(step, 0) - model.action_mean) / model.action_std)
            yield model.observe(z) * model.obs_std + model.obs_mean
        return
    d = data.obs.shape[1]
    x = model.coordinates(data.obs).repeat(1, model.delays)
    psi = model.lifted(x)
    for step in range(5):
        after = model.driven(psi, data.action.roll(step, 0)) @ model.advance.to(psi.dtype)
        yield after[:, 1 : 1 + d] * model.scale + model.shift
        x = torch.cat([after[:, 1 : 1 + d], x[:, : -d or None]], dim=1)[:, : x.shape[1]]
        psi = model.lifted(x) if model.relift else after


def test_what_is_seen_now_counts(model):
    data = example_transitions()[:20]
    before = model.predict(data.obs, data.action)
    own = before.mean[0]
    answers = [model.predict(seen, data.action, before.memory).mean[0] for seen in (own, own + 0.5)]
    assert (answers[0] - answers[1]).abs().amax(dim=1).min() > 0.05


def test_what_was_seen_before_counts(model):
    data = example_transitions()[:20]
    other = model.begin(data.obs + 1.0)
    answers = [model.predict(data.obs, data.action, memory).mean for memory in (None, other)]
    lifts_anew = not getattr(model, "relift", True)  # then a measured observation is all there is
    assert torch.allclose(*answers, atol=1e-4) == lifts_anew


def test_memory_grows_along_a_log_and_stops_where_rows_are_missing(model):
    data = example_transitions(40)
    kept = data[torch.arange(40) != 5]
    memory, calls = None, 0
    found = model.remembered(kept)
    for row in range(len(kept)):
        if row in (0, 5) or kept.episode[row] != kept.episode[row - 1]:
            memory, calls = model.begin(kept.obs[row : row + 1]), calls + 1
        torch.testing.assert_close(found[row : row + 1], memory, rtol=1e-4, atol=1e-5)
        memory = model.predict(kept.obs[row : row + 1], kept.action[row : row + 1], memory).memory
    assert calls == int(kept.episode[-1]) + 2


def test_a_log_costs_one_prediction_per_row(model, monkeypatch):
    data, rows, real = example_transitions(), [], model.predict
    monkeypatch.setattr(model, "predict", lambda *asked: rows.append(len(asked[0])) or real(*asked))
    model.remembered(data)
    assert sum(rows) == len(data) - len(data.episode.unique())
    assert len(rows) == int(data.positions().max())


def test_models_without_memory_remember_nothing():
    model = Koopman(degree=1)
    with pytest.raises(ValueError, match="Koopman has not been fitted"):
        model.remembered(example_transitions())
    model.fit(example_transitions(), rng=generator(0))
    assert model.remembered(example_transitions()) is None


@torch.no_grad()
def test_evaluation_remembers_what_came_before(model):
    data = example_transitions(60)
    prediction = model.predict(data.obs, data.action, model.remembered(data))
    error = (prediction.mean[0] - data.next_obs).double()
    world = World(model, TASK, sampler="mean")
    fidelity = fidelity_of_log(world, data, horizon=1, rng=generator(0))
    assert fidelity.rmse[0] == pytest.approx(error.square().mean(dim=0).sqrt().numpy(), rel=1e-4)
    sharp = one_step_calibration(model, data)
    expected = normal_nll(data.next_obs.double(), prediction.mean[0].double(), prediction.std[0].double())
    assert sharp.nll[0] == pytest.approx(expected.mean(dim=0).numpy(), rel=1e-4)
    assert log_likelihood(model, data) == pytest.approx(-float(expected.sum(dim=1).mean()), rel=1e-4)
    figures = model_error(model, data, data)
    assert figures["model/fresh_mse"] == pytest.approx(float((error / change_scale(data)).square().mean()), rel=1e-4)
    depth, _ = depth_error(world, data, torch.ones(3), depth=1)
    assert depth["model/depth_error"] == pytest.approx(float(error.square().mean().sqrt()), rel=1e-4)
    accuracy = step_accuracy(world, data, rng=generator(0))
    assert accuracy.reward_rmse == pytest.approx(float(error[:, 0].square().mean().sqrt()), rel=1e-4)


def test_planning_remembers_the_real_steps(model):
    """MPC's futures begin with the memory of the episode so far, lane by lane, and afresh with a new episode."""
    data, asked = example_transitions(24), []
    world = World(model, TASK, sampler="mean")
    mpc, returns = MPC(world, RandomShooting(candidates=4, horizon=3)), world.returns
    world.returns = lambda *given: asked.append(given[5]) or returns(*given)
    state, taken = None, []
    for row in range(3):
        obs = data.obs[[row, 12 + row]]
        action, state = mpc.predict(obs.numpy(), state, np.array([row == 0, row != 1]), deterministic=True)
        taken.append(torch.as_tensor(action))
    memory = model.begin(data.obs[[0]])
    for row in range(3):
        torch.testing.assert_close(asked[row][:1], memory)
        memory = model.predict(data.obs[[row]], taken[row][:1], memory).memory
    torch.testing.assert_close(asked[2][1:], model.begin(data.obs[[14]]))
    with pytest.raises(ValueError, match="the state must hold 5 arrays"):
        mpc.predict(obs.numpy(), state[:4])
    with pytest.raises(ValueError, match="memory must have shape"):
        mpc.predict(obs.numpy(), (*state[:4], state[4][:, :1]))


def test_a_restarted_lane_goes_on_as_a_fresh_one(model):
    data = example_transitions()
    start = data.obs[:1] + 0.3

    def env():
        made = LearnedVectorEnv(
            World(model, TASK, sampler="mean"), 1, horizon=3, start=start, autoreset_mode=AutoresetMode.SAME_STEP
        )
        assert isinstance(made.single_action_space, gym.spaces.Box)
        return made

    actions = [data.action[row : row + 1].numpy() for row in range(3)]
    once, again = env(), env()
    once.reset(seed=0)
    expected = [once.step(action)[0] for action in actions[:2]]
    again.reset(seed=0)
    for action in actions:  # the last step ends the episode and begins the next
        again.step(action)
    found = [again.step(action)[0] for action in actions[:2]]
    for one, other in zip(expected, found, strict=True):
        assert one == pytest.approx(other, abs=1e-6)


def test_delays_are_learned_as_they_are_remembered():
    """What a fit puts beside a row is what a walk along the log would remember there, gaps included."""
    data = example_transitions(60)
    kept = data[(torch.arange(60) != 5) & (torch.arange(60) != 30)]
    model = Koopman(lift="linear", delays=3)
    model.fit(kept, rng=generator(0))
    lifted = torch.cat([psi for psi, _ in model.lifted_pairs(kept)])
    torch.testing.assert_close(lifted[:, 1 + 3 :].float(), model.remembered(kept), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_rollouts_from_logged_rows_begin_with_their_memory(model):
    data, world = example_transitions(), World(model, TASK, sampler="elite")
    rows, member = torch.arange(3, 60), torch.zeros(57, dtype=torch.long)
    memory = model.remembered(data)[rows]
    imagined = world.rollout(data.obs[rows], lambda obs: obs[:, :2].tanh(), 2, generator(0), memory)
    first = imagined[imagined.positions() == 0]
    rng = generator(0)
    world.start(data.obs[rows], rng)  # and then the sampler deals the members
    world.start(data.obs[rows], rng)
    wanted = model.sample(data.obs[rows], data.obs[rows, :2].tanh(), member, rng, memory)
    torch.testing.assert_close(first.next_obs, wanted.next_obs)


def test_memory_is_on_the_models_device():
    data, model = example_transitions(40), Koopman(degree=1, delays=2)
    model.fit(data, rng=generator(0))
    assert model.to("meta").remembered(data).device.type == "meta"
