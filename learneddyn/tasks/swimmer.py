"""Swimmer-v5: a chain of three links swims forward in a viscous plane. 0.04 s a step, 1000 steps, never terminates.

    Column     Meaning                                          Unit      Min    Max
    obs 0      heading of the front link (not wrapped)          rad       -inf   inf
    obs 1, 2   angle of the first, second joint                 rad       -inf   inf
    obs 3, 4   velocity of the front link along x, y            m/s       -inf   inf
    obs 5      angular velocity of the front link               rad/s     -inf   inf
    obs 6, 7   angular velocity of the first, second joint      rad/s     -inf   inf
    act 0, 1   torque at the first, second joint                N m/150   -1     1

Reward: ``x distance / 0.04 s - 0.0001 |action|^2``. The x position is not in the observation, and the x velocity in it
is the one at the end of the step, not the mean over the step: None.
Start: every position and velocity uniform within 0.1 of 0.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from learneddyn.core import Task
from learneddyn.tasks.codec import JointCodec
from learneddyn.tasks.endless import never
from learneddyn.tasks.resets import around


def initial(lanes: int, rng: torch.Generator) -> Float[Tensor, "b 8"]:
    """Draw start states."""
    return around(lanes, [0.0] * 8, 0.1, rng)


TASK = Task(
    real_id="Swimmer-v5",
    terminated=never,
    initial=initial,
    codec=JointCodec("Swimmer-v5", positions=5, velocities=5, skipped=2, lost="x and y position (set to 0)"),
    angles=(0,),
    max_episode_steps=1000,
    notes="The reward needs the distance travelled within the step, which the observation lacks: fit with "
    "learn_reward=True.",
)
