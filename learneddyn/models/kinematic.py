"""A kinematic bicycle whose low-level inputs are learned; uncertainty is carried through its equations in closed form.

Source: Zheng, Son, Liang, Wang, Clipp, Lin, "Deep Stochastic Kinematic Models for Probabilistic Motion Forecasting in
Traffic" (2024), the formulation with acceleration and steering.

    x' = x + v cos(h) dt,   y' = y + v sin(h) dt,   v' = v + a dt,   h' = h + v / L tan(d) dt

The source linearises cosine and sine and adds variances as if position, speed and heading were independent
(`propagate` with ``cov="independent"``, here with the exact moments of cosine and sine, which cost the same). They are
not: what turns the heading also moves the position, step after step. ``cov="full"`` carries the whole covariance,
``P' = F P F^T + G Q G^T`` with the Jacobians F by the state and G by the inputs.
"""

import math
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm import tqdm

from learneddyn.core import Outcome, Prediction, Transitions
from learneddyn.models.angles import apart
from learneddyn.models.attempt import attempt, require_pair
from learneddyn.models.base import AbstractDynamics, FitReport
from learneddyn.models.scale import spread
from learneddyn.models.windows import longest_window, window_starts, windows
from learneddyn.spaces import Spaces

COVARIANCES = ("full", "independent")
X, Y, SPEED, HEADING = range(4)
_STD = (1e-4, 10.0)
"""Bounds of the low-level standard deviations and of the pose noise, m/s^2, rad, or units of the pose."""


class Belief(NamedTuple):
    """A Gaussian over (x, y, speed, heading)."""

    mean: Float[Tensor, "b 4"]
    covariance: Float[Tensor, "b 4 4"]

    @property
    def std(self) -> Float[Tensor, "b 4"]:
        """Standard deviations."""
        return self.covariance.diagonal(dim1=1, dim2=2).clamp_min(0).sqrt()


class LowLevel(NamedTuple):
    """Independent Gaussians over (acceleration in m/s^2, steering angle in rad)."""

    mean: Float[Tensor, "b 2"]
    std: Float[Tensor, "b 2"]


class Displacement(NamedTuple):
    """Moments of (v cos h, v sin h), for independent Gaussian v and h."""

    mean: Float[Tensor, "b 2"]
    variance: Float[Tensor, "b 2"]


def certain(obs: Float[Tensor, "b 4"]) -> Belief:
    """Return the belief that knows where the vehicle is."""
    return Belief(obs, obs.new_zeros(len(obs), 4, 4))


def displacement(
    speed: Float[Tensor, " b"], speed_var: Float[Tensor, " b"], heading: Float[Tensor, " b"], heading_var: Tensor
) -> Displacement:
    """Return exact means and variances of v cos h and v sin h."""
    shrunk = (-0.5 * heading_var).exp()
    mean = torch.stack([heading.cos(), heading.sin()], dim=1) * shrunk[:, None]
    double = (2 * heading).cos() * (-heading_var).exp()
    # Var(cos h), and of sin h, as a product: the difference of squares would lose a small variance to rounding.
    var = -0.5 * (-heading_var).expm1()[:, None] * torch.stack([1 - double, 1 + double], dim=1)
    v = speed[:, None]
    return Displacement(v * mean, v.square() * var + speed_var[:, None] * (mean.square() + var))


