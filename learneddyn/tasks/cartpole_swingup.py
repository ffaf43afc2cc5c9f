"""learneddyn/CartPoleSwingUp-v0: swing a hanging pole up by pushing its cart. 0.04 s a step, 200 steps, no termination.

    Column  Meaning                                         Unit    Min    Max
    obs 0   cart position on its rail (rail ends ±2.5)      m       -inf   inf
    obs 1   pole angle from hanging (not wrapped)           rad     -inf   inf
    obs 2   cart velocity                                   m/s     -inf   inf
    obs 3   pole angular velocity                           rad/s   -inf   inf
    act 0   motor command on the cart                       N/100   -3     3

Reward: ``exp(-|tip - top|^2 / length^2) - 0.01 act^2`` after the step, with the pole's tip at
``(x - length sin(angle), -length cos(angle))`` and its highest place ``top = (0, length)`` above the middle of the
rail; the pole is 0.6 m long. Start: every column Gaussian about 0 with standard deviation 0.1.

Source of plant and reward: Chua, Calandra, McAllister, Levine, "Deep Reinforcement Learning in a Handful of Trials
using Probabilistic Dynamics Models" (2018).
"""

from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from learneddyn.core import Task
from learneddyn.tasks.codec import JointCodec
from learneddyn.tasks.endless import never
from learneddyn.tasks.resets import normal

POLE_LENGTH = 0.6


def reward(
    obs: Float[Tensor, "b 4"],
    action: Float[Tensor, "b 1"],
    next_obs: Float[Tensor, "b 4"],
    pole_length: float = POLE_LENGTH,
) -> Tensor:
    """Return how near the tip is to its highest place, minus the effort."""
    x, angle = next_obs[:, 0] / pole_length, next_obs[:, 1]
    # The squared distance, multiplied out: planners spend a noticeable share of their time here.
    square = x * (x - 2 * angle.sin()) + 2 * angle.cos() + 2
    return (-square).exp() - 0.01 * action[:, 0].square()


def initial(lanes: int, rng: torch.Generator) -> Float[Tensor, "b 4"]:
    """Draw start states."""
    return normal(lanes, 4, 0.1, rng)


def swing_up(real_id: str, pole_length: float = POLE_LENGTH) -> Task:
    """Return the task of the plant with a pole of this length, registered with Gymnasium as ``real_id``."""
    return Task(
        real_id=real_id,
        reward=partial(reward, pole_length=pole_length),
        terminated=never,
        initial=initial,
        codec=JointCodec(real_id, positions=2, velocities=2, lost="nothing"),
        angles=(1,),
        max_episode_steps=200,
        notes="The reward follows from the action and the next observation; nothing terminates.",
    )


TASK = swing_up("learneddyn/CartPoleSwingUp-v0")
