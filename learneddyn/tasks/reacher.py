"""Reacher-v5: a planar two-link arm touches a target. 0.02 s a step, 50 steps, never terminates.

    Column     Meaning                                              Unit      Min    Max
    obs 0, 1   cosine of the shoulder, elbow angle                  -         -1     1
    obs 2, 3   sine of the shoulder, elbow angle                    -         -1     1
    obs 4, 5   target position x, y                                 m         -inf   inf
    obs 6, 7   shoulder, elbow angular velocity                     rad/s     -inf   inf
    obs 8, 9   fingertip position minus target position, x, y       m         -inf   inf
    act 0, 1   shoulder, elbow torque                               N m/200   -1     1

Reward: ``-distance(fingertip, target) - |action|^2``, the distance being that of obs 8, 9 AFTER the step.
Start: both angles uniform within 0.1 rad of 0, velocities within 0.005 rad/s, the target uniform on the disc of radius
0.2 m.

After a step MuJoCo's fingertip (obs 8, 9) is that of the integrator's last stage, not of the final angles: equal within
1e-5 m in 96% of steps, up to 8 mm apart in fast moves (20,000 random steps). At a start the two agree.
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

UPPER_ARM, FOREARM = 0.1, 0.11
TARGET_RADIUS = 0.2


def reward(obs: Float[Tensor, "b 10"], action: Float[Tensor, "b 2"], next_obs: Float[Tensor, "b 10"]) -> Tensor:
    """Return the negative distance to the target after the step, minus the squared torques."""
    return -torch.linalg.vector_norm(next_obs[:, 8:10], dim=1) - action.square().sum(dim=1)


def initial(lanes: int, rng: torch.Generator) -> Float[Tensor, "b 10"]:
    """Draw start states."""
    low, high = [-0.1, -0.1, -0.005, -0.005, 0.0, -math.pi], [0.1, 0.1, 0.005, 0.005, 1.0, math.pi]
    shoulder, elbow, v1, v2, area, bearing = uniform(lanes, low, high, rng).unbind(dim=1)
    radius = TARGET_RADIUS * area.sqrt()
    x, y = radius * bearing.cos(), radius * bearing.sin()
    tip_x = UPPER_ARM * shoulder.cos() + FOREARM * (shoulder + elbow).cos()
    tip_y = UPPER_ARM * shoulder.sin() + FOREARM * (shoulder + elbow).sin()
    columns = [shoulder.cos(), elbow.cos(), shoulder.sin(), elbow.sin(), x, y, v1, v2, tip_x - x, tip_y - y]
    return torch.stack(columns, dim=1)


class ReacherCodec:
    """``qpos = (shoulder, elbow, target x, target y)``; the target never moves."""

    lost = (
        "full turns of the joints: without effect on the shoulder, but the elbow's end stop at 3 rad gives way under "
        "full torque and an elbow beyond pi comes back at the other stop"
    )
    exact = tuple(range(8))

    def to_simulator(self, obs: Float[Tensor, "b o"]) -> tuple[np.ndarray, np.ndarray]:
        """Return ``qpos [b, 4]`` and ``qvel [b, 4]``; the fingertip columns are not needed.

        Raises:
            ValueError: wrong number of columns.
        """
        array = rows("Reacher-v5", obs, 10)
        qpos = np.concatenate([np.arctan2(array[:, 2:4], array[:, 0:2]), array[:, 4:6]], axis=1)
        return qpos, np.concatenate([array[:, 6:8], np.zeros((len(array), 2))], axis=1)

    def from_simulator(
        self, qpos: np.ndarray, qvel: np.ndarray, *, dtype: torch.dtype = torch.float32
    ) -> Float[Tensor, "b 10"]:
        """Return the observation of a state at rest in its kinematics (as at a start), on the CPU."""
        angles, target = qpos[:, :2], qpos[:, 2:]
        reach = np.stack([angles[:, 0], angles.sum(axis=1)], axis=1)
        links = np.array([UPPER_ARM, FOREARM])
        tip = np.stack([np.cos(reach) @ links, np.sin(reach) @ links], axis=1)
        return flat(np.cos(angles), np.sin(angles), target, qvel[:, :2], tip - target, dtype=dtype)


TASK = Task(
    real_id="Reacher-v5",
    reward=reward,
    terminated=never,
    initial=initial,
    codec=ReacherCodec(),
    max_episode_steps=50,
    notes="The reward follows from the fingertip columns of the next observation and the action. A model predicts "
    "those columns on their own; nothing forces them to agree with its angles.",
)