def propagate(belief: Belief, inputs: LowLevel, *, dt: float, wheelbase: float, cov: str = "full") -> Belief:
    """Return the belief one step later.

    Args:
        belief: where the vehicle may be.
        inputs: what it may do.
        dt: length of the step, seconds.
        wheelbase: L, metres.
        cov: "full" or "independent", see the module.

    Raises:
        ValueError: another ``cov``.
    """
    if cov not in COVARIANCES:
        raise ValueError(f"cov must be one of {COVARIANCES}, got {cov!r}")
    _, _, v, h = belief.mean.unbind(dim=1)
    (a, d), (a_var, d_var) = inputs.mean.unbind(dim=1), inputs.std.square().unbind(dim=1)
    tangent = d.tan()
    slope = 1 + tangent.square()  # of the tangent
    turn = dt / wheelbase
    p = belief.covariance
    if cov == "full":
        # Exact for jointly Gaussian v and h; the covariance below is of first order.
        shrunk, joint = (-0.5 * p[:, HEADING, HEADING]).exp(), p[:, SPEED, HEADING]
        moved = torch.stack([v * h.cos() - joint * h.sin(), v * h.sin() + joint * h.cos()], dim=1) * shrunk[:, None]
        turned = v * tangent
        one, zero = torch.ones_like(v), torch.zeros_like(v)
        f = _matrix(
            [one, zero, dt * h.cos(), -dt * v * h.sin()],
            [zero, one, dt * h.sin(), dt * v * h.cos()],
            [zero, zero, one, zero],
            [zero, zero, turn * tangent, one],
        )
        g = _matrix([zero, zero], [zero, zero], [dt * one, zero], [zero, turn * v * slope])
        q = torch.diag_embed(inputs.std.square())
        covariance = f @ p @ f.mT + g @ q @ g.mT
    else:
        var = p.diagonal(dim1=1, dim2=2)
        moved, spread = displacement(v, var[:, SPEED], h, var[:, HEADING])
        turned = v * tangent
        bent = d_var * slope.square()
        turned_var = v.square() * bent + var[:, SPEED] * (tangent.square() + bent)
        added = torch.cat([dt**2 * spread, (dt**2 * a_var)[:, None], (turn**2 * turned_var)[:, None]], dim=1)
        covariance = torch.diag_embed(var + added)
    change = torch.cat([dt * moved, (dt * a)[:, None], (turn * turned)[:, None]], dim=1)
    return Belief(belief.mean + change, covariance)


def drive(
    obs: Float[Tensor, "b 4"], low_level: Float[Tensor, "b 2"], *, dt: float, wheelbase: float
) -> Float[Tensor, "b 4"]:
    """Return the pose after one step under known acceleration and steering."""
    x, y, v, h = obs.unbind(dim=1)
    a, d = low_level.unbind(dim=1)
    return torch.stack(
        [x + dt * v * h.cos(), y + dt * v * h.sin(), v + dt * a, h + dt / wheelbase * v * d.tan()], dim=1
    )


