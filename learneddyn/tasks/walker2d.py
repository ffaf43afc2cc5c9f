"""Walker2d-v5: a two-legged planar robot walks forward. 0.008 s a step, 1000 steps.

    Column      Meaning                                       Unit      Min     Max
    obs 0       torso height                                  m         -inf    inf
    obs 1       torso pitch                                   rad       -inf    inf
    obs 2-4     right thigh, leg, foot joint angle            rad       -inf    inf
    obs 5-7     left thigh, leg, foot joint angle             rad       -inf    inf
    obs 8, 9    torso velocity forward, upward                m/s       -10     10   (clipped)
    obs 10      torso pitch rate                              rad/s     -10     10   (clipped)
    obs 11-13   right thigh, leg, foot joint velocity         rad/s     -10     10   (clipped)
    obs 14-16   left thigh, leg, foot joint velocity          rad/s     -10     10   (clipped)
    act 0-5     torques, right then left: thigh, leg, foot    N m/100   -1      1

Reward: ``forward distance / 0.008 s + 1 while healthy - 0.001 |action|^2``. The distance travelled within the step is
not in the observation (the velocity in it is the one at the end of the step, and clipped): None.
Termination: height outside (0.8, 2) m, or pitch outside (-1, 1) rad.
Start: height 1.25, else 0, every position and velocity uniform within 0.005 of it.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from learneddyn.core import Task
from learneddyn.tasks.codec import JointCodec
from learneddyn.tasks.resets import around

MIN_HEIGHT, MAX_HEIGHT, ANGLE_LIMIT = 0.8, 2.0, 1.0


def terminated(next_obs: Float[Tensor, "b 17"]) -> Bool[Tensor, " b"]:
    """Tell which walkers are unhealthy; NaN counts as unhealthy."""
    height, pitch = next_obs[:, 0], next_obs[:, 1]
    return ~((height > MIN_HEIGHT) & (height < MAX_HEIGHT) & (pitch.abs() < ANGLE_LIMIT))


def initial(lanes: int, rng: torch.Generator) -> Float[Tensor, "b 17"]:
    """Draw start states."""
    return around(lanes, [1.25] + [0.0] * 16, 0.005, rng)


TASK = Task(
    real_id="Walker2d-v5",
    terminated=terminated,
    initial=initial,
    codec=JointCodec(
        "Walker2d-v5",
        positions=9,
        velocities=9,
        skipped=1,
        clip=10.0,
        lost="forward position (set to 0); the part of any velocity beyond 10 m/s or rad/s, which under random torques "
        "is the case in most steps",
    ),
    max_episode_steps=1000,
    notes="The reward needs the distance travelled within the step, which the observation lacks: fit with "
    "learn_reward=True. Joint velocities pass the clip of 10 in most steps under random torques, so the observation is "
    "not a Markov state there.",
)
