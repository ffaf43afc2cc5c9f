"""How far imagination follows the truth: k-step open-loop error, reward error and termination accuracy of a world.

A model is fed the logged (or planned) actions from a true start and never sees the truth again. Its error is set
against the spread of the data (normalised by the standard deviation per column) and against *persistence*, the
prediction that nothing changes: where a model is no better than that, its imagination is worth nothing. Errors and
spread of angles (`Task.angles` of the world judged) are taken the short way round.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from learneddyn.core import Dynamics, Json, Transitions
from learneddyn.evaluation.returns import unpenalised
from learneddyn.evaluation.stats import plain
from learneddyn.models.angles import apart, gathered
from learneddyn.models.base import memory_of
from learneddyn.models.windows import remaining
from learneddyn.world import World


class Windows(NamedTuple):
    """Stretches of logged episodes: row w begins at ``start[w]``; entries where ``alive`` is False are padding."""

    start: Float[Tensor, "w o"]
    memory: Float[Tensor, "w m"] | None
    """What the model to be judged remembers at the start."""
    action: Float[Tensor, "w h a"]
    next_obs: Float[Tensor, "w h o"]
    reward: Float[Tensor, "w h"]
    terminated: Bool[Tensor, "w h"]
    alive: Bool[Tensor, "w h"]


class Rollout(NamedTuple):
    """An open-loop rollout. From the first non-finite step on, observations and rewards are infinite."""

    obs: Float[Tensor, "b h o"]
    reward: Float[Tensor, "b h"]
    terminated: Bool[Tensor, "b h"]


@dataclass(frozen=True)
class Confusion:
    """Counts of predicted against true terminations; a share with nothing to count is NaN."""

    true_positive: Int[np.ndarray, "*k"]
    false_positive: Int[np.ndarray, "*k"]
    false_negative: Int[np.ndarray, "*k"]
    true_negative: Int[np.ndarray, "*k"]

    @property
    def precision(self) -> Float[np.ndarray, "*k"]:
        """Share of predicted terminations that are true."""
        return _share(self.true_positive, self.true_positive + self.false_positive)

    @property
    def recall(self) -> Float[np.ndarray, "*k"]:
        """Share of true terminations that are predicted."""
        return _share(self.true_positive, self.true_positive + self.false_negative)

    @property
    def balanced_accuracy(self) -> Float[np.ndarray, "*k"]:
        """Mean of the recall of terminations and of survivals."""
        survived = _share(self.true_negative, self.true_negative + self.false_positive)
        return np.asarray((self.recall + survived) / 2)

    def to_json(self) -> Json:
        """Return a plain dictionary of counts and shares."""
        counts = {name: value.tolist() for name, value in vars(self).items()}
        return counts | {name: _plain(getattr(self, name)) for name in ("precision", "recall", "balanced_accuracy")}


@dataclass(frozen=True)
class StepAccuracy:
    """Reward and termination of a world after one step from logged states.

    ``reward_rmse`` and ``reward_bias`` (imagined minus true) are in reward units, ``reward_scale`` is the standard
    deviation of the logged reward.
    """

    rows: int
    reward_rmse: float
    reward_bias: float
    reward_scale: float
    termination: Confusion

    def to_json(self) -> Json:
        """Return a plain dictionary."""
        figures = {name: plain(getattr(self, name)) for name in ("reward_rmse", "reward_bias", "reward_scale")}
        return {"rows": self.rows} | figures | {"termination": self.termination.to_json()}


@dataclass(frozen=True)
class Fidelity:
    """Open-loop error against horizon; index ``[k - 1]`` stands for k steps.

    ``rmse`` and ``persistence`` are root mean squares over windows, in the column's units; infinite where a rollout
    diverged. ``scale`` is the data's standard deviation per column, zero for a constant one: constant columns have
    no normalised error (NaN) and do not enter the overall figures. ``windows`` counts the windows behind each horizon.
    """

    names: tuple[str, ...]
    scale: Float[np.ndarray, " o"]
    rmse: Float[np.ndarray, "h o"]
    persistence: Float[np.ndarray, "h o"]
    windows: Int[np.ndarray, " h"]
    reward_rmse: Float[np.ndarray, " h"]
    reward_scale: float
    termination: Confusion

    @property
    def horizon(self) -> int:
        """Largest number of steps measured."""
        return len(self.rmse)

    @property
    def error(self) -> Float[np.ndarray, "h o"]:
        """Error per column in standard deviations of the data."""
        return _normalise(self.rmse, self.scale)

    @property
    def persistence_error(self) -> Float[np.ndarray, "h o"]:
        """Error of predicting no change, in standard deviations of the data."""
        return _normalise(self.persistence, self.scale)

    @property
    def overall(self) -> Float[np.ndarray, " h"]:
        """Root mean square of `error` over the columns that vary."""
        return _root_mean(self.error)

    @property
    def persistence_overall(self) -> Float[np.ndarray, " h"]:
        """Root mean square of `persistence_error` over the columns that vary."""
        return _root_mean(self.persistence_error)

    @property
    def break_even(self) -> tuple[int | None, ...]:
        """`break_even_horizon` of every column."""
        return tuple(_first(e >= p) for e, p in zip(self.error.T, self.persistence_error.T, strict=True))

    @property
    def break_even_horizon(self) -> int | None:
        """Smallest k whose overall error is at least that of persistence; None if there is none up to `horizon`."""
        return _first(self.overall >= self.persistence_overall)

    def to_json(self) -> Json:
        """Return a plain dictionary; undefined and infinite figures become None."""
        return {
            "horizon": self.horizon,
            "names": list(self.names),
            "scale": self.scale.tolist(),
            "windows": self.windows.tolist(),
            "error": _plain(self.error),
            "persistence_error": _plain(self.persistence_error),
            "overall": _plain(self.overall),
            "persistence_overall": _plain(self.persistence_overall),
            "break_even": list(self.break_even),
            "break_even_horizon": self.break_even_horizon,
            "reward_rmse": _plain(self.reward_rmse),
            "reward_scale": self.reward_scale,
            "termination": self.termination.to_json(),
        }


def longest_window(data: Transitions, *, windows: int = 1) -> int:
    """Return the largest horizon that at least ``windows`` rows can begin an unbroken stretch of; 0 if there is none.

    Ask for a hundred or more where the error at the last horizon should not hang on a few lucky episodes.
    """
    if windows < 1:
        raise ValueError(f"windows must be at least 1, got {windows}")
    return int(remaining(data).sort(descending=True).values[windows - 1]) if len(data) >= windows else 0


def windows_of(
    data: Transitions,
    horizon: int,
    *,
    rng: torch.Generator,
    windows: int = 1000,
    full: bool = True,
    dynamics: Dynamics | None = None,
) -> Windows:
    """Draw stretches of logged episodes, without replacement.

    See `learneddyn.models.windows` for what a stretch is; rows dropped from a log are never bridged.

    Args:
        data: logged experience.
        horizon: rows of a window.
        rng: of the draw.
        windows: at most so many.
        full: only windows of the whole length. Otherwise every row may begin one, and windows reach to the end of
            their episode: that keeps the rows before terminations, and the windows behind large horizons become fewer.
        dynamics: the model to be judged, for what it remembers where a window begins.

    Raises:
        ValueError: horizon or windows below 1, or no stretch as long as the horizon.
        DataError: no rows, or NaN or infinite entries.
    """
    if horizon < 1 or windows < 1:
        raise ValueError(f"horizon and windows must be at least 1, got horizon={horizon}, windows={windows}")
    left = remaining(data.check())
    if horizon > int(left.max()):
        raise ValueError(
            f"no window of {horizon} consecutive steps: the longest unbroken stretch of one episode has "
            f"{int(left.max())}; use horizon <= {int(left.max())} or longer held-out episodes"
        )
    rows = (left >= (horizon if full else 1)).nonzero().flatten()
    shuffled = torch.randperm(len(rows), generator=rng, device=rng.device).to(rows.device)
    rows = rows[shuffled[:windows]].sort().values
    steps = torch.arange(horizon, device=rows.device)
    alive = steps < left[rows, None]
    index = torch.where(alive, rows[:, None] + steps, rows[:, None])
    memory = None if dynamics is None else memory_of(dynamics, data)
    return Windows(
        data.obs[rows],
        None if memory is None else memory[rows],
        data.action[index],
        data.next_obs[index],
        data.reward[index],
        data.terminated[index],
        alive,
    )


@torch.no_grad()
def open_loop(
    world: World,
    start: Float[Tensor, "b o"],
    action: Float[Tensor, "b h a"],
    rng: torch.Generator,
    memory: Float[Tensor, "b m"] | None = None,
) -> Rollout:
    """Roll a world through given actions; the penalty is left out, and a rollout goes on after terminations.

    ``memory`` is what the model remembers at the start, by default nothing.

    Raises:
        ValueError: horizon below 1, or start observations with the wrong number of columns.
    """
    if action.shape[1] < 1:
        raise ValueError("open_loop needs at least one action per row, got a horizon of 0")
    bare = unpenalised(world, trust_all=True)
    state, obs, reward, terminated = bare.start(start, rng)._replace(memory=memory), [], [], []
    sound = torch.ones(len(start), dtype=torch.bool, device=start.device)
    for t in range(action.shape[1]):
        state, step = bare.step(state, action[:, t], rng)
        sound = sound & step.trusted
        obs.append(state.obs.masked_fill(~sound[:, None], torch.inf))
        reward.append(step.reward.masked_fill(~sound, torch.inf))
        terminated.append(step.terminated & sound)
    return Rollout(torch.stack(obs, dim=1), torch.stack(reward, dim=1), torch.stack(terminated, dim=1))


def fidelity_of_log(
    world: World,
    data: Transitions,
    *,
    horizon: int,
    rng: torch.Generator,
    windows: int = 1000,
    samples: int = 1,
    full: bool = True,
    reference: Transitions | None = None,
    names: Sequence[str] | None = None,
) -> Fidelity:
    """Measure k-step open-loop error on held-out logged episodes, for k = 1 ... horizon.

    For the error where the agent goes, pass the agent's own real episodes (``evaluate(..., record=True)``).

    Args:
        world: the world; its sampler decides how it is rolled, its task which columns are angles.
        data: held-out experience.
        horizon: steps.
        rng: of windows and world, on the world's device.
        windows: number of starts.
        samples: rollouts per window; the prediction is their mean, so one is a sampled trajectory, noise included.
        full: see `windows_of`.
        reference: experience whose standard deviations normalise the errors, by default ``data``; give the training
            data when ``data`` hardly moves, as a balancing agent's does.
        names: of the observation columns.

    Raises:
        ValueError: see `windows_of`; or samples below 1.
        DataError: no rows, or NaN or infinite entries.
    """
    data = data.to(rng.device)
    log = windows_of(data, horizon, rng=rng, windows=windows, full=full, dynamics=world.dynamics)
    return _compare(world, log, data if reference is None else reference, samples, names, rng)


def fidelity_of_plans(
    world: World,
    truth: World,
    start: Float[Tensor, "w o"],
    plans: Float[Tensor, "w h a"],
    *,
    reference: Transitions,
    rng: torch.Generator,
    samples: int = 1,
    names: Sequence[str] | None = None,
) -> Fidelity:
    """Measure k-step open-loop error on any action plans, against a true world rolled through the same plans.

    Args:
        world: the world to judge.
        truth: the true world, such as ``World(TruthDynamics(task), task)``; steps after its terminations do not count.
        start: start observations.
        plans: actions, for example an agent's own.
        reference: experience whose standard deviations normalise the errors.
        rng: of both worlds, on their device.
        samples: see `fidelity_of_log`.
        names: of the observation columns.

    Raises:
        ValueError: the truth diverged, samples below 1, or a horizon of 0.
    """
    true = open_loop(truth, start, plans, rng)
    if not bool(true.obs.isfinite().all()):
        raise ValueError("the true world left the finite numbers on these plans: check start and plans")
    ended = true.terminated.cumsum(dim=1) - true.terminated.long()
    log = Windows(start, None, plans, true.obs, true.reward, true.terminated, ended == 0)
    return _compare(world, log, reference, samples, names, rng)


@torch.no_grad()
def step_accuracy(world: World, data: Transitions, *, rng: torch.Generator, batch: int = 16_384) -> StepAccuracy:
    """Measure reward and termination of a world after one step from every logged state.

    Raises:
        DataError: no rows, or NaN or infinite entries.
    """
    data = data.check().to(rng.device)
    memory = memory_of(world.dynamics, data)
    parts = [
        open_loop(
            world,
            data.obs[i : i + batch],
            data.action[i : i + batch, None],
            rng,
            None if memory is None else memory[i : i + batch],
        )
        for i in range(0, len(data), batch)
    ]
    error = torch.cat([part.reward[:, 0] for part in parts]).double() - data.reward
    predicted = torch.cat([part.terminated for part in parts])
    everyone = torch.ones_like(predicted)
    by_depth = _confusion(predicted, data.terminated[:, None], everyone)
    return StepAccuracy(
        rows=len(data),
        reward_rmse=float(error.square().mean().sqrt()),
        reward_bias=float(error.mean()),
        reward_scale=float(data.reward.double().std(correction=0)),
        termination=Confusion(*(count[0, ...] for count in vars(by_depth).values())),
    )


def rolled(world: World, log: Windows, samples: int, rng: torch.Generator) -> Rollout:
    """Roll a world through all windows, so many times over; the samples of one window stand a log's length apart."""
    memory = None if log.memory is None else log.memory.repeat(samples, 1)
    return open_loop(world, log.start.repeat(samples, 1), log.action.repeat(samples, 1, 1), rng, memory)


