"""HalfCheetah-v5: a two-legged planar robot runs forward. 0.05 s a step, 1000 steps, never terminates.

    Column      Meaning                                            Unit     Min    Max
    obs 0       torso height above its start                       m        -inf   inf
    obs 1       torso pitch (not wrapped: flips add up)            rad      -inf   inf
    obs 2-4     back thigh, shin, foot angle                       rad      -inf   inf
    obs 5-7     front thigh, shin, foot angle                      rad      -inf   inf
    obs 8, 9    torso velocity forward, upward                     m/s      -inf   inf
    obs 10      torso pitch rate                                   rad/s    -inf   inf
    obs 11-13   back thigh, shin, foot angular velocity            rad/s    -inf   inf
    obs 14-16   front thigh, shin, foot angular velocity           rad/s    -inf   inf
    act 0-5     torques, back then front: thigh, shin, foot        N m / gear (120, 90, 60, 120, 60, 30)   -1   1

Reward: ``forward distance / 0.05 s - 0.1 |action|^2``. The forward position is not in the observation, and the forward
velocity in it is the one at the end of the step, not the mean over the step: None.
Start: positions uniform within 0.1 of 0, velocities Gaussian with standard deviation 0.1.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from learneddyn.core import Task
from learneddyn.tasks.codec import JointCodec
from learneddyn.tasks.endless import never
from learneddyn.tasks.resets import around, normal


def initial(lanes: int, rng: torch.Generator) -> Float[Tensor, "b 17"]:
    """Draw start states."""
    return torch.cat([around(lanes, [0.0] * 8, 0.1, rng), normal(lanes, 9, 0.1, rng)], dim=1)


TASK = Task(
    real_id="HalfCheetah-v5",
    terminated=never,
    initial=initial,
    codec=JointCodec("HalfCheetah-v5", positions=9, velocities=9, skipped=1, lost="forward position (set to 0)"),
    angles=(1,),
    max_episode_steps=1000,
    notes="The reward needs the distance travelled within the step, which the observation lacks: fit with "
    "learn_reward=True.",
)
