"""COPlanner: plan a few steps ahead for what the model knows, and for what it does not.

Source: Wang, Zheng, Sun, Wongkamjan, Xu, Huang, "COPlanner: Plan to Roll Out Conservatively but to Explore
Optimistically for Model-Based RL" (2024); constants are those of its code for MuJoCo tasks. An action is the first one
of the best of K plans (UP-MPC, `up_mpc`): where rows are imagined the plans pay for the ensemble's uncertainty, in the
real environment they are paid for it. What is learned from the rows is left to the algorithm below.

Deviations: uncertainty is measured in standard deviations of each column's change in the real data (there: environment
units), so that a rate means the same in every task; ``standardise=False`` is the published form.
"""

import math
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from jaxtyping import Float
from stable_baselines3.common.noise import ActionNoise
from torch import Tensor

from learneddyn.agents.diagnostics import change_scale
from learneddyn.agents.dyna import Dyna
from learneddyn.agents.mbpo import MBPO
from learneddyn.core import ActionFn, Prediction, Transitions
from learneddyn.models import FitReport
from learneddyn.world import World
from learneddyn.world.sampling import draw_members

CHUNK = 16_384
"""Candidate plans in memory at a time."""


class UPMPC(Dyna):
    """Mix-in: ``class Planned(UPMPC, DynaTQC)`` chooses the actions of a Dyna agent by uncertainty-aware planning.

    Conservative in imagination, optimistic in the real environment from the first fit on; ``predict`` is the plain
    policy. With ``candidates=1`` it is the agent below, step by step. A deterministic policy (TD3) proposes different
    candidates only with ``imagination_noise``.

    Args:
        *args: see the agent.
        candidates: K, first actions drawn from the policy.
        plan_horizon: h, steps of a plan.
        conservative_rate: α_c, price of one unit of uncertainty in imagination, in reward units.
        optimistic_rate: α_o, what one unit pays in the real environment.
        plan_discount: of reward and uncertainty along a plan.
        standardise: measure uncertainty in units of each column's change; False: in the environment's units.
        use_means: measure how far the members' means lie apart, not their samples: epistemic uncertainty alone.
        **kwargs: see the agent.

    Raises:
        ValueError: an argument outside its range.
    """

    def __init__(
        self,
        *args: Any,
        candidates: int = 5,
        plan_horizon: int = 5,
        conservative_rate: float = 2.0,
        optimistic_rate: float = 1.0,
        plan_discount: float = 0.97,
        standardise: bool = True,
        use_means: bool = False,
        **kwargs: Any,
    ) -> None:
        for name, value, least in (
            ("candidates", candidates, 1),
            ("plan_horizon", plan_horizon, 1),
            ("conservative_rate", conservative_rate, 0),
            ("optimistic_rate", optimistic_rate, 0),
            ("plan_discount", plan_discount, 0),
        ):
            if not least <= value < math.inf:
                raise ValueError(f"{name} must be finite and at least {least}, got {value}")
        self.candidates, self.plan_horizon, self.plan_discount = candidates, plan_horizon, plan_discount
        self.conservative_rate, self.optimistic_rate = conservative_rate, optimistic_rate
        self.standardise, self.use_means = standardise, use_means
        self.uncertainty_scale: list[float] | None = None
        """Units of the uncertainty of every observation column and the reward; None: the environment's."""
        super().__init__(*args, **kwargs)

    def work(self, total_timesteps: int) -> dict[str, int]:
        """Return what learning asks for, the steps of plans (of all members each) among it."""
        asked = super().work(total_timesteps)
        planned = asked["imagined_steps"] + max(0, total_timesteps - self.learning_starts)
        plans = 0 if self.candidates == 1 else self.candidates * planned
        return asked | {"planned_steps": plans * self.plan_horizon}

    def on_refit(self, report: FitReport) -> None:
        """Measure the units of uncertainty anew."""
        super().on_refit(report)
        if self.standardise:
            self.uncertainty_scale = uncertainty_scale(self.real_data()).tolist()

    def imagination_policy(self, world: World) -> ActionFn:
        """Return actions whose plans avoid what the model does not know."""
        policy = super().imagination_policy(world)
        return lambda obs: self._plan(world, obs, policy, -self.conservative_rate)

    def _sample_action(
        self, learning_starts: int, action_noise: ActionNoise | None = None, n_envs: int = 1
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the action whose plan earns most or learns most; random ones and one candidate are left to SB3."""
        if self.world is None or self.candidates == 1 or self.num_timesteps < learning_starts:
            return super()._sample_action(learning_starts, action_noise, n_envs)
        assert isinstance(self._last_obs, np.ndarray)
        assert isinstance(self.action_space, spaces.Box)
        obs = torch.as_tensor(self._last_obs.reshape(n_envs, -1), dtype=torch.float32, device=self.device)
        planned = self._plan(self.world, obs, super().imagination_policy(self.world), self.optimistic_rate)
        scaled = self.policy.scale_action(planned.cpu().numpy().reshape(n_envs, *self.action_space.shape))
        if action_noise is not None:
            scaled = scaled + action_noise()
        scaled = np.clip(scaled, -1, 1)
        return self.policy.unscale_action(scaled), scaled

    def _plan(self, world: World, obs: Float[Tensor, "b o"], policy: ActionFn, rate: float) -> Float[Tensor, "b a"]:
        scale = self.uncertainty_scale
        return up_mpc(
            world,
            obs,
            policy,
            self.rng,
            rate=rate,
            candidates=self.candidates,
            horizon=self.plan_horizon,
            discount=self.plan_discount,
            uncertainty_discount=self.plan_discount,
            scale=None if scale is None else torch.tensor(scale, device=obs.device),
            use_means=self.use_means,
        )


class COPlanner(UPMPC, MBPO):
    """COPlanner on MBPO. The published MuJoCo runs also set ``real_ratio=0.5`` and ``ent_coef=0.2``."""


@torch.no_grad()
def up_mpc(
    world: World,
    obs: Float[Tensor, "b o"],
    policy: ActionFn,
    rng: torch.Generator,
    *,
    rate: float,
    candidates: int = 5,
    horizon: int = 5,
    discount: float = 0.97,
    uncertainty_discount: float = 0.97,
    scale: Float[Tensor, " w"] | None = None,
    use_means: bool = False,
) -> Float[Tensor, "b a"]:
    """Return the first action of the best of K plans per row (uncertainty-aware, policy-guided MPC).

    A plan draws its actions from the policy and its next states and rewards from one elite a step, and is worth
    ``Σ_i discount^i r_i + rate Σ_i uncertainty_discount^i u_i`` over ``horizon`` steps, with no value at the end;
    terminations inside a plan are ignored. A plan that leaves the finite numbers is the worst.

    Args:
        world: model and task; its sampler, penalty and trust play no part.
        obs: where the plans start.
        policy: draws actions; it must be stochastic for the candidates to differ.
        rng: of the model's draws, on its device.
        rate: α, reward units per unit of uncertainty: positive seeks, negative avoids.
        candidates: K; with 1 the policy's action is returned and the model not asked.
        horizon: h.
        discount: of the rewards.
        uncertainty_discount: of the uncertainty.
        scale: units of every column's uncertainty, see `uncertainty`.
        use_means: see `uncertainty`.
    """
    if candidates == 1:
        return policy(obs)

    def best(starts: Float[Tensor, "c o"]) -> Float[Tensor, "c a"]:
        state = starts.repeat_interleave(candidates, dim=0)
        rows = torch.arange(len(state), device=state.device)
        worth, memory = torch.zeros(len(state), device=state.device), None
        action = first = policy(state)
        for step in range(horizon):
            if step:
                action = policy(state)
            prediction = world.dynamics.predict(state, action, memory)
            means, stds = _columns(prediction)
            samples = means + stds * torch.randn(means.shape, generator=rng, device=means.device)
            unsure = uncertainty(means if use_means else samples, scale)
            drawn = samples[draw_members(prediction.elites, len(state), rng), rows]
            after = drawn[:, : state.shape[1]]
            reward = drawn[:, -1] if world.task.reward is None else world.task.reward(state, action, after)
            worth += discount**step * reward + rate * uncertainty_discount**step * unsure
            state, memory = after, prediction.memory
        worth = torch.where(worth.isfinite(), worth, -torch.inf).view(-1, candidates)
        chosen = worth.argmax(dim=1)
        return first.view(-1, candidates, first.shape[1])[rows[: len(chosen)], chosen]

    return torch.cat([best(starts) for starts in obs.split(max(1, CHUNK // candidates))])


@torch.no_grad()
def step_uncertainty(
    world: World,
    obs: Float[Tensor, "b o"],
    action: Float[Tensor, "b a"],
    rng: torch.Generator,
    *,
    scale: Float[Tensor, " w"] | None = None,
    use_means: bool = False,
) -> Float[Tensor, " b"]:
    """Return u of one step from every row: what a plan pays for, or is paid for. See `uncertainty`."""
    means, stds = _columns(world.dynamics.predict(obs, action))
    if not use_means:
        means = means + stds * torch.randn(means.shape, generator=rng, device=means.device)
    return uncertainty(means, scale)


def uncertainty(answers: Float[Tensor, "e b q"], scale: Float[Tensor, " w"] | None = None) -> Float[Tensor, " b"]:
    """Return the standard deviation over the members' answers, averaged over the columns.

    Args:
        answers: every member's sample or mean of the next observation and, where the model has such a head, the reward.
        scale: units of the observation's columns and of the reward (which may stand there without being asked for).
    """
    spread = answers.std(dim=0, correction=0)
    if scale is not None:
        spread = spread / scale[: spread.shape[1]]
    return spread.mean(dim=1)


def uncertainty_scale(data: Transitions) -> Float[Tensor, " w"]:
    """Return the standard deviation of every column's change, and of the reward; infinity for what never changes."""
    reward = data.reward.std(correction=0)
    return torch.cat((change_scale(data), torch.where(reward > 1e-6, reward, torch.inf)[None]))


def _columns(prediction: Prediction) -> tuple[Float[Tensor, "e b q"], Float[Tensor, "e b q"]]:
    """Return means and deviations of every member: the next observation and, where there is such a head, the reward."""
    if prediction.reward_mean is None or prediction.reward_std is None:
        return prediction.mean, prediction.std
    return (
        torch.cat((prediction.mean, prediction.reward_mean[..., None]), dim=2),
        torch.cat((prediction.std, prediction.reward_std[..., None]), dim=2),
    )
