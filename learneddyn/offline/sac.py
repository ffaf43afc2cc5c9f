"""Offline SAC: n critics, diversity, conservatism. SAC-N, EDAC and CQL are settings of one update.

With (ã, log π) drawn from π(·|s), (ã', log π') from π(·|s'), and α the temperature:

    y   = r + γ (1 - d) [min_i Q̄_i(s', ã') - α log π']            the entropy only where ``entropy_backup`` says so
    L_Q = Σ_i mean (Q_i(s, a) - y)² + η L_div + β L_cons
    L_π = mean (α log π - min_i Q_i(s, ã))
    L_α = -log α mean (log π - A)                                  A: columns of the action

    L_div  = mean 1/(n-1) Σ_{i≠j} cos(∇_a Q_i(s, a), ∇_a Q_j(s, a))                       `diversity_loss`
    L_cons = Σ_i [mean logsumexp_{30 actions} (Q_i(s, ·) - log density) - mean Q_i(s, a)]  `conservative_values`

    SAC-N   n critics, η = 0, β = 0        EDAC   n = 10, η = 1, β = 0        CQL   n = 2, η = 0, β = 10, no entropy

The order of steps is SB3's (temperature, critics, actor, targets), so that n = 2, η = β = 0 is its SAC; the sources'
code moves actor or temperature at another place.
"""

import math
from typing import Any

import torch
from jaxtyping import Float
from stable_baselines3.common import utils
from torch import Tensor, nn

from learneddyn.data.replay import Batch
from learneddyn.offline.base import OfflineAlgorithm, descend
from learneddyn.offline.dataset import Data
from learneddyn.offline.policy import OfflinePolicy, SquashedActor

DRAWS = 10
"""Actions of each of the three kinds that the conservative term compares."""