def varying_scale(data: Transitions, angles: Sequence[int] = ()) -> Float[Tensor, " o"]:
    """Return the standard deviation per observation column, exactly zero where one is constant up to float32 rounding.

    That of a column in ``angles`` (radians) is about its mean direction: the seam of a wrapped angle is no spread.
    """
    seen = torch.cat([data.obs, data.next_obs]).double()
    seen = gathered(seen, angles, seen[0])
    spread = seen.std(dim=0, correction=0)
    rounding = 1e-6 * seen.abs().amax(dim=0)
    return torch.where(spread > rounding, spread, torch.zeros_like(spread))


def _compare(
    world: World,
    log: Windows,
    reference: Transitions,
    samples: int,
    names: Sequence[str] | None,
    rng: torch.Generator,
) -> Fidelity:
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    imagined = rolled(world, log, samples, rng)
    shape = (samples, *log.reward.shape)
    angles, truth = world.task.angles, log.next_obs.double()
    predicted = gathered(imagined.obs.reshape(*shape, -1).double(), angles, truth).mean(dim=0)
    unmoved = log.start[:, None].double().expand_as(truth)
    promised = imagined.reward.reshape(shape).double().mean(dim=0)
    # With several samples the majority decides.
    ended = imagined.terminated.reshape(shape).double().mean(dim=0) > 0.5
    width = log.start.shape[1]
    labels = tuple(names) if names is not None else tuple(f"obs[{i}]" for i in range(width))
    if len(labels) != width:
        raise ValueError(f"names must hold {width} entries, one per observation column, got {len(labels)}")
    alive = log.alive[..., None]
    return Fidelity(
        names=labels,
        scale=varying_scale(reference, angles).cpu().numpy(),
        rmse=_rmse(apart(predicted, truth, angles), alive),
        persistence=_rmse(apart(unmoved, truth, angles), alive),
        windows=log.alive.sum(dim=0).cpu().numpy(),
        reward_rmse=_rmse((promised - log.reward)[..., None], alive)[:, 0],
        reward_scale=float(reference.reward.double().std(correction=0)),
        termination=_confusion(ended, log.terminated, log.alive),
    )


