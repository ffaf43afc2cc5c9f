"""The plant with factors of 1 is Gymnasium's; its masses are the factors asked for."""

import gymnasium as gym
import numpy as np
import pytest

import learneddyn  # noqa: F401  (registers the plant)

ID = "learneddyn/HeavyPendulum-v0"


def played(env, steps=40):
    rows = [env.reset(seed=3)[0]]
    for step in range(steps):
        obs, reward, terminated, _, _ = env.step(np.array([0.3 * (-1) ** step], np.float32))
        rows.append(np.append(obs, [reward, terminated]))
    env.close()
    return np.concatenate(rows)


def test_factors_of_one_are_gymnasiums_environment():
    assert np.array_equal(played(gym.make(ID)), played(gym.make("InvertedPendulum-v5")))


def test_masses_and_inertias_are_multiples():
    plain, heavy = (gym.make(ID, **masses).unwrapped.model for masses in ({}, {"pole_mass": 31.0, "cart_mass": 11.0}))
    for field in ("body_mass", "body_inertia"):
        for name, factor in (("pole", 31.0), ("cart", 11.0)):
            assert getattr(heavy.body(name), field.removeprefix("body_")) == pytest.approx(
                factor * getattr(plain.body(name), field.removeprefix("body_"))
            )


def test_a_push_moves_a_heavy_cart_less():
    first = {}
    for factor in (1.0, 11.0):
        env = gym.make(ID, cart_mass=factor)
        env.reset(seed=0)
        first[factor] = env.step(np.array([3.0], np.float32))[0][2]
        env.close()
    assert first[1.0] > 3 * first[11.0] > 0


@pytest.mark.parametrize("mass", [0.0, -1.0, float("nan")])
def test_impossible_masses(mass):
    with pytest.raises(ValueError, match="pole_mass must be positive and finite"):
        gym.make(ID, pole_mass=mass)
