"""InvertedPendulum-v5: keep a pole upright on a cart that a horizontal force moves. 0.04 s a step, 1000 steps.

    Column  Meaning                                   Unit    Min    Max
    obs 0   cart position on its rail (rail ends ±1)  m       -inf   inf
    obs 1   pole angle from upright                   rad     -inf   inf
    obs 2   cart velocity                             m/s     -inf   inf
    obs 3   pole angular velocity                     rad/s   -inf   inf
    act 0   motor command on the cart                 N/100   -3     3

Reward: 1 for a step that ends upright, 0 for the one that terminates. Termination: ``|angle| > 0.2`` rad or a
non-finite entry. Start: every column uniform within 0.01 of 0.

The reward is a step function of the state: its gradient exists and is zero.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from learneddyn.core import Task
from learneddyn.tasks.codec import JointCodec
from learneddyn.tasks.resets import around

ANGLE_LIMIT = 0.2


def terminated(next_obs: Float[Tensor, "b 4"]) -> Bool[Tensor, " b"]:
    """Tell which poles have fallen (or left the numbers)."""
    return (next_obs[:, 1].abs() > ANGLE_LIMIT) | ~next_obs.isfinite().all(dim=1)


def reward(obs: Float[Tensor, "b 4"], action: Float[Tensor, "b 1"], next_obs: Float[Tensor, "b 4"]) -> Tensor:
    """Return 1 where the pole still stands, else 0."""
    # 0 * angle keeps the graph, so that a planner that differentiates gets zeros and not an error.
    standing = 1 + 0 * next_obs[:, 1]
    return torch.where(terminated(next_obs), torch.zeros_like(standing), standing)


def initial(lanes: int, rng: torch.Generator) -> Float[Tensor, "b 4"]:
    """Draw start states."""
    return around(lanes, [0.0] * 4, 0.01, rng)


TASK = Task(
    real_id="InvertedPendulum-v5",
    reward=reward,
    terminated=terminated,
    initial=initial,
    codec=JointCodec("InvertedPendulum-v5", positions=2, velocities=2, lost="nothing"),
    max_episode_steps=1000,
    notes="Reward and termination follow from the next observation.",
)
