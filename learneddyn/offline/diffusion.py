"""Denoising diffusion: a schedule of noise, its reverse steps, and an actor that takes K of them per action.

Source: Ho, Jain, Abbeel, "Denoising Diffusion Probabilistic Models", 2020. Step k of K (0 is the least noisy):

    x_k = sqrt(ᾱ_k) x + sqrt(1 - ᾱ_k) ε,   ᾱ_k = Π_{j≤k} (1 - β_j)
    x̂  = (x_k - sqrt(1 - ᾱ_k) ε̂) / sqrt(ᾱ_k)
    x_{k-1} ~ N(sqrt(ᾱ_{k-1}) β_k / (1 - ᾱ_k) x̂ + sqrt(1 - β_k) (1 - ᾱ_{k-1}) / (1 - ᾱ_k) x_k,
                β_k (1 - ᾱ_{k-1}) / (1 - ᾱ_k)),   without noise for k = 0
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from learneddyn.offline.generative import GenerativeActor
from learneddyn.offline.policy import Normaliser


class NoiseSchedule(nn.Module):
    """The variances β_0, ..., β_{K-1} and what follows from them.

    Raises:
        ValueError: a variance outside (0, 1).
    """

    signal: Tensor
    noise: Tensor
    to_clean: Tensor
    to_noisy: Tensor
    spread: Tensor

    def __init__(self, betas: Sequence[float]) -> None:
        super().__init__()
        if not betas or not all(0 < beta < 1 for beta in betas):
            raise ValueError(f"variances of a noise schedule must be between 0 and 1, got {list(betas)}")
        beta = torch.tensor(betas, dtype=torch.float64)
        left = (1 - beta).cumprod(0)
        before = torch.cat((torch.ones(1, dtype=torch.float64), left[:-1]))
        for name, values in (
            ("signal", left.sqrt()),
            ("noise", (1 - left).sqrt()),
            ("to_clean", before.sqrt() * beta / (1 - left)),
            ("to_noisy", (1 - beta).sqrt() * (1 - before) / (1 - left)),
            ("spread", (beta * (1 - before) / (1 - left)).sqrt()),
        ):
            self.register_buffer(name, values.float())

    @classmethod
    def linear(cls, steps: int, low: float = 1e-3, high: float = 2e-2) -> "NoiseSchedule":
        """Return variances that grow linearly."""
        return cls(torch.linspace(low, high, steps, dtype=torch.float64).tolist())

    @classmethod
    def variance_preserving(cls, steps: int, low: float = 0.1, high: float = 10.0) -> "NoiseSchedule":
        """Return the schedule of few steps that diffusion policies use: -log(1 - β_k) grows linearly."""
        rates = [low / steps + (high - low) * (2 * k + 1) / (2 * steps**2) for k in range(steps)]
        return cls([1 - math.exp(-rate) for rate in rates])

    def __len__(self) -> int:
        return len(self.signal)

    def diffuse(
        self, clean: Float[Tensor, "b *x"], step: Int[Tensor, " b"], noise: Float[Tensor, "b *x"]
    ) -> Float[Tensor, "b *x"]:
        """Return x_k, every row at its own step."""
        shape = (-1, *(1,) * (clean.ndim - 1))
        return self.signal[step].view(shape) * clean + self.noise[step].view(shape) * noise

    def reverse(
        self,
        noisy: Float[Tensor, "*x"],
        guess: Float[Tensor, "*x"],
        step: int,
        noise: Float[Tensor, "*x"] | None,
        bound: float = math.inf,
    ) -> Float[Tensor, "*x"]:
        """Return x_{k-1} drawn with ``noise``, or its mean where that is None.

        Args:
            noisy: x_k.
            guess: ε̂.
            step: k.
            noise: standard normal; unused at step 0.
            bound: x̂ is clipped to this magnitude.
        """
        clean = (noisy - self.noise[step] * guess) / self.signal[step]
        if bound < math.inf:
            clean = clean.clamp(-bound, bound)
        mean = self.to_clean[step] * clean + self.to_noisy[step] * noisy
        return mean if noise is None or step == 0 else mean + self.spread[step] * noise


class DiffusionActor(GenerativeActor):
    """K reverse steps from noise to an action; every step is one net evaluation.

    Args:
        hidden: see `GenerativeActor`.
        normaliser: see `GenerativeActor`.
        action_dim: see `GenerativeActor`.
        steps: K.
        **common: see `GenerativeActor`.

    Raises:
        ValueError: no step.
    """

    def __init__(
        self, hidden: Sequence[int], normaliser: Normaliser, action_dim: int, *, steps: int = 5, **common: Any
    ) -> None:
        if steps < 1:
            raise ValueError(f"a diffusion actor takes at least 1 denoising step, got {steps}")
        super().__init__(hidden, normaliser, action_dim, **common)
        self.schedule, self.draws = NoiseSchedule.variance_preserving(steps), steps

    def at(self, obs: Float[Tensor, "b o"], noise: Float[Tensor, "d b a"]) -> Float[Tensor, "b a"]:
        """Return the action after all K steps; the first row of noise starts, the others go into the steps."""
        features, action = self.features(obs), noise[0]
        for step in reversed(range(len(self.schedule))):
            time = torch.full((len(obs), 1), float(step), device=obs.device)
            guess = self.ask(features, action, time)
            action = self.schedule.reverse(action, guess, step, noise[-step] if step else None, bound=1.0)
        return action

    def imitation(
        self, obs: Float[Tensor, "b o"], action: Float[Tensor, "b a"], rng: torch.Generator
    ) -> Float[Tensor, ""]:
        """Return mean (ε - ε̂)² over rows and action columns, at steps drawn uniformly."""
        step = torch.randint(len(self.schedule), (len(obs),), generator=rng, device=obs.device)
        noise = torch.randn(action.shape, generator=rng, device=action.device)
        noisy = self.schedule.diffuse(action, step, noise)
        guess = self.ask(self.features(obs), noisy, step[:, None].float())
        return (guess - noise).square().mean()
