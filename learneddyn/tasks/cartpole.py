"""CartPole-v1: keep a pole upright by pushing its cart left or right. 0.02 s a step, 500 steps.

    Column   Meaning                                     Unit    Min      Max
    obs 0    cart position                               m       -4.8     4.8
    obs 1    cart velocity                               m/s     -inf     inf
    obs 2    pole angle from upright                     rad     -0.419   0.419
    obs 3    pole angular velocity                       rad/s   -inf     inf
    act      push by 10 N, one-hot: left, right          -       0        1

Reward: 1 for every step, the terminating one included. Termination: cart beyond 2.4 m, or pole beyond 12 degrees.
Start: every column uniform within 0.05 of 0.

The environment terminates on its float64 state, the observation is that state in float32: a state within 1e-7 of a
limit can come out on the other side.

The codec's state: ``qpos = [cart position, pole angle]``, ``qvel = [cart velocity, pole angular velocity]``.
"""

import math

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from learneddyn.core import Task
from learneddyn.tasks.codec import flat, rows
from learneddyn.tasks.resets import around

POSITION_LIMIT, ANGLE_LIMIT = 2.4, math.radians(12)


def terminated(next_obs: Float[Tensor, "b 4"]) -> Bool[Tensor, " b"]:
    """Tell which carts have left the track and which poles have fallen."""
    return (next_obs[:, 0].abs() > POSITION_LIMIT) | (next_obs[:, 2].abs() > ANGLE_LIMIT)


def reward(obs: Float[Tensor, "b 4"], action: Float[Tensor, "b 2"], next_obs: Float[Tensor, "b 4"]) -> Tensor:
    """Return 1 for every row."""
    return torch.ones_like(next_obs[:, 0])


def initial(lanes: int, rng: torch.Generator) -> Float[Tensor, "b 4"]:
    """Draw start states."""
    return around(lanes, [0.0] * 4, 0.05, rng)


class CartPoleCodec:
    """``obs = (x, x velocity, angle, angular velocity)``."""

    lost = "nothing"
    exact = (0, 1, 2, 3)

    def to_simulator(self, obs: Float[Tensor, "b o"]) -> tuple[np.ndarray, np.ndarray]:
        """Return ``qpos [b, 2]`` and ``qvel [b, 2]``.

        Raises:
            ValueError: wrong number of columns.
        """
        array = rows("CartPole-v1", obs, 4)
        return array[:, 0::2].copy(), array[:, 1::2].copy()

    def from_simulator(
        self, qpos: np.ndarray, qvel: np.ndarray, *, dtype: torch.dtype = torch.float32
    ) -> Float[Tensor, "b 4"]:
        """Return the observation, on the CPU."""
        return flat(qpos[:, :1], qvel[:, :1], qpos[:, 1:], qvel[:, 1:], dtype=dtype)


TASK = Task(
    real_id="CartPole-v1",
    reward=reward,
    terminated=terminated,
    initial=initial,
    codec=CartPoleCodec(),
    max_episode_steps=500,
    notes="Reward and termination follow from the next observation. Actions arrive one-hot.",
)
