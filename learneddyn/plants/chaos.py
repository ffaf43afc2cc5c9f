"""Chaotic flows as truths: batched integration, standardised states, no action or a push on chosen coordinates.

    truth = FlowDynamics("Lorenz63", dt=0.01)
    data = truth.log(episodes=1, steps=20_000, rng=generator(0))      # Transitions without action columns
    world = World(truth, chaos.watched("Lorenz63", initial=truth.start))

`lorenz63` needs nothing; most flows of the package dysts (extra ``dysts``) come by their names there, see
`learneddyn.plants.flows`. dysts is asked for equations, parameters and statistics only: its own integration is a loop
in SciPy, and its published series are not in the package. Its Lyapunov exponents are estimates, some rough:
`learneddyn.evaluation.chaos.lyapunov_spectrum` measures the one of ``truth.step``. So are its means and deviations:
most orbits have them within a third, those of Bouali2 lie seven deviations beside their mean.
"""

import math
from collections.abc import Sequence

import gymnasium as gym
import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from learneddyn.core import Outcome, Prediction, Transitions
from learneddyn.integrate import rk4
from learneddyn.plants.flows import Flow, constants, dysts_flow, lorenz63
from learneddyn.spaces import Spaces

__all__ = ["Flow", "FlowDynamics", "dysts_flow", "lorenz63"]

_TRANSIENT = 500
"""Hundredths of a period until an orbit counts as being on the attractor."""
_FAR, _ROUNDS = 20.0, 8
"""Standard deviations beyond which no attractor reaches, and how often starts are drawn until all are within."""


