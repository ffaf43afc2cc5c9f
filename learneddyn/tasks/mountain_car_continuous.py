"""MountainCarContinuous-v0: rock a weak car out of a valley. 999 steps; units are the environment's own.

    Column   Meaning                                     Unit            Min     Max
    obs 0    position along the track                    length          -1.2    0.6
    obs 1    velocity                                    length / step   -0.07   0.07
    act 0    force (clipped in the motion, not in        -               -1      1
             the reward)

Reward: ``100 for reaching the goal - 0.1 action^2``. Termination: position at least 0.45 with velocity not negative.
Start: position uniform in (-0.6, -0.4), at rest.

The codec's state: ``qpos = [position]``, ``qvel = [velocity]``.
"""

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from learneddyn.core import Task
from learneddyn.tasks.codec import JointCodec
from learneddyn.tasks.resets import uniform

# The environment compares in float32; float64 observations must meet the same number.
GOAL = float(np.float32(0.45))


def terminated(next_obs: Float[Tensor, "b 2"]) -> Bool[Tensor, " b"]:
    """Tell which cars have reached the goal."""
    return (next_obs[:, 0] >= GOAL) & (next_obs[:, 1] >= 0)


def reward(obs: Float[Tensor, "b 2"], action: Float[Tensor, "b 1"], next_obs: Float[Tensor, "b 2"]) -> Tensor:
    """Return 100 at the goal, minus the cost of the force."""
    return 100 * terminated(next_obs) - 0.1 * action[:, 0].square()


def initial(lanes: int, rng: torch.Generator) -> Float[Tensor, "b 2"]:
    """Draw start states."""
    return uniform(lanes, [-0.6, 0.0], [-0.4, 0.0], rng)


TASK = Task(
    real_id="MountainCarContinuous-v0",
    reward=reward,
    terminated=terminated,
    initial=initial,
    codec=JointCodec("MountainCarContinuous-v0", positions=1, velocities=1, lost="nothing"),
    max_episode_steps=999,
    notes="Reward and termination follow from the next observation and the action.",
)
