"""Every reward and termination against the environment itself, or None where the observation does not determine it."""

import numpy as np
import pytest
import torch
from tasks_real import IDS, make, transitions

from learneddyn import tasks

WITHOUT_REWARD = {
    "Ant-v5",
    "HalfCheetah-v5",
    "Hopper-v5",
    "Humanoid-v5",
    "InvertedDoublePendulum-v5",
    "Swimmer-v5",
    "Walker2d-v5",
}
WITHOUT_TERMINATION = {"InvertedDoublePendulum-v5"}
NEVER_TERMINATE = {
    "HalfCheetah-v5",
    "HumanoidStandup-v5",
    "Pendulum-v1",
    "Pusher-v5",
    "Reacher-v5",
    "Swimmer-v5",
    "learneddyn/CartPoleSwingUp-v0",
}


def test_the_parts_that_are_none_are_the_ones_the_observation_does_not_determine():
    assert {name for name in IDS if tasks.get(name).reward is None} == WITHOUT_REWARD
    assert {name for name in IDS if tasks.get(name).terminated is None} == WITHOUT_TERMINATION


@pytest.mark.parametrize("real_id", IDS)
def test_the_task_says_what_a_user_must_know(real_id):
    task = tasks.get(real_id)
    assert task.real_id == real_id
    assert task.codec.lost
    assert ("learn_reward=True" in task.notes) == (task.reward is None)
    assert ("learn_termination=True" in task.notes) == (task.terminated is None)


@pytest.mark.parametrize("real_id", [name for name in IDS if name not in WITHOUT_REWARD])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.float32, 1e-5)])
def test_reward_equals_the_environments(real_id, dtype, tolerance):
    real = transitions(real_id)
    if real_id == "HumanoidStandup-v5" and dtype == torch.float32:
        tolerance = 5e-5  # height / 0.003 s: see its docstring
    reward = tasks.get(real_id).reward(real.obs.to(dtype), real.action.to(dtype), real.next_obs.to(dtype))
    assert reward.shape == (1000,)
    assert reward.dtype == dtype
    assert (reward - real.reward).abs().max() <= tolerance


@pytest.mark.parametrize("real_id", [name for name in IDS if name not in WITHOUT_TERMINATION])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_termination_equals_the_environments(real_id, dtype):
    real = transitions(real_id)
    terminated = tasks.get(real_id).terminated(real.next_obs.to(dtype))
    assert terminated.dtype == torch.bool
    assert torch.equal(terminated, real.terminated)
    assert bool(real.terminated.any()) == (real_id not in NEVER_TERMINATE)
    assert not real.terminated.all()


def test_the_double_pendulum_is_not_determined_by_its_observation():
    real = transitions("InvertedDoublePendulum-v5")
    cart, sin_a, sin_b, cos_a, cos_b, _, v1, v2, _ = real.next_obs.unbind(dim=1)
    x = cart + 0.6 * sin_a + 0.6 * (sin_a * cos_b + cos_a * sin_b)
    z = 0.6 * cos_a + 0.6 * (cos_a * cos_b - sin_a * sin_b)
    reward = 10 * ~real.terminated - 0.01 * x**2 - (z - 2) ** 2 - 1e-3 * v1**2 - 5e-3 * v2**2
    error = (reward - real.reward).abs()
    assert error.median() < 1e-3
    assert error.max() > 1e-5


def test_no_healthy_hopper_comes_near_the_speed_limit_that_its_observation_hides():
    env, rng = make("Hopper-v5"), np.random.default_rng(0)
    env.reset(seed=0)
    fastest, action = 0.0, np.zeros(3, np.float32)
    for step in range(20_000):
        if step % 20 == 0:
            action = rng.choice([-1, 1], 3).astype(np.float32)
        terminated = env.step(action)[2]
        fastest = max(fastest, np.abs(env.data.qvel).max())
        if terminated:
            env.reset()
    assert fastest < 24


