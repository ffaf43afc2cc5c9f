"""Humanoid-v5: a three-dimensional biped walks along x. 0.015 s a step, 1000 steps.

    Column        Meaning                                                       Unit            Min    Max
    obs 0         torso height                                                  m               -inf   inf
    obs 1-4       torso orientation, quaternion w, x, y, z                      -               -inf   inf
    obs 5-7       abdomen angle z, y, x                                         rad             -inf   inf
    obs 8-11      right hip x, z, y and knee angle                              rad             -inf   inf
    obs 12-15     left hip x, z, y and knee angle                               rad             -inf   inf
    obs 16-18     right shoulder 1, 2 and elbow angle                           rad             -inf   inf
    obs 19-21     left shoulder 1, 2 and elbow angle                            rad             -inf   inf
    obs 22-24     torso velocity x, y, z (world frame)                          m/s             -inf   inf
    obs 25-27     torso angular velocity x, y, z (torso frame)                  rad/s           -inf   inf
    obs 28-44     joint velocities in the order of obs 5-21                     rad/s           -inf   inf
    obs 45-174    inertia of each of 13 bodies about the robot's centre of      kg m^2, kg m,   -inf   inf
                  mass: xx, yy, zz, xy, xz, yz, mass times offset x, y, z,      kg
                  mass
    obs 175-252   velocity of each body at the centre of mass: rotation         rad/s, m/s      -inf   inf
                  x, y, z, translation x, y, z
    obs 253-269   torque of the motors at the joints in the order of obs 5-21   N m             -inf   inf
    obs 270-347   contact wrench on each body: torque x, y, z, force x, y, z    N m, N          -inf   inf
    act 0-16      motor commands in the order of obs 5-21, except that          torque / gear   -0.4   0.4
                  abdomen y comes before abdomen z

Reward: ``1.25 x distance of the centre of mass / 0.015 s + 5 while healthy - 0.1 |action|^2 - min(10, 5e-7 |contact
wrenches|^2)``. The centre of mass's position is not in the observation: None.
Termination: torso height outside (1, 2) m.
Start: height 1.4, orientation (1, 0, 0, 0), joints 0, each entry of qpos (the quaternion's too: it is not normalised)
and of qvel uniform within 0.01 of it. Inertias and body velocities follow from MuJoCo's kinematics, which `initial`
runs row by row on the CPU (4,096 rows take well under a second); torques and wrenches are 0.

After a step obs 45-269 are those of the integrator's last stage, not of the final angles.
"""

from functools import lru_cache
from typing import Any

import gymnasium as gym
import mujoco
import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from learneddyn.core import Task
from learneddyn.tasks.codec import JointCodec
from learneddyn.tasks.resets import around

MIN_HEIGHT, MAX_HEIGHT = 1.0, 2.0
JOINT_COLUMNS, BODY_COLUMNS, FORCE_COLUMNS = 45, 208, 95
WRENCHES = slice(270, 348)


def terminated(next_obs: Float[Tensor, "b 348"]) -> Bool[Tensor, " b"]:
    """Tell which humanoids are unhealthy; NaN counts as unhealthy."""
    return ~((next_obs[:, 0] > MIN_HEIGHT) & (next_obs[:, 0] < MAX_HEIGHT))


def initial(lanes: int, rng: torch.Generator) -> Float[Tensor, "b 348"]:
    """Draw start states."""
    return standing_at("Humanoid-v5", 1.4, lanes, rng)


def standing_at(real_id: str, height: float, lanes: int, rng: torch.Generator) -> Float[Tensor, "b 348"]:
    """Draw start states of a humanoid environment whose torso starts at ``height``."""
    joints = around(lanes, [height, 1.0] + [0.0] * 43, 0.01, rng)
    qpos, qvel = codec(real_id).to_simulator(torch.nn.functional.pad(joints, (0, BODY_COLUMNS + FORCE_COLUMNS)))
    bodies = torch.as_tensor(body_columns(real_id, qpos, qvel), dtype=joints.dtype, device=rng.device)
    return torch.cat([joints, bodies, joints.new_zeros(lanes, FORCE_COLUMNS)], dim=1)


def body_columns(real_id: str, qpos: np.ndarray, qvel: np.ndarray) -> np.ndarray:
    """Return inertia and velocity of all bodies, the columns 45-252 of simulator states, float64 ``[b, 208]``."""
    model = _model(real_id)
    data = mujoco.MjData(model)
    columns = np.empty((len(qpos), BODY_COLUMNS))
    for row in range(len(qpos)):
        data.qpos[:], data.qvel[:] = qpos[row], qvel[row]
        mujoco.mj_kinematics(model, data)
        mujoco.mj_comPos(model, data)
        mujoco.mj_comVel(model, data)
        columns[row, :130], columns[row, 130:] = data.cinert[1:].ravel(), data.cvel[1:].ravel()
    return columns


def codec(real_id: str) -> JointCodec:
    """Return the codec that both humanoid environments share."""
    return JointCodec(
        real_id,
        positions=24,
        velocities=23,
        skipped=2,
        derived=BODY_COLUMNS + FORCE_COLUMNS,
        lost="x and y position (set to 0). Motor torques and contact wrenches in the observation depend on the last "
        "action and are not part of the simulator's state",
    )


@lru_cache
def _model(real_id: str) -> Any:
    env = gym.make(real_id)
    try:
        return env.unwrapped.model  # type: ignore[attr-defined]
    finally:
        env.close()


TASK = Task(
    real_id="Humanoid-v5",
    terminated=terminated,
    initial=initial,
    codec=codec("Humanoid-v5"),
    max_episode_steps=1000,
    notes="The reward needs the distance that the centre of mass travelled within the step, which the observation "
    "lacks: fit with learn_reward=True.",
)
