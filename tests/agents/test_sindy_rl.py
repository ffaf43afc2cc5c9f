"""SINDy-RL: imagination stays where the data was, the model prints, and the policy becomes a formula."""

import gymnasium as gym
import numpy as np
import pytest
import torch

from learneddyn import tasks
from learneddyn.agents import SINDyRL, SparsePolicy
from learneddyn.agents.sindy_rl import sparse_dynamics
from learneddyn.evaluation import evaluate
from learneddyn.models import SINDy

ARGS = {"policy_kwargs": {"net_arch": [8]}, "learning_starts": 120, "batch_size": 32, "gradient_steps": 1}


def made(**given):
    model = sparse_dynamics(tasks.get("Pendulum-v1"), [(0, 1)])
    model.domain = [(2, -7.9, 7.9)]  # the plant clips what is beyond 8
    given = {"model": model, "rollout_batch": 60, "refit_every": 100, "seed": 0, "device": "cpu"} | ARGS | given
    return SINDyRL("MlpPolicy", gym.make("Pendulum-v1"), unit_pairs=[(0, 1)], **given)


@pytest.fixture(scope="module")
def agent():
    return made().learn(250)


def test_imagination_stays_where_the_data_was(agent):
    rows, real = agent.imagine(), agent.real_data()
    torch.testing.assert_close(rows.next_obs[:, :2].norm(dim=1), torch.ones(len(rows)))
    spread = real.obs[:, 2].max() - real.obs[:, 2].min()
    assert rows.next_obs[:, 2].abs().max() <= real.obs[:, 2].abs().max() + 0.2 * spread + 1e-3


def test_a_model_sees_no_further_than_its_domain():
    agent = made(model=SINDy(bootstraps=2, domain=[(2, -1.0, 1.5)])).learn(130)
    rows = agent.imagine()
    assert rows.next_obs[:, 2].min() >= -1.001
    assert rows.next_obs[:, 2].max() <= 1.501
    assert len(rows) < 600


def test_the_kinematics_are_written_down(agent):
    names = ["cos", "sin", "spin", "torque"]
    equation = agent.dynamics.equations(names)[2]
    assert equation.startswith("spin' = spin + 0.75 sin + 0.15 torque")  # 3 g / 2 l dt, 3 / m l^2 dt


def test_the_policy_becomes_a_formula(agent, tmp_path):
    student = SparsePolicy(squash="tanh", thresholds=[1e-3], ridges=[1e-5], bootstraps=4)
    policy = agent.distil(student, episodes=10, steps=400)
    assert policy is student
    assert policy.formula(["cos", "sin", "spin"])[0].startswith("u0 = 2 tanh(")
    obs = agent.real_data().obs[:50]
    assert np.corrcoef(policy.act(obs)[:, 0], agent.act(obs)[:, 0])[0, 1] > 0.9
    mine = agent.predict(obs.numpy(), deterministic=True)[0]
    np.testing.assert_allclose(agent.act(obs).numpy(), mine, atol=1e-5)
    assert np.isfinite(evaluate(policy, "Pendulum-v1", episodes=1).returns).all()


def test_a_loaded_agent_has_its_model(agent, tmp_path):
    agent.save(tmp_path / "agent.zip")
    back = SINDyRL.load(tmp_path / "agent.zip", env=gym.make("Pendulum-v1"), device="cpu")
    assert back.dynamics.equations() == agent.dynamics.equations()
    assert back.unit_pairs == [[0, 1]]


def test_what_is_refused_and_what_is_made_by_default():
    with pytest.raises(ValueError, match="margin must be at least 0, got -1"):
        made(margin=-1.0)
    agent = SINDyRL("MlpPolicy", gym.make("Pendulum-v1"), device="cpu", **ARGS)
    assert isinstance(agent.dynamics, SINDy)
    assert not agent.dynamics.learn_reward
    with pytest.raises(ValueError, match="no policy to distil yet"):
        agent.distil()
