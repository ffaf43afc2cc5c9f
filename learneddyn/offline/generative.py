"""Actors that turn noise into actions: what flow and diffusion actors share."""

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import mish

from learneddyn.models.nets import BatchedMLP
from learneddyn.offline.policy import Actor, Normaliser

EMBEDDING = 64
"""Columns of the embedding of one time."""


def sinusoids(time: Float[Tensor, "... b 1"], columns: int = EMBEDDING) -> Float[Tensor, "... b {columns}"]:
    """Return sines and cosines of times at geometric frequencies from 1 down to 1/10000."""
    steps = torch.arange(columns // 2, device=time.device, dtype=time.dtype)
    phase = time * (steps * (-math.log(10_000) / max(columns // 2 - 1, 1))).exp()
    return torch.cat((phase.sin(), phase.cos()), -1)


class GenerativeActor(Actor):
    """A net of the noisy action, the observation and some times, that `at` applies until the noise is an action.

    Args:
        hidden: widths of the hidden layers.
        normaliser: of observations.
        action_dim: columns of the action.
        activation: of the hidden layers.
        rng: of the start weights, on the CPU.
    """

    times = 1
    """Times that the net is told."""
    draws: int
    """Standard normal rows that one action takes."""

    def __init__(
        self,
        hidden: Sequence[int],
        normaliser: Normaliser,
        action_dim: int,
        *,
        activation: Callable[[Tensor], Tensor] = mish,
        rng: torch.Generator,
    ) -> None:
        inputs = action_dim + len(normaliser.mean) + self.times * EMBEDDING
        super().__init__(BatchedMLP(1, (inputs, *hidden, action_dim), activation=activation, rng=rng), normaliser)
        self.action_dim = action_dim

    def ask(
        self, features: Float[Tensor, "b o"], noisy: Float[Tensor, "b a"], *times: Float[Tensor, "b 1"]
    ) -> Float[Tensor, "b a"]:
        """Return the net's answer for standardised observations and noisy actions."""
        return self.net(torch.cat((noisy, features, *map(sinusoids, times)), 1))[0]

    def features(self, obs: Float[Tensor, "b o"]) -> Float[Tensor, "b o"]:
        """Return standardised observations."""
        return self._normaliser[0](obs)

    @abstractmethod
    def at(self, obs: Float[Tensor, "b o"], noise: Float[Tensor, "d b a"]) -> Float[Tensor, "b a"]:
        """Return the action that this noise gives, ``draws`` rows of it per action; not yet clipped to [-1, 1]."""

    def noise(self, rows: int, rng: torch.Generator | None = None) -> Float[Tensor, "d {rows} a"]:
        """Return standard normal noise for ``rows`` actions; without ``rng`` from torch's global generator."""
        return torch.randn(self.draws, rows, self.action_dim, generator=rng, device=self.net.biases[0].device)

    def sample(self, obs: Float[Tensor, "b o"], rng: torch.Generator | None = None) -> Float[Tensor, "b a"]:
        """Return a drawn action, clipped to [-1, 1]: beyond the box it has no gradient."""
        return self.at(obs, self.noise(len(obs), rng)).clamp(-1, 1)

    def mode(self, obs: Float[Tensor, "b o"]) -> Float[Tensor, "b a"]:
        """Return the action of no noise, clipped to [-1, 1]."""
        return self.at(obs, torch.zeros(self.draws, len(obs), self.action_dim, device=obs.device)).clamp(-1, 1)