BOUNDARIES = [
    ("InvertedPendulum-v5", [0, 0.199, 9, 9], False),
    ("InvertedPendulum-v5", [0, 0.201, 0, 0], True),
    ("InvertedPendulum-v5", [0, -0.201, 0, 0], True),
    ("InvertedPendulum-v5", [0, 0, 0, float("nan")], True),
    ("InvertedPendulum-v5", [0, 0, float("inf"), 0], True),
    ("CartPole-v1", [2.39, 0, 0.209, 0], False),
    ("CartPole-v1", [2.41, 0, 0, 0], True),
    ("CartPole-v1", [-2.41, 0, 0, 0], True),
    ("CartPole-v1", [0, 0, 0.21, 0], True),
    ("CartPole-v1", [0, 0, -0.21, 0], True),
    ("MountainCarContinuous-v0", [0.45, 0.0], True),
    ("MountainCarContinuous-v0", [0.4499, 0.05], False),
    ("MountainCarContinuous-v0", [0.5, -0.001], False),
    ("Hopper-v5", [1.25, 0.19] + [0] * 9, False),
    ("Hopper-v5", [0.69, 0.0] + [0] * 9, True),
    ("Hopper-v5", [1.25, -0.21] + [0] * 9, True),
    ("Hopper-v5", [1.25, 0.0] + [0] * 8 + [101], True),
    ("Hopper-v5", [1.25, 0.0] + [0] * 8 + [float("nan")], True),
    ("Walker2d-v5", [0.81, 0.99] + [0] * 15, False),
    ("Walker2d-v5", [0.79, 0] + [0] * 15, True),
    ("Walker2d-v5", [2.01, 0] + [0] * 15, True),
    ("Walker2d-v5", [1.25, -1.01] + [0] * 15, True),
    ("Walker2d-v5", [1.25, 0] + [200] * 15, False),
    ("Ant-v5", [0.21] + [0] * 104, False),
    ("Ant-v5", [0.19] + [0] * 104, True),
    ("Ant-v5", [1.01] + [0] * 104, True),
    ("Ant-v5", [0.5] * 26 + [float("inf")] + [0] * 78, True),
    ("Humanoid-v5", [1.01] + [0] * 347, False),
    ("Humanoid-v5", [0.99] + [0] * 347, True),
    ("Humanoid-v5", [2.01] + [0] * 347, True),
    ("HumanoidStandup-v5", [-5] + [0] * 347, False),
    ("HalfCheetah-v5", [-5, 9] + [0] * 15, False),
]


@pytest.mark.parametrize(("real_id", "next_obs", "expected"), BOUNDARIES)
def test_termination_at_the_boundaries(real_id, next_obs, expected):
    assert tasks.get(real_id).terminated(torch.tensor([next_obs], dtype=torch.float32)).tolist() == [expected]


def test_mountain_car_compares_with_the_float32_goal_in_float64_too():
    goal = torch.tensor([[0.45, 0.0]], dtype=torch.float32)
    assert tasks.get("MountainCarContinuous-v0").terminated(goal.double()).all()


def test_the_pendulums_worst_step_costs_what_gymnasium_documents():
    worst = torch.tensor([[-1.0, 0.0, 8.0]])
    reward = tasks.get("Pendulum-v1").reward(worst, torch.tensor([[5.0]]), worst)
    assert reward.item() == pytest.approx(-(np.pi**2 + 0.1 * 8**2 + 0.001 * 2**2), abs=1e-5)


def _inputs(*shapes):
    rng = torch.Generator().manual_seed(0)
    return [torch.randn(6, columns, generator=rng).requires_grad_() for columns in shapes]


def test_gradient_of_pendulum():
    obs, action, next_obs = _inputs(3, 1, 3)
    tasks.get("Pendulum-v1").reward(obs, action, next_obs).sum().backward()
    torch.testing.assert_close(action.grad, torch.where(action.abs() < 2, -0.002 * action, 0.0).detach())
    torch.testing.assert_close(obs.grad[:, 2], -0.2 * obs[:, 2].detach())
    assert next_obs.grad is None


def test_gradient_of_reacher_even_at_the_target():
    obs, action, next_obs = _inputs(10, 2, 10)
    next_obs.data[0, 8:] = 0
    tasks.get("Reacher-v5").reward(obs, action, next_obs).sum().backward()
    torch.testing.assert_close(action.grad, -2 * action.detach())
    direction = next_obs.detach()[:, 8:] / next_obs.detach()[:, 8:].norm(dim=1, keepdim=True)
    torch.testing.assert_close(next_obs.grad[1:, 8:], -direction[1:])
    assert next_obs.grad.isfinite().all()


def test_gradient_of_inverted_pendulum_is_zero_not_missing():
    obs, action, next_obs = _inputs(4, 1, 4)
    next_obs.data[0, 1] = float("nan")
    reward = tasks.get("InvertedPendulum-v5").reward(obs, action, next_obs)
    reward.sum().backward()
    assert reward.isfinite().all()
    assert reward[0] == 0
    assert not next_obs.grad[1:].any()


@pytest.mark.parametrize("real_id", ["HumanoidStandup-v5", "MountainCarContinuous-v0", "Pusher-v5"])
def test_gradient_reaches_the_action(real_id):
    real = transitions(real_id)
    action = real.action.clone().requires_grad_()
    tasks.get(real_id).reward(real.obs, action, real.next_obs).sum().backward()
    torch.testing.assert_close(action.grad, -0.2 * real.action)
