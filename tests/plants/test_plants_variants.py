"""Variants of robots: the change asked for and no other, and the truth of each."""

import copy
import json
import math
import pickle

import gymnasium as gym
import numpy as np
import pytest
import torch

from learneddyn import tasks
from learneddyn.core import generator
from learneddyn.plants.variants import make_variant, register_variant
from learneddyn.world import World
from learneddyn.world.truth import TruthDynamics

MODEL = (
    "body_mass",
    "body_inertia",
    "body_pos",
    "geom_pos",
    "geom_size",
    "jnt_pos",
    "dof_invweight0",
    "body_invweight0",
)


def test_no_change_is_the_base():
    for base in ("InvertedPendulum-v5", "HalfCheetah-v5", "Hopper-v5"):
        ours, theirs = make_variant(base), gym.make(base).unwrapped
        for name in MODEL:
            np.testing.assert_array_equal(getattr(ours.model, name), getattr(theirs.model, name), err_msg=name)
        for env in (ours, theirs):
            env.action_space.seed(3)
        np.testing.assert_array_equal(ours.reset(seed=1)[0], theirs.reset(seed=1)[0])
        for _ in range(20):
            one, two = (env.step(env.action_space.sample()) for env in (ours, theirs))
            np.testing.assert_array_equal(one[0], two[0])
            assert one[1] == two[1]


def test_length_and_mass_of_a_pole():
    plain = make_variant("InvertedPendulum-v5").model
    long = make_variant("InvertedPendulum-v5", {"pole": {"length": 2.0}}).model
    radius, half = long.geom("cpole").size[:2]
    assert (radius, half) == pytest.approx((0.049, 2 * plain.geom("cpole").size[1]))
    volume = math.pi * radius**2 * (2 * half + 4 / 3 * radius)
    assert long.body("pole").mass[0] == pytest.approx(1000 * volume)
    assert long.body("cart").mass[0] == plain.body("cart").mass[0]
    heavy = make_variant("InvertedPendulum-v5", {"pole": {"mass": 3.0}}).model
    assert heavy.body("pole").mass[0] == pytest.approx(3 * plain.body("pole").mass[0])
    np.testing.assert_allclose(heavy.body("pole").inertia, 3 * plain.body("pole").inertia)
    np.testing.assert_array_equal(heavy.geom_size, plain.geom_size)


def test_a_scaled_limb_stays_in_the_chain():
    plain = make_variant("HalfCheetah-v5").model
    big = make_variant("HalfCheetah-v5", {"bthigh": {"size": 1.25}}).model
    np.testing.assert_allclose(big.geom("bthigh").size[:2], 1.25 * plain.geom("bthigh").size[:2])
    np.testing.assert_allclose(big.geom("bthigh").pos, 1.25 * plain.geom("bthigh").pos)
    np.testing.assert_allclose(big.body("bshin").pos, 1.25 * plain.body("bshin").pos, err_msg="the shin moves along")
    np.testing.assert_array_equal(big.geom("bshin").size, plain.geom("bshin").size)
    np.testing.assert_array_equal(big.body("bthigh").pos, plain.body("bthigh").pos)
    assert big.body_mass.sum() == pytest.approx(14), "this robot's file fixes the total mass"


def test_damping_friction_and_gear_are_those_of_the_body():
    plain = make_variant("Hopper-v5").model
    changes = {"leg": {"damping": 0.5, "gear": 0.8}, "foot": {"friction": 3.0}}
    changed = make_variant("Hopper-v5", changes).model
    leg, foot = plain.body("leg"), plain.body("foot")
    factors = np.ones(plain.nv)
    factors[leg.dofadr[0]] = 0.5
    np.testing.assert_allclose(changed.dof_damping, factors * plain.dof_damping)
    np.testing.assert_allclose(changed.actuator_gear[:, 0], [200, 160, 200])
    factors = np.ones(plain.ngeom)
    factors[foot.geomadr[0]] = 3.0
    np.testing.assert_allclose(changed.geom_friction[:, 0], factors * plain.geom_friction[:, 0])
    np.testing.assert_array_equal(changed.geom_friction[:, 1:], plain.geom_friction[:, 1:])
    for name in (*MODEL, "actuator_ctrlrange"):
        np.testing.assert_array_equal(getattr(changed, name), getattr(plain, name), err_msg=name)
    for body, change in (("torso", "gear"), ("torso", "damping")):
        with pytest.raises(ValueError, match=f"body '{body}' has no {change} to change"):
            make_variant("Hopper-v5", {body: {change: 0.5}})


