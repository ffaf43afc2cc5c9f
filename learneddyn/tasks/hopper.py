"""Hopper-v5: a one-legged planar robot hops forward. 0.008 s a step, 1000 steps.

    Column     Meaning                                  Unit      Min     Max
    obs 0      torso height                             m         -inf    inf
    obs 1      torso pitch                              rad       -inf    inf
    obs 2-4    thigh, leg, foot joint angle             rad       -inf    inf
    obs 5, 6   torso velocity forward, upward           m/s       -10     10   (clipped)
    obs 7      torso pitch rate                         rad/s     -10     10   (clipped)
    obs 8-10   thigh, leg, foot joint velocity          rad/s     -10     10   (clipped)
    act 0-2    thigh, leg, foot torque                  N m/200   -1      1

Reward: ``forward distance / 0.008 s + 1 while healthy - 0.001 |action|^2``. The distance travelled within the step is
not in the observation (the velocity in it is the one at the end of the step, and clipped): None.
Termination: height at most 0.7 m, ``|pitch| >= 0.2`` rad, or any of obs 1-10 (unclipped) outside (-100, 100).
Start: height 1.25, else 0, every position and velocity uniform within 0.005 of it.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from learneddyn.core import Task
from learneddyn.tasks.codec import JointCodec
from learneddyn.tasks.resets import around

MIN_HEIGHT, ANGLE_LIMIT, STATE_LIMIT = 0.7, 0.2, 100.0


def terminated(next_obs: Float[Tensor, "b 11"]) -> Bool[Tensor, " b"]:
    """Tell which hoppers are unhealthy; NaN counts as unhealthy."""
    upright = (next_obs[:, 0] > MIN_HEIGHT) & (next_obs[:, 1].abs() < ANGLE_LIMIT)
    return ~(upright & (next_obs[:, 1:].abs() < STATE_LIMIT).all(dim=1))


def initial(lanes: int, rng: torch.Generator) -> Float[Tensor, "b 11"]:
    """Draw start states."""
    return around(lanes, [1.25] + [0.0] * 10, 0.005, rng)


TASK = Task(
    real_id="Hopper-v5",
    terminated=terminated,
    initial=initial,
    codec=JointCodec(
        "Hopper-v5",
        positions=6,
        velocities=6,
        skipped=1,
        clip=10.0,
        lost="forward position (set to 0); the part of any velocity beyond 10 m/s or rad/s",
    ),
    max_episode_steps=1000,
    notes="The reward needs the distance travelled within the step, which the observation lacks: fit with "
    "learn_reward=True. The environment also terminates when a velocity passes 100, which the observation, clipped at "
    "10, cannot show; no healthy hopper driven with full torques was seen above 24 (20,000 steps).",
)
