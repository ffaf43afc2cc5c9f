"""Diffusion over trajectories: a temporal U-Net that guesses their noise, and refinement in few reverse steps."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from learneddyn.offline.diffusion import NoiseSchedule
from learneddyn.offline.generative import sinusoids
from learneddyn.offline.proposer import masked_mean, start_weights

KERNEL, GROUPS = 5, 8
"""Of the convolutions, and of their normalisation."""


class Convolution(nn.Sequential):
    """Convolution along time, group normalisation, Mish."""

    def __init__(self, inputs: int, outputs: int) -> None:
        groups = math.gcd(GROUPS, outputs)
        super().__init__(
            nn.Conv1d(inputs, outputs, KERNEL, padding=KERNEL // 2), nn.GroupNorm(groups, outputs), nn.Mish()
        )


class Residual(nn.Module):
    """Two convolutions around a shortcut; the condition is added between them."""

    def __init__(self, inputs: int, outputs: int, condition: int) -> None:
        super().__init__()
        self.first, self.second = Convolution(inputs, outputs), Convolution(outputs, outputs)
        self.told = nn.Sequential(nn.Mish(), nn.Linear(condition, outputs))
        self.shortcut = nn.Conv1d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Float[Tensor, "b i h"], condition: Float[Tensor, "b c"]) -> Float[Tensor, "b j h"]:
        """Return the new channels."""
        return self.second(self.first(x) + self.told(condition)[..., None]) + self.shortcut(x)


class Level(nn.Module):
    """Two residual blocks."""

    def __init__(self, inputs: int, outputs: int, condition: int) -> None:
        super().__init__()
        self.first, self.second = Residual(inputs, outputs, condition), Residual(outputs, outputs, condition)

    def forward(self, x: Float[Tensor, "b i h"], condition: Float[Tensor, "b c"]) -> Float[Tensor, "b j h"]:
        """Return the new channels."""
        return self.second(self.first(x, condition), condition)


class TemporalUNet(nn.Module):
    """A U-Net of convolutions along time, told the diffusion step and, where known, the return to go.

    Args:
        state_dim: columns of a state.
        width: channels of the first level, and columns of the embeddings of step and return.
        multipliers: channels of each level as multiples of ``width``; every level but the last halves the length.
        rng: of the start weights, on the CPU.
    """

    def __init__(
        self, state_dim: int, width: int = 64, multipliers: Sequence[int] = (1, 2, 4, 8), *, rng: torch.Generator
    ) -> None:
        super().__init__()
        self.width = width
        widths = [width * times for times in multipliers]
        with start_weights(rng):
            self.embed_step = nn.Sequential(nn.Linear(width, 4 * width), nn.Mish(), nn.Linear(4 * width, width))
            self.embed_return = nn.Sequential(nn.Linear(1, 2 * width), nn.Mish(), nn.Linear(2 * width, width))
            self.down, self.up = nn.ModuleList(), nn.ModuleList()
            self.shorten, self.lengthen = nn.ModuleList(), nn.ModuleList()
            for inputs, outputs in pairwise((state_dim, *widths)):
                self.down.append(Level(inputs, outputs, 2 * width))
            for wide, narrow in pairwise(reversed(widths)):
                self.up.append(Level(2 * wide, narrow, 2 * width))
            for channels in widths[:-1]:
                self.shorten.append(nn.Conv1d(channels, channels, 3, stride=2, padding=1))
                self.lengthen.insert(0, nn.ConvTranspose1d(channels, channels, 4, stride=2, padding=1))
            self.middle = Level(widths[-1], widths[-1], 2 * width)
            self.out = nn.Sequential(Convolution(widths[0], widths[0]), nn.Conv1d(widths[0], state_dim, 1))

    def forward(
        self,
        x: Float[Tensor, "b h s"],
        step: Int[Tensor, " b"],
        returns: Float[Tensor, " b"] | None = None,
        told: Bool[Tensor, " b"] | None = None,
    ) -> Float[Tensor, "b h s"]:
        """Return the guessed noise.

        Args:
            x: noisy trajectories.
            step: diffusion step of each.
            returns: return to go at the first state; None tells no row.
            told: rows that are told their return; None tells all.
        """
        time = self.embed_step(sinusoids(step[:, None].to(x.dtype), self.width))
        if returns is None:
            goal = torch.zeros_like(time)
        else:
            goal = self.embed_return(returns[:, None])
            goal = goal if told is None else goal * told[:, None]
        condition, y, skipped = torch.cat((time, goal), 1), x.transpose(1, 2), []
        for number, level in enumerate(self.down):
            y = level(y, condition)
            skipped.append(y)
            if number < len(self.shorten):
                y = self.shorten[number](y)
        y = self.middle(y, condition)
        for level, longer in zip(self.up, self.lengthen, strict=True):
            y = longer(level(torch.cat((y, skipped.pop()), 1), condition))
        return self.out(y).transpose(1, 2)


class TrajectoryDiffusion(nn.Module):
    """A temporal U-Net with a schedule: what it learns, and how it refines.

    The first state is pinned: it carries no noise in training, and each reverse step puts it back.

    Args:
        net: guesses the noise.
        schedule: of the noise.
    """

    optimizer: torch.optim.Optimizer

    def __init__(self, net: TemporalUNet, schedule: NoiseSchedule) -> None:
        super().__init__()
        self.net, self.schedule = net, schedule

    def loss(
        self,
        states: Float[Tensor, "b h s"],
        known: Bool[Tensor, "b h"],
        rng: torch.Generator,
        returns: Float[Tensor, " b"] | None = None,
        *,
        drop: float = 0.5,
    ) -> Float[Tensor, ""]:
        """Return mean |ε - ε̂|² over known states but the first, at steps drawn uniformly.

        Args:
            states: trajectories without noise.
            known: which of their states are real.
            rng: on their device.
            returns: return to go at the first state, or None.
            drop: probability that a row is not told it (classifier-free guidance).
        """
        step = torch.randint(len(self.schedule), (len(states),), generator=rng, device=states.device)
        noise = torch.randn(states.shape, generator=rng, device=states.device)
        noisy = torch.cat((states[:, :1], self.schedule.diffuse(states, step, noise)[:, 1:]), 1)
        told = torch.rand(len(states), generator=rng, device=states.device) >= drop
        if returns is None:  # asked all the same: every parameter gets its gradient, of 0
            returns, told = torch.zeros_like(states[:, 0, 0]), torch.zeros_like(told)
        guess = self.net(noisy, step, returns, told)
        return masked_mean((guess - noise)[:, 1:].square().mean(2), known[:, 1:])

    def refine(
        self,
        states: Float[Tensor, "b h s"],
        steps: int,
        noise: Callable[[], Float[Tensor, "b h s"]],
        returns: Float[Tensor, " b"] | None = None,
        *,
        guidance: float = 1.0,
    ) -> Float[Tensor, "b h s"]:
        """Return trajectories after the last ``steps`` reverse steps; as many as the schedule has sample afresh.

        No noise is added before: ``states`` is taken for what step ``steps`` - 1 would look like.

        Args:
            states: where to start; their first state stays.
            steps: reverse steps m.
            noise: gives standard normal noise, once per step but the last.
            returns: return to go to aim at, or None for none.
            guidance: w in ε̂ = ε̂_∅ + w (ε̂_g - ε̂_∅); 1 costs half of any other.

        Raises:
            ValueError: more steps than the schedule has, or fewer than none.
        """
        if not 0 <= steps <= len(self.schedule):
            raise ValueError(f"refinement steps must be between 0 and the schedule's {len(self.schedule)}, got {steps}")
        first = states[:, :1]
        for step in reversed(range(steps)):
            guess = self._guided(states, step, returns, guidance)
            drawn = noise() if step else None
            states = torch.cat((first, self.schedule.reverse(states, guess, step, drawn)[:, 1:]), 1)
        return states

    def _guided(
        self, states: Float[Tensor, "b h s"], step: int, returns: Float[Tensor, " b"] | None, guidance: float
    ) -> Float[Tensor, "b h s"]:
        rows = len(states)
        at = torch.full((rows,), step, device=states.device)
        if returns is None or guidance == 1.0:
            return self.net(states, at, returns)
        told = torch.arange(2 * rows, device=states.device) < rows
        with_goal, without = self.net(states.repeat(2, 1, 1), at.repeat(2), returns.repeat(2), told).chunk(2)
        return without + guidance * (with_goal - without)
