"""Implicit Q-learning: never asks a critic about an action that the data does not hold."""

from typing import Any, ClassVar

import torch
from jaxtyping import Float
from stable_baselines3.common.type_aliases import Schedule
from torch import Tensor

from learneddyn.offline.base import Cosine, OfflineAlgorithm, descend
from learneddyn.offline.dataset import Data
from learneddyn.offline.policy import GaussianActor, OfflinePolicy

WEIGHT_MAX = 100.0
"""Bound of the advantage weights, as in the published code."""


class IQL(OfflineAlgorithm):
    """Expectile regression of the state value, and a policy that imitates by advantage.

    With u = min_i Q̄_i(s, a) - V(s), all three losses from the values before the update:

        L_V = mean |τ - 1(u < 0)| u²
        L_Q = Σ_i mean (r + γ (1 - d) V(s') - Q_i(s, a))²
        L_π = -mean min(exp(β u), 100) log π(a|s),   or min(...) |π(s) - a|² for a deterministic actor

    Source: Kostrikov, Nair, Levine, "Offline Reinforcement Learning with Implicit Q-Learning", 2021. Rewards are scaled
    by 1000 / (best - worst return) and the actor's rate falls along a cosine, as in its code for locomotion.

    Args:
        policy: see `OfflineAlgorithm`.
        data: see `OfflineAlgorithm`.
        expectile: τ, in (0, 1).
        beta: inverse temperature β, at least 0.
        actor_learning_rate: see `OfflineAlgorithm`.
        reward_scale: see `OfflineAlgorithm`.
        normalize_obs: standardise observations.
        **common: see `OfflineAlgorithm`. ``policy_kwargs={"actor": "deterministic"}`` takes the deterministic actor.

    Raises:
        ValueError: an expectile outside (0, 1), or a beta below 0.
    """

    nets: ClassVar[dict[str, Any]] = {"actor": "gaussian", "value": True}

    def __init__(
        self,
        policy: str | type[OfflinePolicy] = "MlpPolicy",
        data: Data | None = None,
        *,
        expectile: float = 0.7,
        beta: float = 3.0,
        actor_learning_rate: float | Schedule | None = Cosine(3e-4),  # noqa: B008 (immutable)
        reward_scale: float | str = "return_range",
        normalize_obs: bool = True,
        **common: Any,
    ) -> None:
        if not 0 < expectile < 1:
            raise ValueError(f"expectile must be between 0 and 1, got {expectile}")
        if not beta >= 0:
            raise ValueError(f"beta must be at least 0, got {beta}")
        self.expectile, self.beta = expectile, beta
        super().__init__(
            policy,
            data,
            actor_learning_rate=actor_learning_rate,
            reward_scale=reward_scale,
            normalize_obs=normalize_obs,
            **common,
        )

    def _update(self) -> dict[str, Float[Tensor, ""]]:
        batch, policy = self._batch(), self.policy
        with torch.no_grad():
            target = batch.reward + self.gamma * (1 - batch.terminated) * policy.value(batch.next_obs)
            advantage_of = policy.critic_target(batch.obs, batch.action).amin(0)
        advantage = advantage_of - policy.value(batch.obs)
        value_loss = expectile_loss(advantage, self.expectile)
        descend(value_loss, policy.value.optimizer)

        critic_loss = (policy.critic(batch.obs, batch.action) - target).square().mean(1).sum()
        descend(critic_loss, policy.critic.optimizer)
        policy.follow(self.tau)

        weight = (self.beta * advantage.detach()).exp().clamp(max=WEIGHT_MAX)
        actor = policy.actor
        if isinstance(actor, GaussianActor):
            cost = -actor.log_prob(batch.obs, batch.action)
        else:
            cost = (actor.mode(batch.obs) - batch.action).square().sum(1)
        actor_loss = (weight * cost).mean()
        descend(actor_loss, actor.optimizer)
        return {
            "value_loss": value_loss,
            "critic_loss": critic_loss,
            "actor_loss": actor_loss,
            "advantage": advantage.mean(),
        }


def expectile_loss(error: Float[Tensor, " b"], expectile: float) -> Float[Tensor, ""]:
    """Return ``mean |τ - 1(error < 0)| error²``; its minimiser is the τ-expectile, for τ = 1/2 the mean."""
    return ((expectile - (error < 0).float()).abs() * error.square()).mean()
