"""Ant-v5: a four-legged robot runs along x. 0.05 s a step, 1000 steps.

    Column       Meaning                                                    Unit      Min    Max
    obs 0        torso height                                               m         -inf   inf
    obs 1-4      torso orientation, quaternion w, x, y, z                   -         -inf   inf
    obs 5, 6     front left hip, ankle angle                                rad       -inf   inf
    obs 7, 8     front right hip, ankle angle                               rad       -inf   inf
    obs 9, 10    back left hip, ankle angle                                 rad       -inf   inf
    obs 11, 12   back right hip, ankle angle                                rad       -inf   inf
    obs 13-15    torso velocity x, y, z (world frame)                       m/s       -inf   inf
    obs 16-18    torso angular velocity x, y, z (torso frame)               rad/s     -inf   inf
    obs 19-26    joint velocities in the order of obs 5-12                  rad/s     -inf   inf
    obs 27-104   contact wrench on each of 13 bodies: torque x, y, z,       N m, N    -1     1    (clipped)
                 force x, y, z; bodies in the order of the model file
    act 0-7      torques: back right hip, ankle, front left hip, ankle,     N m/150   -1     1
                 front right hip, ankle, back left hip, ankle

Reward: ``x distance / 0.05 s + 1 while healthy - 0.5 |action|^2 - 0.0005 |clipped contact wrenches|^2``. The x position
is not in the observation, and the x velocity in it is the one at the end of the step: None.
Termination: height outside [0.2, 1] m, or a non-finite position or velocity.
Start: height 0.75, orientation (1, 0, 0, 0), joints 0, each entry of qpos (the quaternion's too: it is not normalised)
uniform within 0.1 of it, velocities Gaussian with standard deviation 0.1, contact wrenches 0.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from learneddyn.core import Task
from learneddyn.tasks.codec import JointCodec
from learneddyn.tasks.resets import around, normal

MIN_HEIGHT, MAX_HEIGHT = 0.2, 1.0
JOINT_COLUMNS, CONTACT_COLUMNS = 27, 78


def terminated(next_obs: Float[Tensor, "b 105"]) -> Bool[Tensor, " b"]:
    """Tell which ants are unhealthy."""
    height = next_obs[:, 0]
    in_range = (height >= MIN_HEIGHT) & (height <= MAX_HEIGHT)
    return ~(in_range & next_obs[:, :JOINT_COLUMNS].isfinite().all(dim=1))


def initial(lanes: int, rng: torch.Generator) -> Float[Tensor, "b 105"]:
    """Draw start states."""
    positions = around(lanes, [0.75, 1.0] + [0.0] * 11, 0.1, rng)
    velocities = normal(lanes, 14, 0.1, rng)
    return torch.cat([positions, velocities, velocities.new_zeros(lanes, CONTACT_COLUMNS)], dim=1)


TASK = Task(
    real_id="Ant-v5",
    terminated=terminated,
    initial=initial,
    codec=JointCodec(
        "Ant-v5",
        positions=15,
        velocities=14,
        skipped=2,
        derived=CONTACT_COLUMNS,
        lost="x and y position (set to 0). The contact wrenches in the observation depend on the last action and are "
        "not part of the simulator's state",
    ),
    max_episode_steps=1000,
    notes="The reward needs the distance travelled within the step, which the observation lacks: fit with "
    "learn_reward=True. Non-finite x or y positions would terminate too; the observation does not show them.",
)