def _rmse(error: Float[Tensor, "w h o"], alive: Bool[Tensor, "w h 1"]) -> Float[np.ndarray, "h o"]:
    squares = torch.where(alive, error, torch.zeros_like(error)).square().sum(dim=0)
    return (squares / alive.sum(dim=0)).sqrt().cpu().numpy()


def _confusion(predicted: Bool[Tensor, "w h"], true: Bool[Tensor, "w h"], alive: Bool[Tensor, "w h"]) -> Confusion:
    cells = (predicted & true, predicted & ~true, ~predicted & true, ~predicted & ~true)
    return Confusion(*((cell & alive).sum(dim=0).cpu().numpy() for cell in cells))


def _share(part: np.ndarray, whole: np.ndarray | np.integer[Any]) -> np.ndarray:
    result = np.full(np.shape(whole), np.nan)
    return np.divide(part, whole, out=result, where=np.asarray(whole) > 0)


def _normalise(rmse: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return np.divide(rmse, scale, out=np.full(rmse.shape, np.nan), where=scale > 0)


def _root_mean(error: np.ndarray) -> np.ndarray:
    varying = error[:, ~np.isnan(error).all(axis=0)]
    if varying.shape[1] == 0:
        return np.full(len(error), np.nan)
    return np.sqrt(np.square(varying).mean(axis=1))


def _first(crossed: np.ndarray) -> int | None:
    return int(np.argmax(crossed)) + 1 if crossed.any() else None


def _plain(numbers: np.ndarray) -> Any:
    """Nested lists that JSON can hold: None for NaN and infinities."""
    return np.where(np.isfinite(numbers), numbers.astype(object), np.array(None)).tolist()