def test_gravity_pulls_as_told():
    env = make_variant("InvertedPendulum-v5", gravity=3.0)
    env.model.dof_damping[:] = 0
    env.reset(seed=0)
    env.set_state(np.array([0.0, 0.05]), np.zeros(2))
    np.testing.assert_array_equal(env.model.opt.gravity, [0, 0, -3])
    falls = [make_variant("InvertedPendulum-v5", gravity=g) for g in (3.0, 12.0)]
    angles = []
    for fall in falls:
        fall.reset(seed=0)
        fall.set_state(np.array([0.0, 0.05]), np.zeros(2))
        angles.append(fall.step(np.zeros(1, np.float32))[0][1] - 0.05)
    assert angles[1] == pytest.approx(4 * angles[0], rel=0.02)


def test_a_registered_variant_is_an_environment_like_any_other():
    name = "test/LongPole-v0"
    register_variant(name, "InvertedPendulum-v5", bodies={"pole": {"length": 1.5}}, gravity=5.0)
    register_variant(name, "InvertedPendulum-v5", bodies={"pole": {"length": 2.0}}, gravity=5.0)
    try:
        env = gym.make(name)
        assert env.spec.max_episode_steps == 1000
        json.loads(env.spec.to_json())
        for twin in (copy.deepcopy(env.unwrapped), pickle.loads(pickle.dumps(env.unwrapped))):
            np.testing.assert_array_equal(twin.model.body_mass, env.unwrapped.model.body_mass)
        task = tasks.variant(name, "InvertedPendulum-v5")
        assert (task.real_id, task.reward) == (name, tasks.get("InvertedPendulum-v5").reward)
        truth = TruthDynamics(task, threads=1)
        obs, _ = env.reset(seed=3)
        memory, world = truth.snapshot(env), World(truth, task)
        state = world.start(torch.as_tensor(obs)[None], generator(0))._replace(memory=memory)
        for push in (2.5, -1.0, 0.3):
            state, step = world.step(state, torch.tensor([[push]]), generator(0))
            seen, reward, *_ = env.step(np.array([push], np.float32))
            np.testing.assert_array_equal(seen, state.obs[0].numpy())
            assert float(step.reward) == reward
        # What observations alone follow from runs in mujoco.rollout, on the changed model too.
        action = torch.tensor([[[1.0]], [[-2.0]]])
        start = torch.zeros(2, 4, dtype=torch.float64)
        fast, judged = truth.open_loop(start, action, judged=False), truth.open_loop(start, action)
        torch.testing.assert_close(fast.next_obs, judged.next_obs)
        truth.close()
    finally:
        del gym.registry[name]


@pytest.mark.parametrize(
    ("base", "changes", "message"),
    [
        (
            "Pendulum-v1",
            {},
            "base must be a MuJoCo environment of Gymnasium that is read from a file, got 'Pendulum-v1'",
        ),
        ("learneddyn/CartPoleSwingUp-v0", {}, "read from a file"),
        ("InvertedPendulum-v5", {"bodies": {"pole": {"colour": 2.0}}}, r"unknown changes \['colour'\] of body 'pole'"),
        (
            "InvertedPendulum-v5",
            {"bodies": {"leg": {"mass": 2.0}}},
            r"unknown bodies \['leg'\], the model has \['cart', ",
        ),
        ("InvertedPendulum-v5", {"bodies": {"pole": {"mass": 0.0}}}, "mass of body 'pole' must be positive and finite"),
        ("InvertedPendulum-v5", {"gravity": math.nan}, "gravity must be positive and finite, got nan"),
    ],
)
def test_bad_changes_are_named(base, changes, message):
    with pytest.raises(ValueError, match=message):
        register_variant("test/Bad-v0", base, **changes)
    assert "test/Bad-v0" not in gym.registry
