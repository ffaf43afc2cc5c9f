"""TD3 held to the data: TD3+BC and ReBRAC as two settings of one update.

y   = r + γ (1 - d) [min_i Q̄_i(s', ã') - β_c |ã' - a'_D|²],   ã' = clip(π̄(s') + clip(σ ε, ±c))
L_Q = Σ_i mean (Q_i(s, a) - y)²
L_π = -mean Q(s, π(s)) / mean |Q(s, π(s))| + β_a mean |π(s) - a|²      (squares summed over action columns)

TD3      β_a = 0, β_c = 0            Q = Q_1
TD3+BC   β_a = 1 / (α columns)       Q = Q_1
ReBRAC   β_a, β_c > 0                Q = min_i Q_i, LayerNorm in the critics, three hidden layers
"""

import math
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from learneddyn.core import Transitions
from learneddyn.data.replay import Batch, Replay
from learneddyn.offline.base import OfflineAlgorithm, descend
from learneddyn.offline.dataset import Data, next_actions
from learneddyn.offline.policy import OfflinePolicy


class OfflineTD3(OfflineAlgorithm):
    """The update above; `TD3BC` and `ReBRAC` are its published settings.

    Source: Fujimoto, van Hoof, Meger, "Addressing Function Approximation Error in Actor-Critic Methods", 2018.
    Deviation: with β_a = 0 the actor's loss keeps its normalisation by mean |Q|, whose scale Adam nearly ignores.

    Args:
        policy: see `OfflineAlgorithm`.
        data: see `OfflineAlgorithm`.
        actor_bc: β_a, weight of the squared distance to the logged action; actions are in [-1, 1].
        critic_bc: β_c, weight of the squared distance to the logged next action, where the log holds one.
        least_critic: whether the actor climbs the least critic (ReBRAC) or the first (TD3).
        policy_noise: σ of the target action's noise, where half the action range is 1.
        noise_clip: bound c of that noise.
        policy_delay: critic updates per update of actor and targets.
        **common: see `OfflineAlgorithm`.

    Raises:
        ValueError: a weight, noise or bound below 0, or a delay below 1.
    """

    nets: ClassVar[dict[str, Any]] = {"actor": "deterministic", "actor_target": True}

    def __init__(
        self,
        policy: str | type[OfflinePolicy] = "MlpPolicy",
        data: Data | None = None,
        *,
        actor_bc: float = 0.0,
        critic_bc: float = 0.0,
        least_critic: bool = False,
        policy_noise: float = 0.2,
        noise_clip: float = 0.5,
        policy_delay: int = 2,
        **common: Any,
    ) -> None:
        for name, least, value in (
            ("actor_bc", 0, actor_bc),
            ("critic_bc", 0, critic_bc),
            ("policy_noise", 0, policy_noise),
            ("noise_clip", 0, noise_clip),
            ("policy_delay", 1, policy_delay),
        ):
            if not value >= least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        self.actor_bc, self.critic_bc, self.least_critic = actor_bc, critic_bc, least_critic
        self.policy_noise, self.noise_clip, self.policy_delay = policy_noise, noise_clip, policy_delay
        super().__init__(policy, data, **common)

    def _fill(self, rows: Transitions) -> None:
        # The next action and whether it is known ride in the action's columns: one gather brings a whole row.
        data = self._prepared(rows)
        following, known = next_actions(data)
        obs_dim, self._columns = rows.obs.shape[1], (rows.action.shape[1], rows.action.shape[1], 1)
        self.replay = Replay(len(rows), obs_dim, sum(self._columns), device=self.device)
        parts = (data.obs, data.action, following, known[:, None], data.next_obs)
        self.replay.add_rows(torch.cat((*parts, data.reward[:, None], data.terminated[:, None]), 1))

    def _update(self) -> dict[str, Float[Tensor, ""]]:
        batch = self._batch()
        action, following, known = batch.action.split(self._columns, 1)
        batch, policy = batch._replace(action=action), self.policy
        loss, value = self._critic_loss(batch, following, known[:, 0])
        descend(loss, policy.critic.optimizer)
        figures = {"critic_loss": loss, "q": value}
        if (self._n_updates + 1) % self.policy_delay == 0:
            figures["actor_loss"] = self._actor_loss(batch)
            descend(figures["actor_loss"], policy.actor.optimizer)
            policy.follow(self.tau)
        return figures

    def _critic_loss(
        self, batch: Batch, following: Float[Tensor, "b a"], known: Float[Tensor, " b"]
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        policy = self.policy
        with torch.no_grad():
            noise = torch.randn(following.shape, generator=self._rng, device=self.device) * self.policy_noise
            noise = noise.clamp(-self.noise_clip, self.noise_clip)
            action = (policy.actor_target.mode(batch.next_obs) + noise).clamp(-1, 1)
            value = policy.critic_target(batch.next_obs, action).amin(0)
            if self.critic_bc:
                value = value - self.critic_bc * known * (action - following).square().sum(1)
            target = batch.reward + self.gamma * (1 - batch.terminated) * value
        q = policy.critic(batch.obs, batch.action)
        return (q - target).square().mean(1).sum(), q.mean()

    def _actor_loss(self, batch: Batch) -> Float[Tensor, ""]:
        action = self.policy.actor.mode(batch.obs)
        values = self.policy.critic(batch.obs, action)
        value = values.amin(0) if self.least_critic else values[0]
        loss = -value.mean() / value.detach().abs().mean()
        if self.actor_bc:
            loss = loss + self.actor_bc * (action - batch.action).square().sum(1).mean()
        return loss

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_columns"]


class TD3BC(OfflineTD3):
    """TD3 with a term of behaviour cloning: `OfflineTD3` with β_a = 1 / (α columns).

    The published loss is ``-α mean Q_1 / mean |Q_1| + mean |π - a|²`` with the square averaged over action columns;
    ours is that divided by α.

    Source: Fujimoto, Gu, "A Minimalist Approach to Offline Reinforcement Learning", 2021.

    Args:
        policy: see `OfflineAlgorithm`.
        data: see `OfflineAlgorithm`.
        alpha: weight of the action value, above 0; ``math.inf`` is TD3.
        normalize_obs: standardise observations.
        **common: see `OfflineTD3`.

    Raises:
        ValueError: alpha is not above 0.
    """

    def __init__(
        self,
        policy: str | type[OfflinePolicy] = "MlpPolicy",
        data: Data | None = None,
        *,
        alpha: float = 2.5,
        normalize_obs: bool = True,
        **common: Any,
    ) -> None:
        if not alpha > 0:
            raise ValueError(f"alpha must be above 0, got {alpha}")
        self.alpha = alpha
        super().__init__(policy, data, normalize_obs=normalize_obs, **common)

    def _setup_model(self) -> None:
        super()._setup_model()
        self.actor_bc = 1 / (self.alpha * math.prod(self.action_space.shape or ()))


class ReBRAC(OfflineTD3):
    """Behaviour regularisation in actor and critics: `OfflineTD3` with β_a, β_c and LayerNorm.

    Source: Tarasov, Kurenkov, Nikulin, Kolesnikov, "Revisiting the Minimalist Approach to Offline Reinforcement
    Learning", 2023. At the end of an episode, where the log holds no next action, the critics' term is 0.

    Args:
        policy: see `OfflineAlgorithm`.
        data: see `OfflineAlgorithm`.
        actor_bc: β_a; 0.001 to 0.1 on the source's locomotion sets.
        critic_bc: β_c; 0 to 0.5 there.
        learning_rate: of Adam.
        batch_size: rows per update.
        **common: see `OfflineTD3`.
    """

    nets: ClassVar[dict[str, Any]] = {**OfflineTD3.nets, "layer_norm": True, "net_arch": (256, 256, 256)}

    def __init__(
        self,
        policy: str | type[OfflinePolicy] = "MlpPolicy",
        data: Data | None = None,
        *,
        actor_bc: float = 0.01,
        critic_bc: float = 0.01,
        learning_rate: Any = 1e-3,
        batch_size: int = 1024,
        **common: Any,
    ) -> None:
        super().__init__(
            policy,
            data,
            actor_bc=actor_bc,
            critic_bc=critic_bc,
            least_critic=True,
            learning_rate=learning_rate,
            batch_size=batch_size,
            **common,
        )
