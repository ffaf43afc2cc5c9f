"""RAMBO: the model itself is the pessimist. It is trained to lower the policy's value while it still fits the log.

    every adversary_every updates, adversary_steps model steps, along rollouts of at most ``horizon`` steps:
        (s', r) from a random elite
        A     = r + γ (1 - d) min_j Q_j(s', π(s')) - min_j Q_j(s, a), standardised over the batch, no gradient
        log p = log mean_elites N(s', r; μ_i, σ_i)                    gradient through μ and σ only
        L     = λ mean (A log p) + Σ_members mean [(μ_i - y)² / σ_i² + 2 log σ_i]     the last on logged rows

and then the loop of `learneddyn.offline.model_based`, on half logged, half imagined rows.
"""

import math
from typing import Any

import torch
from jaxtyping import Float, Int
from stable_baselines3.common import utils
from stable_baselines3.common.callbacks import BaseCallback
from torch import Tensor

from learneddyn.core import Prediction, State
from learneddyn.models import AbstractDynamics
from learneddyn.offline.base import descend
from learneddyn.offline.dataset import Data
from learneddyn.offline.model_based import OfflineMBPO
from learneddyn.offline.policy import OfflinePolicy


class RAMBO(OfflineMBPO):
    """Alternate updates of the policy with adversarial updates of the model.

    Source: Rigter, Lacerda, Hawes, "RAMBO-RL: Robust Adversarial Model-Based Offline Reinforcement Learning", 2022.
    Deviations: the likelihood is that of the state alone where the task gives the reward, and in environment units,
    without the penalty on the variance bounds. The first updates of a fresh agent clone the log, as in the source.

    Args:
        policy: see `OfflineAlgorithm`.
        data: see `OfflineAlgorithm`.
        adversary: λ, 3e-4 in the source for half of the sets, 0 (no adversary) for the others.
        adversary_every: updates between the turns of the model.
        adversary_steps: its steps per turn.
        adversary_batch: logged states that its rollouts start from, and logged rows of its fit.
        model_learning_rate: of its Adam.
        cloning_updates: of the actor alone, before anything else.
        rollout_every: see `OfflineMBPO`.
        real_ratio: see `OfflineMBPO`.
        normalize_obs: see `OfflineAlgorithm`.
        **common: see `OfflineMBPO`; ``model`` must be an `AbstractDynamics` with parameters.

    Raises:
        ValueError: an argument outside its range, or a model that cannot be trained.
    """

    _model_optimizer: torch.optim.Adam | None

    def __init__(
        self,
        policy: str | type[OfflinePolicy] = "MlpPolicy",
        data: Data | None = None,
        *,
        adversary: float = 3e-4,
        adversary_every: int = 1000,
        adversary_steps: int = 1000,
        adversary_batch: int = 256,
        model_learning_rate: float = 3e-4,
        cloning_updates: int = 10_000,
        rollout_every: int = 250,
        real_ratio: float = 0.5,
        normalize_obs: bool = True,
        **common: Any,
    ) -> None:
        for name, least, value in (
            ("adversary", 0, adversary),
            ("adversary_every", 1, adversary_every),
            ("adversary_steps", 1, adversary_steps),
            ("adversary_batch", 2, adversary_batch),
            ("cloning_updates", 0, cloning_updates),
        ):
            if not value >= least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        self.adversary, self.adversary_every, self.adversary_steps = adversary, adversary_every, adversary_steps
        self.adversary_batch, self.model_learning_rate = adversary_batch, model_learning_rate
        self.cloning_updates = cloning_updates
        super().__init__(
            policy,
            data,
            rollout_every=rollout_every,
            real_ratio=real_ratio,
            normalize_obs=normalize_obs,
            **common,
        )

    def _setup_learn(self, *args: Any, **kwargs: Any) -> tuple[int, BaseCallback]:
        found = super()._setup_learn(*args, **kwargs)
        if not isinstance(self.model, AbstractDynamics) or not list(self.model.parameters()):
            raise ValueError(f"RAMBO trains its model: {type(self.model).__name__} has no parameters to train")
        if self._memory is not None:
            raise ValueError(
                f"RAMBO trains its model on single steps: {type(self.model).__name__} must keep no memory here"
            )
        if self._model_optimizer is None:  # the model has only now been fitted
            self._model_optimizer = self._new_optimizer()
        assert self._model_optimizer is not None
        utils.update_learning_rate(self._model_optimizer, self.model_learning_rate)
        return found

    def _setup_model(self) -> None:
        super()._setup_model()
        self._model_optimizer = self._new_optimizer()

    def _new_optimizer(self) -> torch.optim.Adam | None:
        """Return the optimiser of the model; None for one that is not fitted, or has nothing to train."""
        if not isinstance(self.model, AbstractDynamics) or self.model.spaces is None:
            return None
        parameters = list(self.model.parameters())
        return torch.optim.Adam(parameters, lr=self.model_learning_rate) if parameters else None

    def _update(self) -> dict[str, Float[Tensor, ""]]:
        if self._n_updates == 0:
            self._clone()
        if self.adversary and self._n_updates % self.adversary_every == 0:
            for name, value in self._adversarial_turn().items():
                self.logger.record(f"model/{name}", value)
        return super()._update()

    def _clone(self) -> None:
        """Regress the logged actions with samples of the actor."""
        actor = self.policy.actor
        assert self.replay is not None
        for _ in range(self.cloning_updates):
            batch = self.replay.sample(self.batch_size, self._rng)
            descend((actor.sample(batch.obs, self._rng) - batch.action).square().mean(), actor.optimizer)

    def _adversarial_turn(self) -> dict[str, float]:
        """Train the model against the policy; return the mean of its losses."""
        assert self.world is not None
        assert self._model_optimizer is not None
        sums = torch.zeros(2, device=self.device)
        state = self._start()
        for step in range(self.adversary_steps):
            if step % self.horizon == 0 or not len(state.obs):
                state = self._start()
            with torch.no_grad():
                action = self.policy.actor.sample(state.obs, self._rng)
                taken = self._unscaled(action)
                after, outcome = self.world.step(state, taken, self._rng)
                advantage = self._advantage(state, action, after, outcome.reward, outcome.terminated)
            played = self.log_likelihood(state, taken, after.obs, outcome.reward)
            fit = self._misfit()
            descend(self.adversary * (advantage * played).mean() + fit, self._model_optimizer)
            sums += torch.stack((advantage.square().mean(), fit.detach()))
            alive = outcome.trusted & ~outcome.terminated
            state = State(after.obs[alive], after.member[alive])
        advantage_square, fit_loss = (sums / self.adversary_steps).tolist()
        return {"advantage_square": advantage_square, "fit_loss": fit_loss}

    def _start(self) -> State:
        assert self.world is not None
        return self.world.start(self.rows.obs[self._drawn()], self._rng)

    def _drawn(self) -> Int[Tensor, " b"]:
        """Draw logged rows."""
        return torch.randint(len(self.rows), (self.adversary_batch,), generator=self._rng, device=self.device)

    def _advantage(
        self, state: State, action: Tensor, after: State, reward: Tensor, terminated: Tensor
    ) -> Float[Tensor, " b"]:
        """Return A, standardised; ``reward`` is that of the world, ``action`` in [-1, 1]."""
        critic = self.policy.critic
        scaled = (reward + self.reward_shift) * self.reward_factor
        following = critic(after.obs, self.policy.actor.mode(after.obs)).amin(0)
        gain = scaled + self.gamma * following * ~terminated - critic(state.obs, action).amin(0)
        return (gain - gain.mean()) / (gain.std(correction=0) + 1e-6)

    def log_likelihood(
        self, state: State, action: Float[Tensor, "b a"], next_obs: Float[Tensor, "b o"], reward: Float[Tensor, " b"]
    ) -> Float[Tensor, " b"]:
        """Return the log density of a step under the mixture of elites, differentiable in the model's parameters."""
        assert self.model is not None
        mean, std = self._heads(self.model.predict(state.obs, action, state.memory))
        target = self._targets(next_obs, reward, mean.shape[2])
        elites = self.model.elites
        z = (target - mean[elites]) / std[elites]
        density = -(0.5 * z.square() + std[elites].log() + 0.5 * math.log(2 * math.pi)).sum(2)
        return density.logsumexp(0) - math.log(len(elites))

    def _misfit(self) -> Float[Tensor, ""]:
        """Return the members' negative log-likelihood (doubled, without constants) on logged rows."""
        assert self.model is not None
        rows = self.rows[
            torch.randint(len(self.rows), (self.adversary_batch,), generator=self._rng, device=self.device)
        ]
        mean, std = self._heads(self.model.predict(rows.obs, rows.action))
        z = (self._targets(rows.next_obs, rows.reward, mean.shape[2]) - mean) / std
        return (z.square() + 2 * std.log()).mean((1, 2)).sum()

    def _heads(self, prediction: Prediction) -> tuple[Float[Tensor, "e b q"], Float[Tensor, "e b q"]]:
        """Return means and deviations of the columns that the model answers for."""
        assert self.task is not None
        mean, std = prediction.mean, prediction.std
        if self.task.reward is None and prediction.reward_mean is not None and prediction.reward_std is not None:
            mean = torch.cat((mean, prediction.reward_mean[..., None]), 2)
            std = torch.cat((std, prediction.reward_std[..., None]), 2)
        return mean, std

    def _targets(self, next_obs: Tensor, reward: Tensor, columns: int) -> Float[Tensor, "b q"]:
        return torch.cat((next_obs, reward[:, None]), 1) if columns > next_obs.shape[1] else next_obs

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_model_optimizer"]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        modules, tensors = super()._get_torch_save_params()
        return ([*modules, "_model_optimizer"] if self._model_optimizer is not None else modules), tensors