class FlowDynamics:
    """A flow as error-free `learneddyn.core.Dynamics`: one member, no noise; observations are standardised states.

    An action u in [-1, 1] per forced coordinate, held over a step, adds ``push * u`` standard deviations per unit of
    time to its derivative. Answers come in the dtype and on the device of the observations.

    Args:
        flow: a flow, "Lorenz63", or the name of one of dysts.
        dt: time a step lasts; None is a hundredth of the flow's period.
        substeps: Runge-Kutta steps of order 4 per step.
        forced: coordinates that actions push; () has no action columns.
        push: strength of the actions.
        device: of `elites` and of what `start` and `log` draw.

    Raises:
        ValueError: an unknown flow, a coordinate that it does not have, or a number that is not positive.
    """

    num_members = 1

    def __init__(
        self,
        flow: Flow | str = "Lorenz63",
        *,
        dt: float | None = None,
        substeps: int = 4,
        forced: Sequence[int] = (),
        push: float = 1.0,
        device: torch.device | str = "cpu",
    ) -> None:
        named = lorenz63() if flow == "Lorenz63" else dysts_flow(flow) if isinstance(flow, str) else flow
        self.flow, self.dt, self.substeps, self.push = named, named.period / 100 if dt is None else dt, substeps, push
        self.forced, self.device = tuple(forced), torch.device(device)
        columns = len(self.flow.mean)
        for name, value in (("dt", self.dt), ("substeps", substeps), ("push", push)):
            if not value > 0:
                raise ValueError(f"{name} must be above 0, got {value!r}")
        if any(not 0 <= column < columns for column in self.forced) or len(set(self.forced)) < len(self.forced):
            raise ValueError(f"forced must be distinct coordinates 0 to {columns - 1}, got {self.forced}")
        box = gym.spaces.Box
        self.spaces: Spaces | None = Spaces(
            box(-np.inf, np.inf, (columns,), np.float32), box(-1.0, 1.0, (len(self.forced),), np.float32)
        )

    @property
    def lyapunov(self) -> float:
        """The largest Lyapunov exponent of the flow without actions, per unit of time."""
        return self.flow.lyapunov

    @property
    def elites(self) -> Int[Tensor, " k"]:
        """The one member."""
        return torch.zeros(1, dtype=torch.long, device=self.device)

    def step(self, obs: Float[Tensor, "b o"], action: Float[Tensor, "b a"] | None = None) -> Float[Tensor, "b o"]:
        """Return the standardised states one step later; without an action nothing pushes."""
        mean, std = constants(self.flow.mean, obs), constants(self.flow.std, obs)
        push = None
        if self.forced and action is not None:
            push = torch.zeros_like(obs)
            push[:, list(self.forced)] = self.push * action.clamp(-1, 1)

        def slope(x: Tensor) -> Tensor:
            free = self.flow.slope(x * std + mean) / std
            return free if push is None else free + push

        return rk4(slope, obs, self.dt, self.substeps)

    @torch.no_grad()
    def orbits(self, obs: Float[Tensor, "b o"], steps: int) -> Float[Tensor, "b t o"]:
        """Return the starts and the ``steps`` states that follow them without actions."""
        path = [obs]
        for _ in range(steps):
            path.append(self.step(path[-1]))
        return torch.stack(path, dim=1)

    @torch.no_grad()
    def start(self, lanes: int, rng: torch.Generator) -> Float[Tensor, "b o"]:
        """Draw states on the attractor: from around the flow's own start, five to ten periods later (float32).

        The way there is cut as finely as `step` cuts it. Orbits that leave are drawn anew, each time half as far from
        the flow's start: the basin may end near it.

        Raises:
            FloatingPointError: orbits that are not finite, or far from the attractor, however near they begin.
        """
        found, rounds = self._arrivals(lanes, 0.1, rng), 1
        while bool((lost := ~(found.abs() <= _FAR).all(dim=1)).any()):
            gone = int(lost.sum())
            if rounds == _ROUNDS:
                raise FloatingPointError(
                    f"{gone} of {lanes} orbits of {self.flow.name} are not finite, or more than {_FAR:g} standard "
                    f"deviations away, in steps of {self.dt / self.substeps:.3g}: raise substeps, now {self.substeps}"
                )
            found[lost] = self._arrivals(gone, 0.1 * 0.5**rounds, rng)
            rounds += 1
        return found.float()

    def _arrivals(self, lanes: int, spread: float, rng: torch.Generator) -> Float[Tensor, "b o"]:
        """Return standardised states after the transient, from within ``spread`` deviations of the flow's start."""
        like = torch.empty(0, dtype=torch.float64, device=self.device)
        mean, std, start = (constants(part, like) for part in (self.flow.mean, self.flow.std, self.flow.start))
        noise = torch.randn(lanes, len(mean), generator=rng, device=self.device, dtype=torch.float64)
        state, drawn = start + spread * std * noise, torch.empty_like(noise)
        chosen = _TRANSIENT + torch.randint(_TRANSIENT, (lanes,), generator=rng, device=self.device)
        hundredth = self.flow.period / 100
        substeps = math.ceil(hundredth * self.substeps / self.dt - 1e-9)
        for number in range(2 * _TRANSIENT):
            drawn = torch.where((chosen == number)[:, None], state, drawn)
            state = rk4(self.flow.slope, state, hundredth, substeps)
        return (drawn - mean) / std

    @torch.no_grad()
    def log(self, episodes: int, steps: int, rng: torch.Generator) -> Transitions:
        """Return experience from the attractor under actions drawn uniformly anew at every step; rewards are zero."""
        obs, rows = self.start(episodes, rng).double(), []
        for _ in range(steps):
            action = 2 * torch.rand(episodes, len(self.forced), generator=rng, device=self.device) - 1
            after = self.step(obs, action.double())
            rows.append((obs.float(), action, after.float()))
            obs = after
        seen, acted, reached = (torch.stack(part, dim=1).flatten(0, 1) for part in zip(*rows, strict=True))
        nothing = torch.zeros(len(seen), device=self.device)
        episode = torch.arange(episodes, device=self.device).repeat_interleave(steps)
        return Transitions(seen, acted, nothing, reached, nothing.bool(), episode, self.spaces, self.flow.name)

    def sample(
        self,
        obs: Float[Tensor, "b o"],
        action: Float[Tensor, "b a"],
        member: Int[Tensor, " b"],
        rng: torch.Generator,
        memory: Float[Tensor, "b m"] | None = None,
        *,
        noise: bool = True,
    ) -> Outcome:
        """Step every row; ``member``, ``rng`` and ``noise`` change nothing."""
        return Outcome(self.step(obs, action))

    def predict(
        self, obs: Float[Tensor, "b o"], action: Float[Tensor, "b a"], memory: Float[Tensor, "b m"] | None = None
    ) -> Prediction:
        """Return the step of `sample` as the prediction of one member with zero noise."""
        after = self.step(obs, action)[None]
        return Prediction(after, torch.zeros_like(after), self.elites.to(obs.device))