class KinematicBicycle(AbstractDynamics):
    """A vehicle observed as (x, y, speed, heading); a network turns its action into acceleration and steering.

    Headings are compared the short way round, so a log may wrap them or not. Answers go on from the heading asked
    about, across any seam; where the environment wraps, `learneddyn.world.bounds.Bounded` brings them back.

    The network sees speed and action only, so that what is learned at one place and heading holds at every other. It
    answers means and standard deviations of the low-level inputs; a constant noise on the pose takes up what they
    cannot explain. Training maximises the likelihood of ``horizon`` steps, unrolled by `propagate`, so that gradients
    flow through the recursion. The model has no reward head: rewards come from the task.

    Args:
        dt: seconds a step lasts.
        wheelbase: L, metres.
        cov: how beliefs are carried on, see `propagate`.
        horizon: steps of a training window, or the longest episode's where that is shorter.
        steering: largest steering angle, radians.
        hidden: widths of the network.
        updates: of training.
        batch_size: windows per update.
        learning_rate: of Adam; falls to zero by a cosine.
        holdout_ratio: share of the rows, the last ones, that measure the likelihood.

    Raises:
        ValueError: an argument outside its range (names it, the value, what is allowed).
    """

    num_members = 1

    def __init__(
        self,
        dt: float = 0.1,
        wheelbase: float = 2.8,
        cov: str = "full",
        horizon: int = 1,
        steering: float = 0.6,
        hidden: Sequence[int] = (32, 32),
        updates: int = 1500,
        batch_size: int = 256,
        learning_rate: float = 3e-3,
        holdout_ratio: float = 0.2,
    ) -> None:
        super().__init__()
        for name, ok, value, allowed in (
            ("dt", dt > 0, dt, "above 0"),
            ("wheelbase", wheelbase > 0, wheelbase, "above 0"),
            ("cov", cov in COVARIANCES, cov, f"one of {COVARIANCES}"),
            ("horizon", horizon >= 1, horizon, "at least 1"),
            ("steering", 0 < steering < math.pi / 2, steering, "between 0 and pi / 2"),
            ("updates", updates >= 1, updates, "at least 1"),
            ("batch_size", batch_size >= 1, batch_size, "at least 1"),
            ("holdout_ratio", 0 < holdout_ratio < 1, holdout_ratio, "between 0 and 1"),
        ):
            if not ok:
                raise ValueError(f"{name} must be {allowed}, got {value!r}")
        self.dt, self.wheelbase, self.cov, self.horizon, self.steering = dt, wheelbase, cov, horizon, steering
        self.hidden, self.updates, self.batch_size = list(hidden), updates, batch_size
        self.learning_rate, self.holdout_ratio = learning_rate, holdout_ratio

    def _build(self, spaces: Spaces) -> None:
        if spaces.obs_dim != 4:
            raise ValueError(
                f"KinematicBicycle needs 4 observation columns (x, y, speed, heading), got {spaces.obs_dim}"
            )
        widths = [1 + spaces.action_dim, *self.hidden, 4]
        self.weights = nn.ParameterList(torch.zeros(i, j) for i, j in pairwise(widths))
        self.biases = nn.ParameterList(torch.zeros(j) for j in widths[1:])
        self.log_noise = nn.Parameter(torch.zeros(4))
        self.register_buffer("shift", torch.zeros(widths[0]))
        self.register_buffer("scale", torch.ones(widths[0]))
        self.register_buffer("acceleration", torch.ones(()))
        self.register_buffer("_elites", torch.zeros(1, dtype=torch.long))

    @property
    def elites(self) -> Int[Tensor, " k"]:
        """The one member."""
        return self._elites

    @property
    def noise(self) -> Float[Tensor, " 4"]:
        """Standard deviation per step of what the low-level inputs do not explain, in units of the pose."""
        return self.log_noise.exp()

    def low_level(self, obs: Float[Tensor, "b 4"], action: Float[Tensor, "b a"]) -> LowLevel:
        """Return what the vehicle may do with an action."""
        x = (torch.cat([obs[:, SPEED, None], action], dim=1) - self.shift) / self.scale
        for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
            x = torch.addmm(bias, x, weight).tanh()
        said = torch.addmm(self.biases[-1], x, self.weights[-1])
        mean = torch.stack([self.acceleration * said[:, 0], self.steering * said[:, 1].tanh()], dim=1)
        std = (said[:, 2:] - 2.0).exp() * torch.stack([self.acceleration, torch.full_like(self.acceleration, 0.5)])
        return LowLevel(mean, std.clamp(*_STD))

    def forecast(self, obs: Float[Tensor, "b 4"], actions: Float[Tensor, "b h a"]) -> list[Belief]:
        """Return the belief after every action of a plan, from a known pose.

        Raises:
            ValueError: the model has not been fitted.
        """
        self._require_fitted()
        belief, beliefs = certain(obs), []
        for action in actions.unbind(dim=1):
            belief = self._advanced(belief, action)
            beliefs.append(belief)
        return beliefs

    def _advanced(self, belief: Belief, action: Float[Tensor, "b a"]) -> Belief:
        inputs = self.low_level(belief.mean, action)
        after = propagate(belief, inputs, dt=self.dt, wheelbase=self.wheelbase, cov=self.cov)
        return after._replace(covariance=after.covariance + torch.diag(self.noise.square()))

    def predict(
        self, obs: Float[Tensor, "b o"], action: Float[Tensor, "b a"], memory: Float[Tensor, "b m"] | None = None
    ) -> Prediction:
        """Return the belief one step after a known pose.

        Raises:
            ValueError: the model has not been fitted.
        """
        self._require_fitted()
        belief = self._advanced(certain(obs), action)
        return Prediction(belief.mean[None], belief.std[None], self.elites)

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
        """Draw low-level inputs and drive; the noise on the pose comes on top.

        Raises:
            ValueError: the model has not been fitted.
        """
        self._require_fitted()
        inputs = self.low_level(obs, action)
        chosen = inputs.mean
        if noise:
            chosen = chosen + inputs.std * torch.randn(chosen.shape, generator=rng, device=chosen.device)
        after = drive(obs, chosen, dt=self.dt, wheelbase=self.wheelbase)
        if noise:
            after = after + self.noise * torch.randn(after.shape, generator=rng, device=after.device)
        return Outcome(after)

    def fit(self, data: Transitions, *, rng: torch.Generator, progress: bool = False) -> FitReport:
        """Learn from the data; every call learns anew.

        Returns:
            ``holdout_nll`` (nats per column, one step), ``holdout_mse`` (squared units of the pose, mean over columns),
            ``train_rows``, ``holdout_rows``.

        Raises:
            DataError: fewer than two rows, or NaN or infinite rows.
            ValueError: the data has other spaces than the model, or not four observation columns.
            FloatingPointError: the likelihood is not finite; the model is left as it was.
        """
        started = time.perf_counter()
        require_pair(data)
        try:
            with attempt(self, data):
                data = data.to(self._elites.device)
                held = max(1, int(self.holdout_ratio * len(data)))
                train, test = data[: len(data) - held], data[len(data) - held :]
                self._initialise(train, rng)
                history = self._train(train, rng, progress)
                with torch.no_grad():
                    belief = self._advanced(certain(test.obs), test.action)
                    nll = _nll(belief, test.next_obs, self.cov).mean() / 4
                    mse = apart(test.next_obs, belief.mean, [HEADING]).square().mean()
                if not bool(nll.isfinite() & mse.isfinite()):
                    raise FloatingPointError("the likelihood is not finite")
        except (FloatingPointError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
            raise FloatingPointError(
                f"KinematicBicycle learned something that is not finite ({error}): check dt and the units"
            ) from error
        metrics = {"holdout_nll": float(nll), "holdout_mse": float(mse)}
        metrics |= {"train_rows": float(len(train)), "holdout_rows": float(held)}
        return FitReport(len(history), time.perf_counter() - started, metrics, history)

    @torch.no_grad()
    def _initialise(self, train: Transitions, rng: torch.Generator) -> None:
        inputs = torch.cat([train.obs[:, SPEED, None], train.action], dim=1)
        self.shift.copy_(inputs.mean(dim=0))
        self.scale.copy_(spread(inputs))
        change = (train.next_obs - train.obs)[:, SPEED] / self.dt
        self.acceleration.copy_(change.square().mean().sqrt().clamp_min(1e-3))
        for weight, bias in zip(self.weights, self.biases, strict=True):
            bound = weight.shape[0] ** -0.5
            nn.init.uniform_(weight, -bound, bound, generator=rng)
            bias.zero_()
        coasted = drive(train.obs, train.obs.new_zeros(len(train), 2), dt=self.dt, wheelbase=self.wheelbase)
        error = apart(train.next_obs, coasted, [HEADING])
        # Small where the inputs can explain the error: a constant noise would take it before they learn to.
        share = error.new_tensor([1.0, 1.0, 0.05, 0.05])
        self.log_noise.copy_((share * error.square().mean(dim=0).sqrt()).clamp(*_STD).log())

    def _train(self, train: Transitions, rng: torch.Generator, progress: bool) -> list[dict[str, float]]:
        window = longest_window(train, self.horizon)
        starts = window_starts(train, window)
        optimizer = torch.optim.Adam(self.parameters(), self.learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.updates)
        history = []
        bar = tqdm(range(self.updates), desc="KinematicBicycle", disable=not progress)
        for update in bar:
            chosen = starts[torch.randint(len(starts), (self.batch_size,), generator=rng, device=starts.device)]
            obs, action, after = (windows(part, chosen, window) for part in (train.obs, train.action, train.next_obs))
            belief, loss = certain(obs[:, 0]), torch.zeros((), device=obs.device)
            for step in range(window):
                belief = self._advanced(belief, action[:, step])
                loss = loss + _nll(belief, after[:, step], self.cov).mean() / (4 * window)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(self.parameters(), 10.0)
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                self.log_noise.clamp_(*(math.log(bound) for bound in _STD))
            if (update + 1) % max(1, self.updates // 20) == 0:
                history.append({"epoch": update + 1.0, "nll": loss.item()})
                bar.set_postfix(nll=loss.item())
        return history

    def _require_fitted(self) -> None:
        if self.spaces is None:
            raise ValueError("KinematicBicycle has not been fitted: call fit(data) or load a model first")

    # Declared for type checkers; `_build` registers them.
    shift: Tensor
    scale: Tensor
    acceleration: Tensor
    _elites: Tensor


def _nll(belief: Belief, seen: Float[Tensor, "b 4"], cov: str) -> Float[Tensor, " b"]:
    """Return the negative log-likelihood of a pose, nats."""
    error, constant = apart(seen, belief.mean, [HEADING]), 2 * math.log(2 * math.pi)
    if cov == "independent":
        return constant + (0.5 * (error / belief.std).square() + belief.std.log()).sum(dim=1)
    # In units of the standard deviations, so that the factor of a covariance in metres and radians exists in float32.
    std = belief.std
    correlation = belief.covariance / (std[:, :, None] * std[:, None, :])
    root = torch.linalg.cholesky(correlation + 1e-6 * torch.eye(4, device=seen.device))
    white = torch.linalg.solve_triangular(root, (error / std)[:, :, None], upper=False)[:, :, 0]
    logs = std.log() + root.diagonal(dim1=1, dim2=2).log()
    return constant + (0.5 * white.square() + logs).sum(dim=1)


def _matrix(*rows: list[Tensor]) -> Float[Tensor, "b r c"]:
    return torch.stack([torch.stack(row, dim=1) for row in rows], dim=1)
