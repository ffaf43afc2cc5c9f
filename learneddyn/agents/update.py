"""One SAC update with hand-derived gradients on packed nets.

Source: Haarnoja, Zhou, Hartikainen, Tucker et al., Soft Actor-Critic Algorithms and Applications, 2018; the order of
steps and the constants are those of Stable-Baselines3. With u = m + σε, ã = tanh u, s = log σ clamped to [-20, 2]:

    log π = Σ_a [-ε²/2 - s - ½ log 2π - log(1 - ã² + c)],          c = 1e-6
    y     = r + γ (1 - d) [min_i Q̄_i(o', ã') - α log π(ã'|o')]
    L_Q   = ½ Σ_i mean (Q_i - y)²              dL_Q/dQ_i = (Q_i - y) / B
    L_α   = -mean log α (log π + H̄)            dL_α/dlog α = -mean (log π + H̄)
    L_π   = mean (α log π - min_i Q_i(o, ã))   dL_π/dQ_i = -1{i = argmin} / B
            dL_π/du = (1 - ã²) [dL_π/dã|Q + (α/B) 2ã / (1 - ã² + c)],   dL_π/dm = dL_π/du
            dL_π/ds = dL_π/du σε - α/B, and 0 where the clamp holds

In log π the term (u - m)²/2σ² is ε²/2 whatever m and σ are, so only s and the tanh carry gradients. SB3 computes it
from u and m, and loses its digits where σ is far below m; elsewhere the two agree to rounding.
"""

import math
from typing import cast

import torch
from jaxtyping import Float
from stable_baselines3 import SAC
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from stable_baselines3.sac.policies import LOG_STD_MAX, LOG_STD_MIN
from torch import Tensor, nn

from learneddyn.agents.lipschitz import CriticRegulariser
from learneddyn.agents.packed import PackedAdam, PackedMLP

TANH_SLACK = 1e-6
"""c above, as in Stable-Baselines3's SquashedDiagGaussianDistribution."""
HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


