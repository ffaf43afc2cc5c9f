"""Every exported dynamics class goes all the way: world on disk, environment, planner, MBPO, offline learner."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from model_cases import CONTINUAL, FITTING, MODELS, QUICK, VARIANTS, taken

from learneddyn import tasks
from learneddyn.agents import MBPO, MPC
from learneddyn.core import Task, Transitions, generator
from learneddyn.envs import LearnedEnv, load_world, save_world
from learneddyn.models import AbstractContinual, AbstractDynamics, RecurrentDynamics
from learneddyn.offline import MOPO
from learneddyn.planners import CEM
from learneddyn.tasks.endless import never
from learneddyn.testing import example_transitions
from learneddyn.world import World, within_box

TASK = Task("Anything-v0", lambda obs, action, after: -after.square().mean(dim=1), never, max_episode_steps=8)
QUICKER = QUICK | {"updates": 8, "window": 4, "batch_size": 16, "bootstraps": 4}
WAYS = {
    "Koopman delays": VARIANTS["Koopman delays"],
    "SINDy members": VARIANTS["SINDy members"],
    "RecurrentDynamics s4d": lambda: RecurrentDynamics("s4d", width=8, order=4, window=4, updates=8),
}
"""Ways of a class that give it members, or a memory, that its defaults do not have."""


def nets():
    """Return small nets, anew: Stable-Baselines3 writes into what it is given."""
    return {"policy_kwargs": {"net_arch": [8]}, "batch_size": 16, "seed": 0, "device": "cpu"}


@dataclass(frozen=True)
class Case:
    """A small model to fit (of a continual class, one that has learned), the fitted one, its data and world folder."""

    make: Callable[[], AbstractDynamics]
    model: AbstractDynamics
    data: Transitions
    folder: Path

    @property
    def world(self) -> World:
        return load_world(self.folder).world


@pytest.fixture(scope="module", params=[*MODELS, *CONTINUAL, *WAYS], ids=lambda kind: getattr(kind, "__name__", kind))
def case(request, tmp_path_factory):
    kind, log = request.param, FITTING.get(request.param, example_transitions(120))
    data = replace(log, reward=TASK.reward(log.obs, log.action, log.next_obs))
    make = WAYS[kind] if isinstance(kind, str) else partial(kind, **taken(kind, QUICKER))
    model = make()
    model.fit(data, rng=generator(0))
    if isinstance(model, AbstractContinual):
        model = model.on(0)
        make = partial(copy.deepcopy, model)
    folder = tmp_path_factory.mktemp("world")
    tasks.register(TASK, overwrite=True)
    save_world(folder, model, task=TASK, data=data, trust_margin=2.0, start=data.obs)
    return Case(make, model, data, folder)


def test_it_opens_by_its_folder_as_an_environment(case):
    env = gym.make("LearnedDyn-v0", world=str(case.folder))
    env.action_space.seed(0)
    obs, _ = env.reset(seed=0)
    for _ in range(10):
        assert env.observation_space.contains(obs)
        obs, reward, terminated, truncated, _ = env.step(env.action_space.sample())
        assert np.isfinite(obs).all()
        assert np.isfinite(reward)
        if terminated or truncated:
            obs, _ = env.reset()
    lanes = gym.make_vec("LearnedDyn-v0", num_envs=3, world=str(case.folder))
    lanes.reset(seed=0)
    obs, *_ = lanes.step(lanes.action_space.sample())
    assert lanes.observation_space.contains(obs)


def test_a_loaded_world_plays_the_rollout_of_the_model_that_was_fitted(case):
    again = case.world
    seen = torch.cat([case.data.obs, case.data.next_obs])
    world = World(case.model, TASK, trust=within_box(seen.amin(dim=0), seen.amax(dim=0), 2.0))
    low, high = (torch.as_tensor(bound) for bound in (world.spaces.action.low, world.spaces.action.high))

    def act(obs):
        return torch.sin(3 * obs[:, : len(low)]).clamp(low, high)

    one, two = (each.rollout(case.data.obs[:6], act, 5, generator(1)) for each in (world, again))
    assert len(one) >= 6
    for name, column in one.tensors().items():
        assert torch.equal(column, two.tensors()[name]), name


def test_a_planner_plans_in_it(case):
    mpc = MPC(case.world, CEM(horizon=4, candidates=12, elites=3, iterations=2))
    space = mpc.world.spaces.action
    state, actions = None, []
    for row in case.data.obs[:3].numpy():
        action, state = mpc.predict(row, state, deterministic=True)
        actions.append(action)
        assert space.contains(action)
    again, _ = mpc.predict(case.data.obs[0].numpy(), deterministic=True)
    np.testing.assert_array_equal(again, actions[0])
    assert not np.array_equal(*(mpc.predict(case.data.obs[0].numpy())[0] for _ in range(2)))


def test_mbpo_learns_in_it(case):
    plant = LearnedEnv(case.world, horizon=4, start=case.data.obs)
    agent = MBPO("MlpPolicy", plant, model=case.make(), task=TASK, learning_starts=20, refit_every=100,
                 rollout_batch=12, schedule=(0, 1, 3, 3), gradient_steps=1, buffer_size=100, **nets())  # fmt: skip
    agent.learn(23)
    pool = agent.replay_buffer.imagined
    rows = pool.unpack(pool.rows())
    assert len(pool) >= 12
    assert rows.next_obs.isfinite().all()
    if case.model.begin(case.data.obs) is None:
        assert np.isfinite(agent.figures["imagined/uncertainty"])
    else:
        assert "imagined/uncertainty" not in agent.figures


def test_an_offline_learner_learns_in_it(case):
    members = case.world.dynamics.num_members
    penalty = "max_pairwise_diff" if members > 1 else "max_aleatoric"
    data = replace(case.data, terminated=torch.zeros_like(case.data.terminated))  # as the task says
    agent = MOPO("MlpPolicy", data, model=case.make(), task=TASK, penalty=penalty, penalty_weight=0.1, horizon=3,
                 rollout_batch=12, rollout_every=3, real_ratio=0.25, **nets())  # fmt: skip
    agent.learn(4)
    rows = agent.imagined.unpack(agent.imagined.rows())
    assert len(agent.imagined) >= 12
    assert rows.next_obs.isfinite().all()
    assert plain_reward(rows) > rows.reward.mean()


def plain_reward(rows):
    """Return the mean reward of the task: what is missing has been paid for uncertainty."""
    return TASK.reward(rows.obs, rows.action, rows.next_obs).mean()


def test_no_model_is_forgotten():
    assert len(MODELS) >= 11
    assert len(CONTINUAL) >= 2
