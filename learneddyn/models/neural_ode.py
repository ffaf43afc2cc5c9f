"""Neural ODE: the time derivative of the observation is a network; its cost per solve can be regularised.

Sources: Chen, Rubanova, Bettencourt, Duvenaud, "Neural Ordinary Differential Equations" (2018); regularisation by one
embedded step at a random time: Pal, Edelman, Rackauckas, "Locally Regularized Neural Differential Equations: Some Black
Boxes Were Meant to Remain Closed!" (2023); causal weights: see `learneddyn.models.forcing.CausalWeights`.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from tqdm import tqdm

from learneddyn.core import Transitions
from learneddyn.integrate import STABILITY, embedded_step, rk4
from learneddyn.models.forcing import CausalWeights, forced_loss, stepwise_loss
from learneddyn.models.hybrid import dotted
from learneddyn.models.regression import AbstractRegression, Answer
from learneddyn.models.scale import spread
from learneddyn.models.windows import longest_window, window_starts, windows
from learneddyn.spaces import Spaces


class Solution(NamedTuple):
    """What an adaptive solver found, and what it cost."""

    obs: Float[Tensor, "t b o"]
    evaluations: int
    """Calls of the network, each for all rows."""


class NeuralODE(AbstractRegression):
    """d obs / dt = known(obs, action) + f(obs, action), the action held over a step; a reward is integrated along.

    f is a network that starts at zero. All rows are ``dt`` apart: a log that is sampled at irregular times must be
    resampled before it is fitted, and only `solve` answers at other times.

    Answers and rollouts take ``substeps`` steps of the classical Runge-Kutta method of order 4: every lane costs the
    same. Training follows windows of ``window`` steps from their first observation, with that same integrator or with
    adaptive dopri5 (torchdiffeq, extra ``models``) at ``tolerance``; both are differentiated as they run. All rows of a
    batch share dopri5's step size; without actions one solve runs through the whole window, with actions one per step.
    Over windows above one step the gradients are clipped: those of a free run may grow without bound.

    Local regularisation (dopri5 only) draws one time per update, in one of the window's solves: "uniform" over time
    (the source's unbiased form) or an accepted step ("accepted", its biased form, which costs no further point). From
    there one embedded step of the solver's OWN length is added to the graph, and to the loss either its error
    estimate, ``h sqrt(mean((error / (tolerance (1 + max(|x|, |x'|))))^2))``, or its stiffness estimate over the
    solver's stability length. A step shorter than the solver's has no error left to push down.

    Args:
        dt: seconds a step lasts.
        known: dotted path of a function (obs [b o], action [b a], **known_arguments) -> d obs / dt [b o], in torch and
            per second: the part of the equations that need not be learned. None: all is learned.
        known_arguments: its keyword arguments, JSON values.
        hidden: widths of the network (tanh); its last layer starts at zero.
        positions: observation columns whose derivative is another column, the velocity of the same place in
        velocities: (second order: only accelerations are learned, or known).
        substeps: Runge-Kutta steps per step.
        solver: "rk4" or "dopri5", in training.
        tolerance: absolute and relative, of dopri5, in standard deviations of the observations.
        regularisation: "none", "error" or "stiffness".
        draw: "accepted" or "uniform".
        strength: weight of the regularisation at the first update, falling exponentially to
        final_strength: at the last. The error estimate counts tolerances: with another tolerance, tune anew.
        window: steps of a training sequence, or the longest episode's where that is shorter.
        causal: sharpnesses of causal weights over the steps of a window, one after the other; () weighs all alike.
        updates: training updates.
        batch_size: sequences per update.
        learning_rate: of Adam, falling exponentially to
        final_learning_rate: at the last update.
        clip: norm that the gradients of windows above one step are clipped to.
        learn_reward: add a reward head.
        holdout_ratio: share of the rows that measure the noise; the last ones for windows above 1.

    Raises:
        ValueError: an argument outside its range (names it, the value, what is allowed), or a known part that cannot
            be imported.
    """

    num_members = 1

    def __init__(
        self,
        dt: float = 1.0,
        known: str | None = None,
        known_arguments: dict[str, Any] | None = None,
        hidden: Sequence[int] = (64, 64),
        positions: Sequence[int] = (),
        velocities: Sequence[int] = (),
        substeps: int = 1,
        solver: str = "rk4",
        tolerance: float = 1e-5,
        regularisation: str = "none",
        draw: str = "accepted",
        strength: float = 1e-2,
        final_strength: float = 1e-3,
        window: int = 1,
        causal: Sequence[float] = (),
        updates: int = 2000,
        batch_size: int = 64,
        learning_rate: float = 5e-3,
        final_learning_rate: float = 1e-4,
        clip: float = 1.0,
        learn_reward: bool = False,
        holdout_ratio: float = 0.2,
    ) -> None:
        super().__init__()
        regularised = regularisation != "none"
        for name, ok, value, allowed in (
            ("dt", dt > 0, dt, "above 0"),
            ("hidden", all(width >= 1 for width in hidden), list(hidden), "widths of at least 1"),
            ("velocities", len(velocities) == len(positions), list(velocities), "one per position"),
            ("substeps", substeps >= 1, substeps, "at least 1"),
            ("solver", solver in ("rk4", "dopri5"), solver, "'rk4' or 'dopri5'"),
            ("solver", solver == "dopri5" or not regularised, solver, "'dopri5' with a regularisation"),
            ("tolerance", tolerance > 0, tolerance, "above 0"),
            (
                "regularisation",
                regularisation in ("none", "error", "stiffness"),
                regularisation,
                "'none', 'error' or 'stiffness'",
            ),
            ("draw", draw in ("accepted", "uniform"), draw, "'accepted' or 'uniform'"),
            ("final_strength", 0 < final_strength <= strength, final_strength, "above 0 and at most strength"),
            ("window", window >= 1, window, "at least 1"),
            ("causal", all(sharpness > 0 for sharpness in causal), list(causal), "positive numbers, or none"),
            ("updates", updates >= 1, updates, "at least 1"),
            ("batch_size", batch_size >= 1, batch_size, "at least 1"),
            ("learning_rate", learning_rate > 0, learning_rate, "above 0"),
            (
                "final_learning_rate",
                0 < final_learning_rate <= learning_rate,
                final_learning_rate,
                "above 0 and at most learning_rate",
            ),
            ("clip", clip > 0, clip, "above 0"),
            ("holdout_ratio", 0 < holdout_ratio < 1, holdout_ratio, "between 0 and 1"),
        ):
            if not ok:
                raise ValueError(f"{name} must be {allowed}, got {value!r}")
        self.dt, self.hidden, self.substeps = dt, list(hidden), substeps
        self.known, self.known_arguments = known, known_arguments or {}
        self._known = dotted("known", known) if known else None
        self.positions, self.velocities = list(positions), list(velocities)
        self.solver, self.tolerance = solver, tolerance
        self.regularisation, self.draw = regularisation, draw
        self.strength, self.final_strength = strength, final_strength
        self.window, self.causal = window, list(causal)
        self.updates, self.batch_size = updates, batch_size
        self.learning_rate, self.final_learning_rate, self.clip = learning_rate, final_learning_rate, clip
        self.learn_reward, self.holdout_ratio = learn_reward, holdout_ratio

    def _build_members(self, spaces: Spaces) -> None:
        o, a = spaces.obs_dim, spaces.action_dim
        named = [*self.positions, *self.velocities]
        if any(not 0 <= column < o for column in named) or len(set(named)) < len(named):
            raise ValueError(
                f"positions and velocities must be distinct observation columns 0 to {o - 1}, got {self.positions} "
                f"and {self.velocities}"
            )
        if self._known is not None:
            shape = tuple(self._known(torch.zeros(2, o), torch.zeros(2, a), **self.known_arguments).shape)
            if shape != (2, o):
                raise ValueError(f"known must return the shape [b, {o}] of the observations, got {shape} for b = 2")
        free = [column for column in range(o + self.learn_reward) if column not in self.positions]
        layers: list[nn.Module] = []
        for width, wider in pairwise([o + a, *self.hidden, len(free)]):  # `_initialise` draws the weights
            layers += [nn.utils.skip_init(nn.Linear, width, wider), nn.Tanh()]
        self.network = nn.Sequential(*layers[:-1])
        places = torch.tensor([*self.positions, *free]).argsort()
        self.register_buffer("places", places, persistent=False)
        for name, width in (("obs", o), ("action", a), ("reward", 1)):
            self.register_buffer(f"{name}_mean", torch.zeros(width))
            self.register_buffer(f"{name}_std", torch.ones(width))
        self.register_buffer("free", torch.tensor(free), persistent=False)
        self.register_buffer("change", torch.ones(o + self.learn_reward))

    def slope(self, y: Float[Tensor, "b m"], u: Float[Tensor, "b a"]) -> Float[Tensor, "b m"]:
        """Return the time derivative of standardised states (and of the reward so far) under standardised inputs."""
        x = y[:, : len(self.obs_mean)]
        learned = self.network(torch.cat([x, u], dim=1)) * (self.change[self.free] / self.dt)
        if self._known is not None:
            obs, action = x * self.obs_std + self.obs_mean, u * self.action_std + self.action_mean
            rate = self._known(obs, action, **self.known_arguments).to(x) / self.obs_std
            learned = learned + nn.functional.pad(rate, (0, y.shape[1] - x.shape[1]))[:, self.free]
        if not self.positions:
            return learned
        p, v = self.positions, self.velocities
        moved = (x[:, v] * self.obs_std[v] + self.obs_mean[v]) / self.obs_std[p]
        return torch.cat([moved, learned], dim=1)[:, self.places]

    def embed(self, x: Float[Tensor, "b d"]) -> Float[Tensor, "b m"]:
        """Return the state that is integrated: the observation, and no reward yet."""
        return torch.cat([x, x.new_zeros(len(x), 1)], dim=1) if self.learn_reward else x

    def advance(self, z: Float[Tensor, "b m"], u: Float[Tensor, "b a"]) -> Float[Tensor, "b m"]:
        """Return the state one step later, with the reward of that step."""
        start = self.embed(z[:, : len(self.obs_mean)])
        return rk4(lambda y: self.slope(y, u), start, self.dt, self.substeps)

    def observe(self, z: Float[Tensor, "b m"]) -> Float[Tensor, "b m"]:
        """Return the observation, and the reward if there is a head, in standard deviations of their change in a step.

        In units of the observation itself a loss over few short steps would hardly see the slow columns.
        """
        return z / self.change

    def force(self, z: Float[Tensor, "b m"], x: Float[Tensor, "b d"], alpha: float) -> Float[Tensor, "b m"]:
        """Return the state moved towards x by the share alpha."""
        d = x.shape[1]
        return torch.cat([z[:, :d] + alpha * (x - z[:, :d]), z[:, d:]], dim=1)

    def solve(self, obs: Float[Tensor, "b o"], action: Float[Tensor, "b a"], times: Float[Tensor, " t"]) -> Solution:
        """Follow the flow from ``obs`` under held actions with dopri5 at ``tolerance``.

        Args:
            obs: starts.
            action: held all the time.
            times: increasing seconds, the first one above 0.

        Raises:
            ValueError: the model has not been fitted, or times that do not increase from above 0.
            FloatingPointError: the solver's step underflowed, or a state was no longer finite.
            ImportError: torchdiffeq is not installed (names the extra).
        """
        self._require_fitted()
        if not bool((times.diff(prepend=times.new_zeros(1)) > 0).all()):
            raise ValueError(f"times must increase, the first one above 0, got {times.tolist()}")
        watched = _Watched(self._under((action - self.action_mean) / self.action_std))
        start = self.embed((obs - self.obs_mean) / self.obs_std)
        reached = self._adaptive(watched, start, times.double())[:, :, : obs.shape[1]]
        return Solution(reached * self.obs_std + self.obs_mean, watched.calls)

    def _under(self, u: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda y: self.slope(y, u)

    def _adaptive(self, watched: "_Watched", start: Tensor, times: Tensor) -> Float[Tensor, "t b m"]:
        odeint, tolerance = _odeint(), self.tolerance
        times = torch.cat([times.new_zeros(1), times])
        try:
            return odeint(watched, start, times, method="dopri5", rtol=tolerance, atol=tolerance)[1:]
        except AssertionError as error:  # torchdiffeq asserts that its step and the state stay finite
            raise FloatingPointError(
                f"dopri5 gave up after {watched.calls} evaluations at tolerance {tolerance}: {error}. The flow grew "
                "stiff or not finite: lower learning_rate, shorten window, raise tolerance, or train with solver='rk4'"
            ) from error

    def _every(self, obs: Float[Tensor, "b o"], action: Float[Tensor, "b a"], memory: Tensor | None) -> Answer:
        x, o = (obs - self.obs_mean) / self.obs_std, obs.shape[1]
        after = self.advance(self.embed(x), (action - self.action_mean) / self.action_std)
        mean = obs + self.obs_std * (after[:, :o] - x)
        if self.learn_reward:
            mean = torch.cat([mean, after[:, o:] * self.reward_std + self.reward_mean], dim=1)
        return Answer(mean[None])

    def _held_out(self, rows: int, count: int, rng: torch.Generator) -> Tensor:
        """Return the last rows where windows need the others to stay together."""
        if self.window == 1:
            return super()._held_out(rows, count, rng)
        return torch.arange(rows - count, rows, device=rng.device)

    def _learn(
        self, data: Transitions, rows: Bool[Tensor, " n"], rng: torch.Generator, progress: bool
    ) -> list[dict[str, float]]:
        data = data[rows]
        for name, column in (("obs", data.obs), ("action", data.action), ("reward", data.reward[:, None])):
            getattr(self, f"{name}_mean").copy_(column.mean(dim=0))
            getattr(self, f"{name}_std").copy_(spread(column))
        self.change.fill_(1.0)
        x, _, after = self._sequences(data)
        self._initialise(after - self.embed(x), rng)
        parts = self._sequences(data)
        window = longest_window(data, self.window)
        starts = window_starts(data, window)
        optimizer = torch.optim.Adam(self.network.parameters(), self.learning_rate)
        schedule = torch.optim.lr_scheduler.ExponentialLR(
            optimizer, (self.final_learning_rate / self.learning_rate) ** (1 / self.updates)
        )
        weigh = CausalWeights(self.causal) if self.causal else None
        every, history, recent = max(1, self.updates // 50), [], []
        for update in tqdm(range(self.updates), desc="NeuralODE", disable=not progress):
            chosen = torch.randint(len(starts), (self.batch_size,), generator=rng, device=starts.device)
            x, u, target = (windows(part, starts[chosen], window) for part in parts)
            figures = {"sharpness": weigh.sharpness} if weigh else {}
            if self.solver == "rk4":
                loss = forced_loss(self, x, u, target, 0.0, weigh=weigh)
            else:
                said, local, calls = self._solved(x[:, 0], u, rng)
                loss = stepwise_loss(said / self.change, target, weigh)
                figures |= {"evaluations": float(calls)}
                if self.regularisation != "none":
                    fall = (self.final_strength / self.strength) ** (update / self.updates)
                    figures |= {"regularised": float(local.detach())}
                    loss = loss + self.strength * fall * local
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if window > 1:
                nn.utils.clip_grad_norm_(self.network.parameters(), self.clip)
            optimizer.step()
            schedule.step()
            recent.append({"loss": float(loss.detach())} | figures)
            if (update + 1) % every == 0 or update + 1 == self.updates:
                means = {name: sum(entry[name] for entry in recent) / len(recent) for name in recent[0]}
                history.append({"epoch": float(update + 1)} | means)
                recent = []
        return history

    def _initialise(self, increments: Float[Tensor, "n m"], rng: torch.Generator) -> None:
        """Draw the weights; outputs are in standard deviations of the increments per step."""
        self.change.copy_(spread(increments))
        layers = [layer for layer in self.network if isinstance(layer, nn.Linear)]
        for layer in layers:
            bound = layer.in_features**-0.5
            nn.init.uniform_(layer.weight, -bound, bound, generator=rng)
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(layers[-1].weight)

    def _sequences(self, data: Transitions) -> tuple[Tensor, Tensor, Tensor]:
        """Return standardised observations, inputs, and what `observe` should say after each step."""
        x, after = ((part - self.obs_mean) / self.obs_std for part in (data.obs, data.next_obs))
        if self.learn_reward:
            after = torch.cat([after, (data.reward[:, None] - self.reward_mean) / self.reward_std], dim=1)
        return x, (data.action - self.action_mean) / self.action_std, after / self.change

    def _solved(
        self, x: Float[Tensor, "b d"], u: Float[Tensor, "b t a"], rng: torch.Generator
    ) -> tuple[Float[Tensor, "b t m"], Float[Tensor, ""], int]:
        """Follow a window with the adaptive solver; return its states, the regularisation, and the evaluations."""
        steps = u.shape[1]
        together = steps if u.shape[2] == 0 else 1
        place = torch.rand(2, generator=rng, device=x.device).tolist()
        drawn = min(int(place[0] * (steps // together)), steps // together - 1)
        said, calls, local, z = [], 0, x.new_zeros(()), self.embed(x)
        for number in range(steps // together):
            watched = _Watched(self._under(u[:, number]))
            times = self.dt * torch.arange(1, together + 1, dtype=torch.float64, device=x.device)
            probed = number == drawn and self.regularisation != "none"
            uniform = probed and self.draw == "uniform"
            if uniform:
                at = (place[1] + 2**-26) * self.dt * together  # a draw is a multiple of 2^-24: none meets a saved time
                times, order = torch.cat([times, times.new_tensor([at])]).sort()
            states = self._adaptive(watched, z, times)
            if uniform:
                states = states[order.argsort()]
                where, states = states[-1], states[:-1]
                h = next(h for begin, _, h in watched.accepted if begin <= at <= begin + h)
            elif probed:
                _, where, h = watched.accepted[int(place[1] * len(watched.accepted))]
            calls += watched.calls
            if probed:
                local = self._local(watched.slope, where, h)
            z = self.embed(states[-1][:, : x.shape[1]])
            if self.learn_reward:
                earned = states[:, :, -1:].diff(dim=0, prepend=torch.zeros_like(states[:1, :, -1:]))
                states = torch.cat([states[:, :, :-1], earned], dim=2)
            said.append(states)
        return torch.cat(said).transpose(0, 1), local, calls

    def _local(self, slope: Callable[[Tensor], Tensor], state: Tensor, h: float) -> Float[Tensor, ""]:
        """Return the chosen estimate of one embedded step of the solver's length."""
        step = embedded_step(slope, state, h)
        if self.regularisation == "stiffness":
            return step.stiffness.mean() / STABILITY
        allowed = self.tolerance * (1 + torch.maximum(state.detach().abs(), step.after.detach().abs()))
        return h * ((step.error / allowed).square().mean() + 1e-20).sqrt()

    # Declared for type checkers; `_build_members` registers them.
    places: Tensor
    obs_mean: Tensor
    obs_std: Tensor
    action_mean: Tensor
    action_std: Tensor
    reward_mean: Tensor
    reward_std: Tensor
    free: Tensor
    change: Tensor


class _Watched:
    """A slope as torchdiffeq calls it, which counts the calls and keeps every accepted step (begin, state, length)."""

    def __init__(self, slope: Callable[[Tensor], Tensor]) -> None:
        self.slope, self.calls = slope, 0
        self.accepted: list[tuple[float, Tensor, float]] = []

    def __call__(self, time: Tensor, state: Tensor) -> Tensor:
        self.calls += 1
        return self.slope(state)

    def callback_accept_step(self, begin: Tensor, state: Tensor, length: Tensor) -> None:
        self.accepted.append((float(begin.detach()), state, float(length.detach())))


def _odeint() -> Any:
    """Return torchdiffeq's solver.

    Raises:
        ImportError: torchdiffeq is not installed (names the extra).
    """
    try:
        from torchdiffeq import odeint
    except ImportError as error:
        raise ImportError("an adaptive NeuralODE needs torchdiffeq: pip install 'learneddyn[models]'") from error
    return odeint
