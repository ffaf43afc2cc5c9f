"""Pendulum-v1: swing a torque-limited pendulum up and hold it there. 0.05 s a step, 200 steps, never terminates.

    Column   Meaning                                Unit    Min   Max
    obs 0    cosine of the angle from upright       -       -1    1
    obs 1    sine of the angle from upright         -       -1    1
    obs 2    angular velocity                       rad/s   -8    8
    act 0    torque (clipped to its bounds)         N m     -2    2

Reward, from the state BEFORE the step: ``-(angle^2 + 0.1 velocity^2 + 0.001 torque^2)``, angle in (-pi, pi].
Start: angle uniform on the circle, velocity uniform within 1 rad/s of 0.

The codec's state: ``qpos = [angle]`` in (-pi, pi], ``qvel = [angular velocity]``.
"""

import math

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from learneddyn.core import Task
from learneddyn.tasks.codec import flat, rows
from learneddyn.tasks.endless import never
from learneddyn.tasks.resets import uniform

MAX_TORQUE = 2.0


def reward(obs: Float[Tensor, "b 3"], action: Float[Tensor, "b 1"], next_obs: Float[Tensor, "b 3"]) -> Tensor:
    """Return the negative cost of the angle and velocity before the step, and of the torque."""
    angle = torch.atan2(obs[:, 1], obs[:, 0])
    torque = action[:, 0].clamp(-MAX_TORQUE, MAX_TORQUE)
    return -(angle.square() + 0.1 * obs[:, 2].square() + 0.001 * torque.square())


def initial(lanes: int, rng: torch.Generator) -> Float[Tensor, "b 3"]:
    """Draw start states."""
    angle, velocity = uniform(lanes, [-math.pi, -1.0], [math.pi, 1.0], rng).unbind(dim=1)
    return torch.stack([angle.cos(), angle.sin(), velocity], dim=1)


class PendulumCodec:
    """``obs = (cos angle, sin angle, angular velocity)``."""

    lost = "full turns of the pendulum, which change nothing"
    exact = (0, 1, 2)

    def to_simulator(self, obs: Float[Tensor, "b o"]) -> tuple[np.ndarray, np.ndarray]:
        """Return ``qpos [b, 1]`` (angle) and ``qvel [b, 1]`` (angular velocity); cos and sin need not have norm 1.

        Raises:
            ValueError: wrong number of columns.
        """
        array = rows("Pendulum-v1", obs, 3)
        return np.arctan2(array[:, 1:2], array[:, :1]), array[:, 2:].copy()

    def from_simulator(
        self, qpos: np.ndarray, qvel: np.ndarray, *, dtype: torch.dtype = torch.float32
    ) -> Float[Tensor, "b 3"]:
        """Return the observation of angles and angular velocities, on the CPU."""
        return flat(np.cos(qpos), np.sin(qpos), qvel, dtype=dtype)


TASK = Task(
    real_id="Pendulum-v1",
    reward=reward,
    terminated=never,
    initial=initial,
    codec=PendulumCodec(),
    max_episode_steps=200,
    notes="The reward follows from the observation before the step and the action.",
)