class OfflineSAC(OfflineAlgorithm):
    """The update above; `SACN`, `EDAC` and `CQL` are its published settings.

    Args:
        policy: see `OfflineAlgorithm`.
        data: see `OfflineAlgorithm`.
        n_critics: critics n.
        diversity: η.
        conservatism: β.
        entropy_backup: whether the target counts the entropy of the next action.
        ent_coef: temperature α; "auto" learns it, from 1.
        max_ent_coef: bound of a learned temperature.
        ent_coef_learning_rate: the temperature's, if another.
        **common: see `OfflineAlgorithm`.

    Raises:
        ValueError: a weight below 0, no critic, or diversity of a single one.
    """

    def __init__(
        self,
        policy: str | type[OfflinePolicy] = "MlpPolicy",
        data: Data | None = None,
        *,
        n_critics: int = 2,
        diversity: float = 0.0,
        conservatism: float = 0.0,
        entropy_backup: bool = True,
        ent_coef: float | str = "auto",
        max_ent_coef: float = math.inf,
        ent_coef_learning_rate: float | None = None,
        **common: Any,
    ) -> None:
        for name, ok, value, allowed in (
            ("n_critics", n_critics >= 1, n_critics, "at least 1"),
            ("diversity", diversity >= 0, diversity, "at least 0"),
            ("diversity", diversity == 0 or n_critics > 1, diversity, "0 where there is one critic"),
            ("conservatism", conservatism >= 0, conservatism, "at least 0"),
            ("ent_coef", ent_coef == "auto" or not isinstance(ent_coef, str), ent_coef, "'auto' or a number"),
        ):
            if not ok:
                raise ValueError(f"{name} must be {allowed}, got {value!r}")
        self.n_critics, self.diversity, self.conservatism = n_critics, diversity, conservatism
        self.entropy_backup, self.ent_coef, self.max_ent_coef = entropy_backup, ent_coef, max_ent_coef
        self.ent_coef_learning_rate = ent_coef_learning_rate
        super().__init__(policy, data, **common)

    def _nets(self) -> dict[str, Any]:
        return {"actor": "squashed", "n_critics": self.n_critics}

    def _setup_model(self) -> None:
        super()._setup_model()
        start = 1.0 if isinstance(self.ent_coef, str) else self.ent_coef
        self.log_ent_coef = nn.Parameter(torch.full((), math.log(start), device=self.device))
        self.ent_coef_optimizer = torch.optim.Adam([self.log_ent_coef], lr=self.lr_schedule(1))

    def _set_rates(self) -> None:
        super()._set_rates()
        rate = self.ent_coef_learning_rate
        now = self.lr_schedule(self._current_progress_remaining) if rate is None else rate
        utils.update_learning_rate(self.ent_coef_optimizer, now)

    def _update(self) -> dict[str, Float[Tensor, ""]]:
        batch, policy = self._batch(), self.policy
        actor = policy.actor
        assert isinstance(actor, SquashedActor)
        action, log_prob = actor.draw(batch.obs, self._rng)
        with torch.no_grad():
            following, next_log_prob = actor.draw(batch.next_obs, self._rng)
            alpha = self.log_ent_coef.exp().clamp(max=self.max_ent_coef)
            values = policy.critic_target(batch.next_obs, following)
            value = values.amin(0)
            if self.entropy_backup:
                value = value - alpha * next_log_prob
            target = self._target(batch, value)
        if self.ent_coef == "auto":
            excess = (log_prob.detach() - action.shape[1]).mean()
            descend(-self.log_ent_coef * excess, self.ent_coef_optimizer)

        q, critic_loss = self._critic_loss(batch, target)
        descend(critic_loss, policy.critic.optimizer)

        actor_loss = (alpha * log_prob - policy.critic(batch.obs, action).amin(0)).mean()
        descend(actor_loss, actor.optimizer)
        policy.follow(self.tau)
        return {
            "critic_loss": critic_loss,
            "actor_loss": actor_loss,
            "ent_coef": alpha,
            "q": q.mean(),
            "spread": (values.mean(0) - values.amin(0)).mean(),
        }

    def _target(self, batch: Batch, value: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """Return y, given the value of the next state; critic rules that punish it do so here."""
        return batch.reward + self.gamma * (1 - batch.terminated) * value

    def _logged_rows(self) -> int:
        """Return how many rows at the head of a batch come from the log."""
        return self.batch_size

    def _critic_loss(self, batch: Batch, target: Float[Tensor, " b"]) -> tuple[Float[Tensor, "n b"], Float[Tensor, ""]]:
        critic, action = self.policy.critic, batch.action
        if self.diversity:
            action = action.expand(self.n_critics, -1, -1).clone().requires_grad_()
        q = critic(batch.obs, action)
        loss = (q - target).square().mean(1).sum()
        if self.diversity:
            (slopes,) = torch.autograd.grad(q.sum(), action, create_graph=True)
            loss = loss + self.diversity * diversity_loss(slopes)
        if self.conservatism:
            down = conservative_values(self.policy, batch.obs, batch.next_obs, self._rng).logsumexp(2).mean(1)
            up = q[:, : self._logged_rows()].mean(1)
            loss = loss + self.conservatism * (down - up).sum()
        return q, loss

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "log_ent_coef", "ent_coef_optimizer"]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        modules, tensors = super()._get_torch_save_params()
        return [*modules, "ent_coef_optimizer"], [*tensors, "log_ent_coef"]


def diversity_loss(slopes: Float[Tensor, "n b a"]) -> Float[Tensor, ""]:
    """Return ``mean_b 1/(n-1) Σ_{i≠j} cos(g_i, g_j)`` of the critics' action gradients g.

    With unit vectors u_i, ``Σ_{i≠j} u_i·u_j = |Σ_i u_i|² - Σ_i |u_i|²``: linear in n, not quadratic. Where actions have
    one column, every u_i is 1 or -1 and no step of a critic changes it: the loss then teaches nothing.
    """
    unit = slopes / (slopes.norm(dim=2, keepdim=True) + 1e-10)
    pairs = unit.sum(0).square().sum(1) - unit.square().sum((0, 2))
    return pairs.mean() / (len(slopes) - 1)


