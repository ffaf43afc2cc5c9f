"""Pusher-v5: a seven-joint arm pushes a cylinder to a goal. 0.05 s a step, 100 steps, never terminates.

    Column      Meaning                                                           Unit    Min    Max
    obs 0-6     shoulder pan, shoulder lift, upper arm roll, elbow flex,          rad     -inf   inf
                forearm roll, wrist flex, wrist roll angle
    obs 7-13    angular velocities of the same joints                             rad/s   -inf   inf
    obs 14-16   fingertip position x, y, z                                        m       -inf   inf
    obs 17-19   cylinder position x, y, z                                         m       -inf   inf
    obs 20-22   goal position x, y, z                                             m       -inf   inf
    act 0-6     torques at the joints in the order of obs 0-6                     N m     -2     2

Reward: ``-distance(cylinder, goal) - 0.5 distance(fingertip, cylinder) - 0.1 |action|^2``, the distances being those of
obs 14-22 AFTER the step.
Start: the arm stretched out (all angles 0), joint velocities uniform within 0.005 rad/s, the goal at (0.45, -0.05), the
cylinder moved from the goal by x uniform in (-0.2, 0.2), y in (-0.3, 0), more than 0.17 m away.

After a step MuJoCo's body positions (obs 14-22) are those of the integrator's last substep, 0.01 s older than the
angles. At a start the two agree.
"""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from learneddyn.core import Task
from learneddyn.tasks.codec import flat, rows
from learneddyn.tasks.endless import never
from learneddyn.tasks.resets import around, uniform

CYLINDER_HOME, GOAL_HOME = (0.45, -0.05, -0.275), (0.45, -0.05, -0.323)
SHOULDER, UPPER_ARM_START, UPPER_ARM, FOREARM = (0.0, -0.6, 0.0), 0.1, 0.4, 0.321
FREE_RADIUS = 0.17
DRAWS = 64
"""Candidates for the cylinder; 62% of them are far enough from the goal, so that all fail once in 1e26 starts."""


def reward(obs: Float[Tensor, "b 23"], action: Float[Tensor, "b 7"], next_obs: Float[Tensor, "b 23"]) -> Tensor:
    """Return the negative distances after the step, minus the squared torques."""
    tip, cylinder, goal = next_obs[:, 14:17], next_obs[:, 17:20], next_obs[:, 20:23]
    near = torch.linalg.vector_norm(cylinder - tip, dim=1)
    far = torch.linalg.vector_norm(cylinder - goal, dim=1)
    return -far - 0.5 * near - 0.1 * action.square().sum(dim=1)


def initial(lanes: int, rng: torch.Generator) -> Float[Tensor, "b 23"]:
    """Draw start states."""
    velocities = around(lanes, [0.0] * 7, 0.005, rng)
    candidates = uniform(lanes * DRAWS, [-0.2, -0.3], [0.2, 0.0], rng).reshape(lanes, DRAWS, 2)
    free = torch.linalg.vector_norm(candidates, dim=2) > FREE_RADIUS
    first = free.to(torch.uint8).argmax(dim=1)
    moved = candidates[torch.arange(lanes, device=rng.device), first]
    tip = (SHOULDER[0] + UPPER_ARM_START + UPPER_ARM + FOREARM, *SHOULDER[1:])
    fixed = torch.tensor([tip, CYLINDER_HOME, GOAL_HOME], device=rng.device).reshape(1, 9).repeat(lanes, 1)
    fixed[:, 3:5] += moved
    return torch.cat([torch.zeros_like(velocities), velocities, fixed], dim=1)


class PusherCodec:
    """``qpos = (seven joints, cylinder y, x, goal y, x)``, the last four relative to their home."""

    lost = (
        "the cylinder's velocity (set to 0), and its position at the end of the step: the observation's is 0.01 s older"
    )
    exact = tuple(range(14)) + tuple(range(17, 23))

    def to_simulator(self, obs: Float[Tensor, "b o"]) -> tuple[np.ndarray, np.ndarray]:
        """Return ``qpos [b, 11]`` and ``qvel [b, 11]``; the fingertip and the heights are not needed.

        Raises:
            ValueError: wrong number of columns.
        """
        array = rows("Pusher-v5", obs, 23)
        cylinder, goal = array[:, 17:19] - CYLINDER_HOME[:2], array[:, 20:22] - GOAL_HOME[:2]
        qpos = np.concatenate([array[:, :7], cylinder[:, ::-1], goal[:, ::-1]], axis=1)
        return qpos, np.concatenate([array[:, 7:14], np.zeros((len(array), 4))], axis=1)

    def from_simulator(
        self, qpos: np.ndarray, qvel: np.ndarray, *, dtype: torch.dtype = torch.float32
    ) -> Float[Tensor, "b 23"]:
        """Return the observation of a state at rest in its kinematics (as at a start), on the CPU."""
        pan, lift, roll, elbow, forearm_roll = qpos[:, :5].T
        forearm = _pitched(elbow, _rolled(forearm_roll, np.tile([FOREARM, 0.0, 0.0], (len(qpos), 1))))
        arm = _pitched(lift, _rolled(roll, forearm + np.array([UPPER_ARM, 0.0, 0.0])))
        tip = _panned(pan, arm + np.array([UPPER_ARM_START, 0.0, 0.0])) + SHOULDER
        level = np.zeros((len(qpos), 1))
        cylinder = np.concatenate([qpos[:, [8, 7]], level], axis=1) + CYLINDER_HOME
        goal = np.concatenate([qpos[:, [10, 9]], level], axis=1) + GOAL_HOME
        return flat(qpos[:, :7], qvel[:, :7], tip, cylinder, goal, dtype=dtype)


def _rolled(angle: np.ndarray, vector: np.ndarray) -> np.ndarray:
    """Rotate rows about x."""
    x, y, z = vector.T
    return np.stack([x, np.cos(angle) * y - np.sin(angle) * z, np.sin(angle) * y + np.cos(angle) * z], axis=1)


def _pitched(angle: np.ndarray, vector: np.ndarray) -> np.ndarray:
    """Rotate rows about y."""
    x, y, z = vector.T
    return np.stack([np.cos(angle) * x + np.sin(angle) * z, y, np.cos(angle) * z - np.sin(angle) * x], axis=1)


def _panned(angle: np.ndarray, vector: np.ndarray) -> np.ndarray:
    """Rotate rows about z."""
    x, y, z = vector.T
    return np.stack([np.cos(angle) * x - np.sin(angle) * y, np.sin(angle) * x + np.cos(angle) * y, z], axis=1)


TASK = Task(
    real_id="Pusher-v5",
    reward=reward,
    terminated=never,
    initial=initial,
    codec=PusherCodec(),
    max_episode_steps=100,
    notes="The reward follows from the position columns of the next observation and the action. The cylinder's "
    "velocity is not observed, so a model of one step cannot know how far a pushed cylinder slides on.",
)
