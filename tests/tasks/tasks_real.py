"""The real environments, asked for transitions and for the observation of a chosen simulator state."""

from functools import cache
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from learneddyn import spaces, tasks

IDS = tasks.names()
CLASSIC = ("CartPole-v1", "MountainCarContinuous-v0", "Pendulum-v1")
MUJOCO = [name for name in IDS if name not in CLASSIC]
STILL = {"Reacher-v5": [2, 3], "Pusher-v5": [9, 10]}
"""Joints of the goals, which no episode moves."""


class Real(NamedTuple):
    """Transitions of the real environment, float64, with the simulator state after each."""

    obs: Tensor
    action: Tensor
    reward: Tensor
    next_obs: Tensor
    terminated: Tensor
    qpos: np.ndarray
    qvel: np.ndarray


def make(real_id: str) -> Any:
    return gym.make(real_id, disable_env_checker=True).unwrapped


def simulator_state(env: Any) -> tuple[np.ndarray, np.ndarray]:
    if hasattr(env, "data"):
        return env.data.qpos.copy(), env.data.qvel.copy()
    state = np.asarray(env.state, np.float64)
    return (state[0::2], state[1::2]) if len(state) == 4 else (state[:1], state[1:])


def observe(env: Any, qpos: np.ndarray, qvel: np.ndarray) -> np.ndarray:
    """Put the environment into a state and return its own observation of it."""
    if hasattr(env, "data"):
        env.set_state(qpos, qvel)
        return env._get_obs()
    env.state = np.stack([qpos, qvel], axis=1).ravel()
    return env._get_obs() if hasattr(env, "_get_obs") else np.array(env.state, np.float32)


def disturb(env: Any, rng: np.random.Generator) -> np.ndarray:
    """Move the environment far from its start and return the observation there."""
    env.reset(seed=int(rng.integers(2**31)))
    qpos, qvel = simulator_state(env)
    scale = 0.3 if hasattr(env, "data") else 0.1
    by_qpos, by_qvel = (scale * rng.standard_normal(x.shape) for x in (qpos, qvel))
    still = STILL.get(env.spec.id, [])
    by_qpos[still] = by_qvel[still] = 0
    return observe(env, qpos + by_qpos, qvel + by_qvel)


@cache
def transitions(real_id: str) -> Real:
    """Return 1,000 transitions: 400 by random actions, 300 by held full actions, 300 from states far from the start."""
    env, rng, columns = make(real_id), np.random.default_rng(7), []
    env.action_space.seed(7)
    obs, _ = env.reset(seed=7)
    held = env.action_space.sample()
    for step in range(1000):
        if step >= 700:
            obs = disturb(env, rng)
        if step < 400 or step >= 700 or real_id == "CartPole-v1":
            action = env.action_space.sample()
        elif real_id == "MountainCarContinuous-v0":
            action = np.where(obs[1:] < 0, -1, 1).astype(np.float32)  # swings up to the goal
        else:
            if step % 25 == 0:
                space = env.action_space
                held = np.where(rng.random(space.shape) < 0.5, space.low, space.high).astype(np.float32)
            action = held
        next_obs, reward, terminated, _, _ = env.step(action)
        columns.append((obs, action, reward, next_obs, terminated, *simulator_state(env)))
        obs = env.reset()[0] if terminated else next_obs
    obs, action, reward, next_obs, terminated, qpos, qvel = map(np.array, zip(*columns, strict=True))
    env.close()
    tensors = (obs, spaces.encode(env.action_space, action), reward, next_obs)
    return Real(*(torch.as_tensor(x, dtype=torch.float64) for x in tensors), torch.as_tensor(terminated), qpos, qvel)
