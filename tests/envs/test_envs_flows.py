"""Chaotic flows by id: actions of no columns are legal, steps are the flow's, ids that name the module find tasks."""

import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

from learneddyn import tasks
from learneddyn.core import generator
from learneddyn.plants import chaos
from learneddyn.plants.chaos import FlowDynamics
from learneddyn.tasks import registry

IDS = ["learneddyn/Lorenz63-v0", "learneddyn/Lorenz63Held-v0"]


@pytest.fixture
def flows(monkeypatch):
    """The module, imported late: it registers tasks, which other tests walk."""
    monkeypatch.setattr(registry, "_registered", {})
    monkeypatch.setattr(chaos, "_TRANSIENT", 200)
    from learneddyn.envs import flows

    flows._shipped()
    return flows


@pytest.mark.usefixtures("flows")
@pytest.mark.parametrize("env_id", [*IDS, "learneddyn/Flow-v0"])
def test_gymnasium_accepts_them(env_id):
    env = gym.make(env_id)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*A Box observation space m(ini|axi)mum value is")
        check_env(env.unwrapped, skip_render_check=True)
    env.close()


@pytest.mark.usefixtures("flows")
def test_an_episode_is_the_flows():
    env, truth = gym.make(IDS[0], horizon=3, dt=0.02), FlowDynamics(dt=0.02)
    assert env.action_space.shape == (0,)
    obs, _ = env.reset(seed=1)
    for number in range(3):
        before = obs
        obs, reward, terminated, truncated, _ = env.step(env.action_space.sample())
        assert np.allclose(obs, truth.step(torch.as_tensor(before)[None])[0], atol=1e-6)
        assert (reward, terminated, truncated) == (0.0, False, number == 2)


@pytest.mark.usefixtures("flows")
def test_starts_lie_on_the_attractor_and_follow_the_seed():
    lanes = gym.make_vec(IDS[0], num_envs=300, output="torch")
    first, again, other = (lanes.reset(seed=seed)[0] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == (300, 3)
    assert (first.std(dim=0) - 1).abs().max() < 0.2


@pytest.mark.usefixtures("flows")
def test_the_held_flow_pays_for_staying_at_its_fixed_point():
    env = gym.make(IDS[1])
    target = [1.0707, 0.9418, 0.4002]
    env.reset(seed=0, options={"obs": np.array(target, np.float32)})
    total, obs = 0.0, np.array(target)
    for _ in range(50):
        push = np.clip(-2.0 * (obs[:1] - target[0]), -1, 1).astype(np.float32)
        obs, reward, *_ = env.step(push)
        total += reward
    assert -0.01 < total <= 0
    _, reward, *_ = env.step(np.ones(1, np.float32))
    assert reward < -0.01


@pytest.mark.parametrize("env_id", IDS)
def test_tasks_are_found_by_the_id_that_names_the_module(flows, env_id):
    real_id = f"{flows.__name__}:{env_id}"
    task = tasks.get(real_id)
    assert task.real_id == real_id
    assert gym.make(real_id).unwrapped.world.spaces.action_dim == (env_id == IDS[1])
    assert torch.equal(
        task.initial(3, torch.Generator().manual_seed(0)), task.initial(3, torch.Generator().manual_seed(0))
    )
    with pytest.raises(ValueError, match="lanes must be at least 1, got 0"):
        task.initial(0, generator(0))


def test_a_flow_gets_an_id_of_its_own(flows):
    try:
        task = flows.register_flow("here:mine/Slow-v0", flow="Lorenz63", dt=0.001, forced=[0, 2])
        assert task is tasks.get("here:mine/Slow-v0")
        env = gym.make("mine/Slow-v0")
        assert env.action_space.shape == (2,)
        assert env.unwrapped.world.dynamics.dt == 0.001
        assert gym.make(gym.envs.registration.EnvSpec.from_json(env.spec.to_json())).action_space.shape == (2,)
        flows.register_flow("here:mine/Slow-v0", flow="Lorenz63")
        assert gym.make("mine/Slow-v0").action_space.shape == (0,)
    finally:
        gym.registry.pop("mine/Slow-v0", None)


def test_bad_arguments(flows):
    with pytest.raises(ValueError, match="target must have the 3 columns of Lorenz63, got 2"):
        flows.flow_world(target=[0.0, 0.0])
    with pytest.raises(ValueError, match="horizon must be at least 1, got 0"):
        gym.make("learneddyn/Flow-v0", horizon=0)
    with pytest.raises(ValueError, match="distinct coordinates"):
        gym.make("learneddyn/Flow-v0", forced=[5])