class SACUpdate:
    """The nets and optimisers of an SB3 ``SAC``, packed; ``dtype`` is that of `PackedMLP`.

    A regulariser's loss is the one part whose gradient comes from autograd, in float32.
    """

    def __init__(self, model: SAC, dtype: torch.dtype, regulariser: CriticRegulariser | None = None) -> None:
        self.regulariser = regulariser
        actor, critic, target = self._modules = (model.actor, model.critic, model.critic_target)
        head = cast(list[nn.Linear], [actor.mu, actor.log_std])
        self.actor = PackedMLP([*([[linear]] for linear in _linears(actor.latent_pi)), [head]], dtype)
        self.critic, self.target = (
            PackedMLP(
                [[[linear] for linear in nets] for nets in zip(*map(_linears, module.q_networks), strict=True)], dtype
            )
            for module in (critic, target)
        )
        self._actor_adam, self._critic_adam = (
            PackedAdam(module.optimizer, net.parameters, net.flat, net.grad, net.views)
            for module, net in ((actor, self.actor), (critic, self.critic))
        )
        self._adams = [self._actor_adam, self._critic_adam]
        self._alpha, self._alpha_adam = _alpha_of(model), None
        if model.ent_coef_optimizer is not None:
            self._alpha_grad = torch.zeros_like(self._alpha)
            self._alpha_adam = PackedAdam(
                model.ent_coef_optimizer, [self._alpha], self._alpha.detach(), self._alpha_grad, lambda flat: [flat]
            )
            self._adams.append(self._alpha_adam)
        self._pointer = self._alpha.data_ptr()

    def current(self, model: SAC) -> bool:
        """Whether the model still lives in these packed tensors."""
        return (
            self._modules == (model.actor, model.critic, model.critic_target)
            and self._alpha is _alpha_of(model)
            and self._pointer == self._alpha.data_ptr()
            and all(net.current for net in (self.actor, self.critic, self.target))
            and all(optimizer.current for optimizer in self._adams)
        )

    def constrain_start(self) -> None:
        """Bring fresh critics, and targets equal to them, to where the regulariser allows them to be."""
        if self.regulariser is not None:
            self.regulariser.constrain(self.critic.layers)
            self.target.flat.copy_(self.critic.flat)

    def refresh(self) -> None:
        """Take up weights that were changed from outside."""
        for net in (self.actor, self.critic, self.target):
            net.refresh()

    def __call__(
        self, batch: ReplayBufferSamples, discount: float | Tensor, target_entropy: float
    ) -> tuple[Float[Tensor, ""], ...]:
        """Update temperature, critics and actor, in this order; the target nets are left to `follow`.

        Returns:
            the temperature before the update, and the losses of temperature (0 if it is fixed), actor and critics
            (a regulariser's loss included).
        """
        obs, next_obs = batch.observations.flatten(1).float(), batch.next_observations.flatten(1).float()
        rows, obs_dim = obs.shape

        out = self.actor.forward(torch.cat((obs, next_obs)))[0]
        mean, raw = out.chunk(2, dim=1)
        noise = torch.empty_like(mean)
        noise[:rows].normal_()  # two draws, as Stable-Baselines3 makes them: the same seed gives the same noise
        noise[rows:].normal_()
        log_std = raw.clamp(LOG_STD_MIN, LOG_STD_MAX)
        spread = log_std.exp().mul_(noise)
        action = (mean + spread).tanh_()
        slope = 1 - action.square()
        slack = slope + TANH_SLACK
        log_prob = -(noise.square().mul_(0.5).add_(log_std).add_(HALF_LOG_2PI).add_(slack.log())).sum(1, keepdim=True)

        alpha, alpha_loss = self._step_alpha(log_prob[:rows].mean() + target_entropy)

        value = self.target.forward(torch.cat((next_obs, action[rows:]), 1)).amin(0)
        value.sub_(alpha * log_prob[rows:]).mul_(1 - batch.dones).mul_(discount).add_(batch.rewards)
        error = self.critic.forward(torch.cat((obs, batch.actions), 1)) - value
        critic_loss = error.square().sum() * (0.5 / rows)
        self.critic.backward(error / rows)
        if self.regulariser is not None:
            critic_loss = critic_loss + self._regularise(self.regulariser, obs, batch.actions)
        self._critic_adam.step()
        if self.regulariser is not None:
            self.regulariser.constrain(self.critic.layers)
        self.critic.refresh()

        least, index = self.critic.forward(torch.cat((obs, action[:rows]), 1)).min(0, keepdim=True)
        actor_loss = alpha * log_prob[:rows].mean() - least.mean()
        chosen = torch.zeros(self.critic.count, rows, 1, device=obs.device).scatter_(0, index, -1 / rows)
        grad_u = self.critic.input_grad(chosen, obs_dim)
        grad_u = (grad_u + action[:rows] * (2 / rows * alpha) / slack[:rows]) * slope[:rows]
        grad_log_std = grad_u * spread[:rows] - alpha / rows
        grad_log_std.mul_(raw[:rows] == log_std[:rows])
        self.actor.backward(torch.cat((grad_u, grad_log_std), 1)[None])
        self._actor_adam.step()
        self.actor.refresh()
        return alpha, alpha_loss, actor_loss, critic_loss

    def follow(self, tau: float) -> None:
        """Move the target critics towards the critics by the share ``tau``."""
        self.target.flat.lerp_(self.critic.flat, tau)
        self.target.refresh()

    def _regularise(
        self, regulariser: CriticRegulariser, obs: Float[Tensor, "b o"], action: Float[Tensor, "b a"]
    ) -> Float[Tensor, ""]:
        """Add the gradient of the regulariser's loss to the critics', and return the loss."""
        with torch.enable_grad():
            layers = [(w.detach().requires_grad_(), b.detach().requires_grad_()) for w, b in self.critic.layers]
            loss = regulariser.loss(layers, obs, action)
        if loss is None:
            return torch.zeros((), device=obs.device)
        leaves = [leaf for layer in layers for leaf in layer]
        self.critic.add_grad(torch.autograd.grad(loss, leaves, materialize_grads=True))
        return loss.detach()

    def _step_alpha(self, excess: Float[Tensor, ""]) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Return temperature and its loss, both before the step."""
        if self._alpha_adam is None:
            return self._alpha, torch.zeros_like(excess)
        log_alpha = self._alpha.detach()[0]
        alpha, loss = log_alpha.exp(), -(log_alpha * excess)
        self._alpha_grad.copy_(-excess)
        self._alpha_adam.step()
        return alpha, loss


def _alpha_of(model: SAC) -> Tensor:
    """Return the logarithm of the temperature where it is learned, and the temperature where it is fixed."""
    return model.ent_coef_tensor if model.log_ent_coef is None else model.log_ent_coef


def _linears(net: nn.Module) -> list[nn.Linear]:
    return [module for module in net.children() if isinstance(module, nn.Linear)]