def conservative_values(
    policy: OfflinePolicy, obs: Float[Tensor, "b o"], next_obs: Float[Tensor, "b o"], rng: torch.Generator
) -> Float[Tensor, "n b 30"]:
    """Return ``Q_i(s, ã) - log density(ã)`` of ten actions each from π(·|s), π(·|s') and the uniform distribution.

    All are asked at s. The logsumexp over the last axis estimates the log of the integral of exp Q (up to log 30), so
    every action carries the density it was drawn with. No gradient reaches the actor.
    """
    rows = len(obs)
    with torch.no_grad():
        drawn = [policy.actor.draw(seen, rng, DRAWS) for seen in (obs, next_obs)]  # type: ignore[operator]
        action, log_density = (
            torch.stack([part.unflatten(0, (rows, DRAWS)) for part in parts], 1) for parts in zip(*drawn, strict=True)
        )
        columns = action.shape[-1]
        uniform = 2 * torch.rand(rows, 1, DRAWS, columns, generator=rng, device=obs.device) - 1
        action = torch.cat((action, uniform), 1).reshape(rows * 3 * DRAWS, columns)
        even = torch.full((rows, 1, DRAWS), -columns * math.log(2), device=obs.device)
        log_density = torch.cat((log_density, even), 1).reshape(rows, 3 * DRAWS)
    values = policy.critic(obs.repeat_interleave(3 * DRAWS, 0), action)
    return values.unflatten(1, (rows, 3 * DRAWS)) - log_density


class SACN(OfflineSAC):
    """SAC whose targets and actor trust the least of many critics.

    Source: An, Moon, Kim, Song, "Uncertainty-Based Offline Reinforcement Learning with Diversified Q-Ensemble", 2021.

    Args:
        policy: see `OfflineAlgorithm`.
        data: see `OfflineAlgorithm`.
        n_critics: 10 to 500 in the source.
        **common: see `OfflineSAC`.
    """

    def __init__(
        self,
        policy: str | type[OfflinePolicy] = "MlpPolicy",
        data: Data | None = None,
        *,
        n_critics: int = 10,
        **common: Any,
    ) -> None:
        super().__init__(policy, data, n_critics=n_critics, **common)

    def _nets(self) -> dict[str, Any]:
        return super()._nets() | DIVERSE_NETS


class EDAC(SACN):
    """SAC-N with a penalty on critics whose action gradients point the same way.

    Source: An, Moon, Kim, Song, "Uncertainty-Based Offline Reinforcement Learning with Diversified Q-Ensemble", 2021.

    Args:
        policy: see `OfflineAlgorithm`.
        data: see `OfflineAlgorithm`.
        n_critics: 10 in the source, 50 for Hopper.
        diversity: η, 1 in the source, 5 for some sets.
        **common: see `OfflineSAC`.
    """

    def __init__(
        self,
        policy: str | type[OfflinePolicy] = "MlpPolicy",
        data: Data | None = None,
        *,
        n_critics: int = 10,
        diversity: float = 1.0,
        **common: Any,
    ) -> None:
        super().__init__(policy, data, n_critics=n_critics, diversity=diversity, **common)


class CQL(OfflineSAC):
    """SAC that pushes action values down where the policy looks and up on the data.

    Source: Kumar, Zhou, Tucker, Levine, "Conservative Q-Learning for Offline Reinforcement Learning", 2020: CQL(H) with
    importance weights and a fixed weight β (the variant that learns β from a gap is not here).

    Args:
        policy: see `OfflineAlgorithm`.
        data: see `OfflineAlgorithm`.
        conservatism: β; 5 to 10 in published code for locomotion.
        actor_learning_rate: see `OfflineAlgorithm`.
        normalize_obs: standardise observations.
        **common: see `OfflineSAC`.
    """

    def __init__(
        self,
        policy: str | type[OfflinePolicy] = "MlpPolicy",
        data: Data | None = None,
        *,
        conservatism: float = 10.0,
        entropy_backup: bool = False,
        actor_learning_rate: Any = 3e-5,
        normalize_obs: bool = True,
        **common: Any,
    ) -> None:
        super().__init__(
            policy,
            data,
            conservatism=conservatism,
            entropy_backup=entropy_backup,
            actor_learning_rate=actor_learning_rate,
            normalize_obs=normalize_obs,
            **common,
        )

    def _nets(self) -> dict[str, Any]:
        return super()._nets() | {"net_arch": WIDE}


WIDE = (256, 256, 256)
DIVERSE_NETS = {"net_arch": WIDE, "hidden_bias": 0.1, "last_bounds": (1e-3, 3e-3)}
"""Start of the nets in EDAC's published code."""
