"""HumanoidStandup-v5: the Humanoid, lying on its back, gets up. 0.015 s a step, 1000 steps, never terminates.

Columns: those of `learneddyn.tasks.humanoid`.

Reward: ``height after the step / 0.003 s - 0.1 |action|^2 - min(10, 5e-7 |contact wrenches|^2) + 1``. Dividing the
height (m) by one substep magnifies rounding: with float32 observations the reward is off by up to about 5e-5.
Start: height 0.105, orientation (1, 0, 0, 0), joints 0, each entry of qpos (the quaternion's too) and of qvel uniform
within 0.01 of it; inertias and body velocities as for the Humanoid, torques and wrenches 0.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from learneddyn.core import Task
from learneddyn.tasks.endless import never
from learneddyn.tasks.humanoid import WRENCHES, codec, standing_at

SUBSTEP = 0.003
MAX_IMPACT_COST = 10.0


def reward(obs: Float[Tensor, "b 348"], action: Float[Tensor, "b 17"], next_obs: Float[Tensor, "b 348"]) -> Tensor:
    """Return the height after the step in metres per substep, minus the costs of motors and impacts."""
    impact = 5e-7 * next_obs[:, WRENCHES].square().sum(dim=1)
    return next_obs[:, 0] / SUBSTEP - 0.1 * action.square().sum(dim=1) - impact.clamp_max(MAX_IMPACT_COST) + 1


def initial(lanes: int, rng: torch.Generator) -> Float[Tensor, "b 348"]:
    """Draw start states."""
    return standing_at("HumanoidStandup-v5", 0.105, lanes, rng)


TASK = Task(
    real_id="HumanoidStandup-v5",
    reward=reward,
    terminated=never,
    initial=initial,
    codec=codec("HumanoidStandup-v5"),
    max_episode_steps=1000,
    notes="The reward follows from height and contact wrenches of the next observation and the action; with float32 "
    "observations it is off by up to about 5e-5, because the height is divided by 0.003.",
)
