"""The cart-pole: what it weighs, how it swings, where it stops, and that it is a proper environment."""

import math
import pickle

import gymnasium as gym
import numpy as np
import pytest
import torch

from learneddyn import tasks
from learneddyn.core import generator
from learneddyn.plants.cartpole_swingup import CartPoleSwingUp
from learneddyn.tasks.cartpole_swingup import swing_up
from learneddyn.world import World
from learneddyn.world.truth import TruthDynamics

ID = "learneddyn/CartPoleSwingUp-v0"
STILL = np.zeros(1, np.float32)


def at(env, qpos, qvel=(0.0, 0.0)):
    env.reset(seed=0)
    env.set_state(np.array(qpos, float), np.array(qvel, float))
    return env


def test_published_numbers():
    env = gym.make(ID)
    assert env.spec.max_episode_steps == 200
    plant = env.unwrapped
    assert plant.dt == pytest.approx(0.04)
    assert plant.metadata["render_fps"] == 25
    assert plant.action_space == gym.spaces.Box(-3, 3, (1,), np.float32)
    assert plant.model.jnt_range[0].tolist() == [-2.5, 2.5]
    assert plant.model.dof_damping.tolist() == [1, 1]
    radius, length = 0.049, 0.6  # a capsule: a cylinder and two half balls, 1000 kg/m3
    assert plant.model.body("pole").mass[0] == pytest.approx(1000 * math.pi * radius**2 * (length + 4 / 3 * radius))


def test_masses_are_those_asked_for():
    model = CartPoleSwingUp(pole_mass=0.5, cart_mass=1.5).model
    assert (model.body("pole").mass[0], model.body("cart").mass[0]) == (0.5, 1.5)


def test_reset_is_gaussian_about_hanging():
    env = CartPoleSwingUp()
    starts = np.array([env.reset(seed=seed)[0] for seed in range(2000)])
    assert np.abs(starts.mean(axis=0)).max() < 0.01
    np.testing.assert_allclose(starts.std(axis=0), 0.1, atol=0.006)


def test_small_swings_have_the_physical_pendulums_period():
    """Of a heavy cart: omega^2 = m g l / I about the hinge; the capsule's inertia comes from MuJoCo."""
    env = at(CartPoleSwingUp(cart_mass=1e6, damping=0.0, pole_length=0.8, gravity=5.0), (0.0, 0.02))
    mass, centre = env.model.body("pole").mass[0], env.model.body("pole").ipos[2]
    inertia = env.model.body("pole").inertia[:2].max() + mass * centre**2
    omega = math.sqrt(mass * 5.0 * abs(centre) / inertia)
    angles = np.array([env.step(STILL)[0][1] for _ in range(100)])
    np.testing.assert_allclose(angles, 0.02 * np.cos(omega * 0.04 * np.arange(1, 101)), atol=2e-5)


def test_energy_is_kept_without_damping():
    env = at(CartPoleSwingUp(damping=0.0), (0.0, 2.5))
    env.model.opt.enableflags |= 1 << 1  # mjENBL_ENERGY
    energy = []
    for _ in range(100):
        env.step(STILL)
        energy.append(env.data.energy.sum())
    assert np.ptp(energy) < 1e-2 * abs(env.model.body("pole").mass[0] * 9.81 * 0.6)


def test_the_rail_ends_hold_the_cart():
    env = at(CartPoleSwingUp(), (0.0, 0.0))
    seen = [env.step(np.full(1, 3, np.float32))[0][0] for _ in range(100)]
    assert 2.4 < max(seen) < 2.7


@pytest.mark.parametrize(
    ("angle", "x", "push", "reward"),
    [(math.pi, 0.0, 0.0, 1.0), (-math.pi, 0.0, 0.0, 1.0), (0.0, 0.0, 0.0, math.exp(-4)), (math.pi, 0.6, 3.0, None)],
)
def test_reward_by_hand(angle, x, push, reward):
    expected = math.exp(-1) - 0.09 if reward is None else reward
    state = torch.tensor([[x, angle, 0.0, 0.0]])
    got = tasks.get(ID).reward(state, torch.tensor([[push]]), state)
    assert got.item() == pytest.approx(expected, abs=1e-6)


def test_upright_pays_one_in_the_environment():
    _, reward, terminated, truncated, info = at(CartPoleSwingUp(), (0.0, math.pi)).step(STILL)
    assert reward == pytest.approx(1.0, abs=1e-6)
    assert (terminated, truncated) == (False, False)
    assert reward == info["reward_height"] + info["reward_effort"]


def test_a_variant_has_its_own_task_and_truth():
    name = "test/LongPole-v0"
    gym.register(
        name, "learneddyn.plants.cartpole_swingup:CartPoleSwingUp", max_episode_steps=200, kwargs={"pole_length": 1.2}
    )
    try:
        task, env = swing_up(name, pole_length=1.2), gym.make(name)
        truth = TruthDynamics(task, threads=1)
        obs, memory = truth.reset([3])
        state = World(truth, task).start(obs, generator(0))._replace(memory=memory)
        first, _ = env.reset(seed=3)
        np.testing.assert_array_equal(first, obs[0].numpy())
        for push in (2.5, -1.0, 0.3):
            state, step = World(truth, task).step(state, torch.tensor([[push]]), generator(0))
            seen, reward, *_ = env.step(np.array([push], np.float32))
            np.testing.assert_array_equal(seen, state.obs[0].numpy())
            assert step.reward.item() == pytest.approx(reward, abs=1e-9)
        assert pickle.loads(pickle.dumps(task.reward)).keywords == {"pole_length": 1.2}
        truth.close()
    finally:
        del gym.registry[name]


def test_a_copy_by_pickle_has_the_same_parameters():
    copy = pickle.loads(pickle.dumps(CartPoleSwingUp(pole_length=0.9, pole_mass=0.2)))
    assert (copy.pole_length, copy.model.body("pole").mass[0]) == (0.9, 0.2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pole_length": 0.0}, "pole_length must be positive and finite, got 0.0"),
        ({"pole_mass": -1.0}, "pole_mass must be positive and finite, got -1.0"),
        ({"cart_mass": math.inf}, "cart_mass must be positive and finite, got inf"),
        ({"gravity": math.nan}, "gravity must be positive and finite, got nan"),
        ({"damping": -0.1}, "damping must be at least 0 and finite, got -0.1"),
    ],
)
def test_bad_parameters_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        CartPoleSwingUp(**arguments)
