"""Stable-Baselines3's SAC with its updates rewritten for speed: same constructor, same files, same numbers.

Twin critics run as one batched net, gradients are derived by hand (`learneddyn.agents.update`), Adam and Polyak steps
work in place on packed weights, and nothing waits for the device between the updates of one ``train`` call.
"""

import copy
import io
import pathlib
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from gymnasium import spaces
from stable_baselines3 import SAC
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.torch_layers import FlattenExtractor

from learneddyn.agents.lipschitz import CriticRegulariser
from learneddyn.agents.update import SACUpdate
from learneddyn.core import Json

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


class FastSAC(SAC):
    """SAC that reads and writes Stable-Baselines3's files and trains faster.

    With SB3's own replay buffer (the default) and one seed it follows SB3's ``SAC`` up to rounding.
    `DeviceReplayBuffer` as ``replay_buffer_class`` keeps the experience on the device and samples faster.

    Policies that the fast path does not cover (gSDE, images, dict observations, another activation or features
    extractor) train as SB3 trains them, after a warning.

    Args:
        *args: see ``stable_baselines3.SAC``.
        precision: "fp32", or "bf16": products between hidden layers in bfloat16, weights and Adam in float32. It pays
            for wide layers; at 2 x 64 it is slower than "fp32" (``benchmarks/sac.py --width 64 --batch 64``).
        critic_regulariser: what keeps the critics from varying fast (`learneddyn.agents.lipschitz`), or its card,
            ``{"class": "learneddyn.agents.SpectralCap", "config": {"cap": 5.0}}``. The model works on a copy. Files
            hold the card, plain JSON, so that Stable-Baselines3 opens them without it.
        **kwargs: see ``stable_baselines3.SAC``.

    Raises:
        ValueError: an unknown precision, or "bf16" or a regulariser for a policy that the fast path does not cover.
    """

    def __init__(
        self,
        *args: Any,
        precision: str = "fp32",
        critic_regulariser: CriticRegulariser | Json | None = None,
        **kwargs: Any,
    ) -> None:
        self.precision = precision
        if isinstance(critic_regulariser, dict):
            critic_regulariser = CriticRegulariser.from_card(critic_regulariser)
        self.critic_regulariser = critic_regulariser
        self._regulariser_card: Json | None = None
        self._update: SACUpdate | None = None
        self._slow = ""
        super().__init__(*args, **kwargs)

    def _setup_model(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {sorted(PRECISIONS)}, got {self.precision!r}")
        super()._setup_model()
        self._update = None
        self._slow = self._why_slow()
        if self._slow and self.precision != "fp32":
            raise ValueError(f"precision {self.precision!r} is not available for {self._slow}")
        if self._slow and (self.critic_regulariser is not None or self._regulariser_card is not None):
            raise ValueError(f"a critic_regulariser is not available for {self._slow}")
        self._set_up_regulariser()
        if self._slow:
            warnings.warn(f"FastSAC trains as stable_baselines3.SAC does: no fast path for {self._slow}", stacklevel=2)

    @torch.no_grad()
    def _set_up_regulariser(self) -> None:
        """Take a copy of the one that was given, or read the one of a file (whose weights follow after the set-up)."""
        if self.critic_regulariser is not None:
            self.critic_regulariser = copy.deepcopy(self.critic_regulariser)
            self._packed().constrain_start()
        elif self._regulariser_card is not None:
            self.critic_regulariser = CriticRegulariser.from_card(self._regulariser_card)

    def _why_slow(self) -> str:
        """Return what the fast path does not cover, or an empty string."""
        nets = [self.actor.latent_pi, *self.critic.q_networks]
        strange = {type(m).__name__ for net in nets for m in net.children()} - {"Linear", "ReLU"}
        space = self.observation_space
        if not isinstance(space, spaces.Box) or (self.policy.normalize_images and is_image_space(space)):
            return f"the observation space {space}"
        if self.use_sde:
            return "gSDE (use_sde=True)"
        extractor = type(self.actor.features_extractor)
        if extractor is not FlattenExtractor:
            return f"the features extractor {extractor.__name__}"
        return f"layers of type {', '.join(sorted(strange))}" if strange else ""

    def train(self, gradient_steps: int, batch_size: int = 64) -> None:
        """Do ``gradient_steps`` updates on batches of the replay buffer, as ``stable_baselines3.SAC.train`` does."""
        if self._slow:
            super().train(gradient_steps, batch_size)
            return
        self.policy.set_training_mode(True)
        optimizers = [self.actor.optimizer, self.critic.optimizer]
        if self.ent_coef_optimizer is not None:
            optimizers.append(self.ent_coef_optimizer)
        self._update_learning_rate(optimizers)
        update, replay, entropy = self._packed(), self.replay_buffer, self.target_entropy
        assert replay is not None
        assert isinstance(entropy, float)
        figures = torch.empty(gradient_steps, 4, device=self.device)
        with torch.no_grad():
            for step in range(gradient_steps):
                batch = replay.sample(batch_size, env=self._vec_normalize_env)
                discount = self.gamma if batch.discounts is None else batch.discounts
                torch.stack(update(batch, discount, entropy), out=figures[step])
                if step % self.target_update_interval == 0:
                    update.follow(self.tau)
        self._n_updates += gradient_steps
        self._record(figures)

    def _packed(self) -> SACUpdate:
        """Return the packed nets and optimisers; pack anew where something else has replaced them."""
        update = self._update
        if update is None or update.regulariser is not self.critic_regulariser or not update.current(self):
            update = self._update = SACUpdate(self, PRECISIONS[self.precision], self.critic_regulariser)
        update.refresh()
        return update

    def _record(self, figures: torch.Tensor) -> None:
        alpha, alpha_loss, actor_loss, critic_loss = figures.mean(0).tolist()
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        self.logger.record("train/ent_coef", alpha)
        self.logger.record("train/actor_loss", actor_loss)
        self.logger.record("train/critic_loss", critic_loss)
        if self.ent_coef_optimizer is not None:
            self.logger.record("train/ent_coef_loss", alpha_loss)

    def save(
        self,
        path: str | pathlib.Path | io.BufferedIOBase,
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
    ) -> None:
        """Write the file that ``load`` reads, of this class and of ``stable_baselines3.SAC``."""
        self._regulariser_card = None if self.critic_regulariser is None else self.critic_regulariser.card()
        super().save(path, exclude, include)

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_update", "_slow", "critic_regulariser"]
