"""Q-learning with policies that generate actions from noise: one step of a flow, or K steps of a diffusion.

    y   = r + γ (1 - d) min_i max_m Q̄_i(s', a'_m),     a'_m ~ π̄(·|s'), m actions (1 but for sparse rewards)
    L_Q = Σ_i mean (Q_i(s, a) - y)²
    L_π = L_BC - η mean Q_i(s, a_π) / scale,             a_π ~ π(·|s), the critic i drawn anew in every update

    method   L_BC                                        scale                        net evaluations per action
    `OFQL`   |u - (v - (t - r) d/dt u)|²  (flow.py)      mean |Q_i(s, a)|, of data    1
    `DQL`    |ε - ε̂|²  (diffusion.py)                    mean |Q_j(s, a_π)|, j ≠ i    K

To act, 50 actions are drawn and one of them by the softmax of their least target values; a deterministic action is the
best of 50 that always start from the same noise, the first from none. Deviation: DQL's code evaluates by a draw from
that softmax; here deterministic actions, which are what everything in this package is evaluated by, are that argmax.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import gymnasium as gym
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import mish

from learneddyn.data.replay import Batch
from learneddyn.offline.base import OfflineAlgorithm, descend
from learneddyn.offline.dataset import Data
from learneddyn.offline.diffusion import DiffusionActor
from learneddyn.offline.flow import FlowActor
from learneddyn.offline.generative import GenerativeActor
from learneddyn.offline.policy import OfflinePolicy
from learneddyn.spaces import flat_dim

ROWS = 65_536
"""Candidate actions that are generated together; more take turns, to bound memory."""


class GenerativePolicy(OfflinePolicy):
    """A generative actor, critics, and the choice among candidate actions.

    Args:
        observation_space: see `OfflinePolicy`.
        action_space: see `OfflinePolicy`.
        lr_schedule: see `OfflinePolicy`.
        actor: "flow" or "diffusion".
        candidates: actions that are drawn to act once.
        denoising_steps: steps K of a diffusion actor.
        net_arch: see `OfflinePolicy`.
        rng: of start weights and of the noise of deterministic actions, on the CPU.
        **common: see `OfflinePolicy`.

    Raises:
        ValueError: another actor, or less than one candidate or step.
    """

    actor: GenerativeActor
    actors: ClassVar[tuple[str, ...]] = ("flow", "diffusion")
    candidate_noise: Tensor

    def __init__(
        self,
        observation_space: gym.Space[Any],
        action_space: gym.spaces.Box,
        lr_schedule: Any,
        *,
        actor: str = "flow",
        candidates: int = 50,
        denoising_steps: int = 5,
        net_arch: Any = (256, 256, 256),
        rng: torch.Generator | None = None,
        **common: Any,
    ) -> None:
        if candidates < 1:
            raise ValueError(f"candidates must be at least 1, got {candidates}")
        rng = torch.Generator().manual_seed(torch.initial_seed()) if rng is None else rng
        self.candidates, self.denoising_steps = candidates, denoising_steps
        arguments: dict[str, Any] = {"activation": mish, "actor_target": True, "net_arch": net_arch} | common
        super().__init__(observation_space, action_space, lr_schedule, actor=actor, rng=rng, **arguments)
        noise = self.actor.noise(candidates, rng)
        noise[:, 0] = 0.0  # a single candidate is the actor's mode
        self.register_buffer("candidate_noise", noise)

    def _new_actor(self, hidden: Sequence[int], rng: torch.Generator) -> GenerativeActor:
        action_dim, activation = flat_dim(self.action_space), self._arguments["activation"]
        if self._arguments["actor"] == "flow":
            return FlowActor(hidden, self.normaliser, action_dim, activation=activation, rng=rng)
        steps = self.denoising_steps
        return DiffusionActor(hidden, self.normaliser, action_dim, steps=steps, activation=activation, rng=rng)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        own = {"candidates": self.candidates, "denoising_steps": self.denoising_steps}
        return super()._get_constructor_parameters() | own

    def _predict(self, observation: Any, deterministic: bool = False) -> Float[Tensor, "b a"]:
        parts = self.columns(observation).split(max(1, ROWS // self.candidates))
        return torch.cat([self._choose(obs, deterministic) for obs in parts])

    def _choose(self, obs: Float[Tensor, "b o"], deterministic: bool) -> Float[Tensor, "b a"]:
        count = self.candidates
        rows = obs.repeat_interleave(count, 0)
        noise = self.candidate_noise.repeat(1, len(obs), 1) if deterministic else self.actor.noise(len(rows))
        actions = self.actor.at(rows, noise).clamp(-1, 1)
        if count == 1:
            return actions
        values = self.critic_target(rows, actions).amin(0).view(len(obs), count)
        chosen = values.argmax(1) if deterministic else torch.multinomial(values.softmax(1), 1)[:, 0]
        return actions.view(len(obs), count, -1)[torch.arange(len(obs), device=obs.device), chosen]


class GenerativeQL(OfflineAlgorithm):
    """The update above; `OFQL` and `DQL` are its two actors.

    Args:
        policy: see `OfflineAlgorithm`; "MlpPolicy" is `GenerativePolicy`.
        data: see `OfflineAlgorithm`.
        eta: weight η of the action value.
        backup_actions: next actions of a target, of which every critic takes its best; the sources' 10 in AntMaze.
        max_grad_norm: bound of the norm of the gradients of actor and critics; ``math.inf`` for none.
        actor_decay: share of the slow actor that stays when it moves.
        actor_every: updates between its moves.
        actor_start: updates until which it is a copy of the actor.
        **common: see `OfflineAlgorithm`.

    Raises:
        ValueError: an argument outside its range.
    """

    policy_aliases: ClassVar[dict[str, Any]] = {"MlpPolicy": GenerativePolicy}
    policy: GenerativePolicy

    def __init__(
        self,
        policy: str | type[GenerativePolicy] = "MlpPolicy",
        data: Data | None = None,
        *,
        eta: float = 1.0,
        backup_actions: int = 1,
        max_grad_norm: float = 5.0,
        actor_decay: float = 0.995,
        actor_every: int = 5,
        actor_start: int = 1000,
        **common: Any,
    ) -> None:
        for name, ok, value, allowed in (
            ("eta", eta >= 0, eta, "at least 0"),
            ("backup_actions", backup_actions >= 1, backup_actions, "at least 1"),
            ("max_grad_norm", max_grad_norm > 0, max_grad_norm, "above 0"),
            ("actor_decay", 0 <= actor_decay < 1, actor_decay, "in [0, 1)"),
            ("actor_every", actor_every >= 1, actor_every, "at least 1"),
            ("actor_start", actor_start >= 0, actor_start, "at least 0"),
        ):
            if not ok:
                raise ValueError(f"{name} must be {allowed}, got {value}")
        self.eta, self.backup_actions, self.max_grad_norm = eta, backup_actions, max_grad_norm
        self.actor_decay, self.actor_every, self.actor_start = actor_decay, actor_every, actor_start
        super().__init__(policy, data, **common)

    def _update(self) -> dict[str, Float[Tensor, ""]]:
        batch, policy = self._batch(), self.policy
        target = self._target(batch)
        q = policy.critic(batch.obs, batch.action)
        critic_loss = (q - target).square().mean(1).sum()
        descend(critic_loss, policy.critic.optimizer, self.max_grad_norm)

        imitation = self._imitation(batch)
        values = policy.critic(batch.obs, policy.actor.sample(batch.obs, self._rng))
        # Drawn on the device and used as an index there: no wait for the host.
        judge = torch.randint(len(values), (1,), generator=self._rng, device=self.device)
        scale = self._scale(q.detach(), values.detach(), judge)
        actor_loss = imitation - self.eta * values.index_select(0, judge).mean() / scale
        descend(actor_loss, policy.actor.optimizer, self.max_grad_norm)

        policy.follow(self.tau, "critic")
        done = self._n_updates + 1
        if done <= self.actor_start:
            policy.follow(1.0, "actor")
        elif done % self.actor_every == 0:
            policy.follow(1 - self.actor_decay, "actor")
        return {"critic_loss": critic_loss, "actor_loss": actor_loss, "imitation": imitation, "q": q.mean()}

    @torch.no_grad()
    def _target(self, batch: Batch) -> Float[Tensor, " b"]:
        policy, count = self.policy, self.backup_actions
        rows = batch.next_obs.repeat_interleave(count, 0)
        values = policy.critic_target(rows, policy.actor_target.sample(rows, self._rng))
        value = values.view(len(values), -1, count).amax(2).amin(0)
        return batch.reward + self.gamma * (1 - batch.terminated) * value

    @abstractmethod
    def _imitation(self, batch: Batch) -> Float[Tensor, ""]:
        """Return L_BC."""

    @abstractmethod
    def _scale(self, data: Float[Tensor, "n b"], own: Float[Tensor, "n b"], judge: Tensor) -> Float[Tensor, ""]:
        """Return what values are divided by, from those of logged and of drawn actions."""


class OFQL(GenerativeQL):
    """One-step flow Q-learning: `GenerativeQL` with an average-velocity flow, one net evaluation per action.

    Source: Nguyen, Yoo, "Revisiting Diffusion Q-Learning: From Iterative Denoising to One-Step Action Generation",
    2026. It has no public code: η is our choice (theirs is tuned per domain over 0.001 to 0.5), what it takes from DQL
    is as in DQL's code, and the choice of the critic that judges an action is DQL's too. Until ``actor_start`` the slow
    actor is a copy of the actor; DQL's code leaves it at its start weights. An actor far from the data is held back
    only where times near (r, t) = (0, 1) are drawn, which is rare: raise ``p01`` before ``eta``.

    Args:
        policy: see `GenerativeQL`.
        data: see `OfflineAlgorithm`.
        eta: see `GenerativeQL`.
        flow_ratio: probability of r = t in training; 1 is plain flow matching, which fails in one step.
        p01: probability of (r, t) = (0, 1) in training, 0 in the source.
        **common: see `GenerativeQL`. AntMaze's rewards there: ``reward_shift=-0.5, reward_scale=4.0``.

    Raises:
        ValueError: a probability outside [0, 1].
    """

    nets: ClassVar[dict[str, Any]] = {"actor": "flow"}

    def __init__(
        self,
        policy: str | type[GenerativePolicy] = "MlpPolicy",
        data: Data | None = None,
        *,
        eta: float = 0.01,
        flow_ratio: float = 0.5,
        p01: float = 0.0,
        **common: Any,
    ) -> None:
        for name, value in (("flow_ratio", flow_ratio), ("p01", p01)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {value}")
        self.flow_ratio, self.p01 = flow_ratio, p01
        super().__init__(policy, data, eta=eta, **common)

    def _imitation(self, batch: Batch) -> Float[Tensor, ""]:
        actor = self.policy.actor
        assert isinstance(actor, FlowActor)
        return actor.imitation(batch.obs, batch.action, self._rng, flow_ratio=self.flow_ratio, p01=self.p01)

    def _scale(self, data: Float[Tensor, "n b"], own: Float[Tensor, "n b"], judge: Tensor) -> Float[Tensor, ""]:
        return data.index_select(0, judge).abs().mean()


class DQL(GenerativeQL):
    """Diffusion Q-learning: `GenerativeQL` with K denoising steps per action, in acting, targets and gradients.

    Source: Wang, Hunt, Zhou, "Diffusion Policies as an Expressive Policy Class for Offline Reinforcement Learning",
    2023. Deviations: the net embeds the step as it is (no net of its own for times), and until ``actor_start`` the slow
    actor is a copy of the actor instead of its start weights.

    Args:
        policy: see `GenerativeQL`.
        data: see `OfflineAlgorithm`.
        denoising_steps: K.
        **common: see `GenerativeQL`.
    """

    nets: ClassVar[dict[str, Any]] = {"actor": "diffusion"}

    def __init__(
        self,
        policy: str | type[GenerativePolicy] = "MlpPolicy",
        data: Data | None = None,
        *,
        denoising_steps: int = 5,
        **common: Any,
    ) -> None:
        self.denoising_steps = denoising_steps
        super().__init__(policy, data, **common)

    def _nets(self) -> dict[str, Any]:
        return {"denoising_steps": self.denoising_steps}

    def _imitation(self, batch: Batch) -> Float[Tensor, ""]:
        actor = self.policy.actor
        assert isinstance(actor, DiffusionActor)
        return actor.imitation(batch.obs, batch.action, self._rng)

    def _scale(self, data: Float[Tensor, "n b"], own: Float[Tensor, "n b"], judge: Tensor) -> Float[Tensor, ""]:
        return own.index_select(0, (judge + 1) % len(own)).abs().mean()
