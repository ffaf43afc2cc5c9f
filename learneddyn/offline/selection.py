"""Which policy to take to the real plant, judged without it: by the log, and by a model of the log.

    judge               asks                                            blind to
    `fqe`               the log: value of the policy's own actions      actions that the log hardly holds
    `return_in_model`   a world, one member at a time                   what all members get wrong together
    `model_error`       held-out rows, near the policy's actions        anything but one step

`rank` puts the three side by side. None is a bound on the truth: they are to be read together.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from learneddyn.agents.diagnostics import change_scale
from learneddyn.core import DataError, Dynamics, Json, Outcome, Policy, State, Transitions, generator
from learneddyn.evaluation.returns import imagined
from learneddyn.evaluation.stats import Estimate, crossed_interval
from learneddyn.models.base import memory_of
from learneddyn.offline.dataset import check, scaled
from learneddyn.offline.fqe import chosen, fqe
from learneddyn.world import World


def return_in_model(
    policy: Policy,
    world: World,
    start: Float[Tensor, "m o"],
    *,
    worst: float,
    horizon: int | None = None,
    level: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """Return the undiscounted return of a policy in a world, without penalties, and its interval.

    Every elite plays every start on its own to the end, so the interval shows what the members disagree on, besides
    the spread of the starts.

    A policy must not gain by breaking its judge: from the first step that the world does not trust (or that is not
    finite) to the horizon every step counts as the worst reward, or as 0 if that is less, which is what an episode that
    ends is paid.

    Args:
        policy: anything with SB3's ``predict``; its deterministic actions are played.
        world: around an ensemble; its sampler is set aside, its trust and terminations are kept.
        start: flat start observations, for example the first of every logged episode.
        worst: least reward of the log.
        horizon: steps, by default the task's time limit.
        level: nominal coverage.
        seed: of the noise, the same for all policies.

    Raises:
        ValueError: no horizon is known, or no start.
    """
    pinned, elites, rng = copy.copy(world), world.dynamics.elites, generator(seed, start.device)
    pinned.sampler = _Pinned(elites.repeat_interleave(len(start)))
    played = imagined(policy, pinned, rng=rng, episodes=len(elites) * len(start), horizon=horizon, start=start)
    limit = world.task.max_episode_steps if horizon is None else horizon
    assert limit is not None
    broken = np.where(played.untrusted, min(worst, 0.0) * (limit - played.lengths), 0.0)
    table = (played.returns + broken).reshape(len(elites), len(start))
    return crossed_interval(table, level=level, seed=seed)


@torch.no_grad()
def model_error(
    model: Dynamics, held_out: Transitions, policy: Policy | None = None, *, bandwidth: float = 0.25
) -> float:
    """Return the root mean squared one-step error of the elites' mean, in deviations of the columns' changes.

    1 is the error of always predicting the mean change. With a policy, rows count by how near their action is to the
    policy's, ``exp(-|a - π(s)|² / 2 h²)`` with actions in [-1, 1]: what the model knows of the steps this policy takes.

    Args:
        model: fitted on other rows.
        held_out: rows that it has not seen.
        policy: whose steps matter; None lets all rows count alike.
        bandwidth: h.

    Raises:
        DataError: no rows, NaN or infinite ones, or none near the policy's actions.
    """
    data = held_out.check()
    scale = change_scale(data)
    prediction = model.predict(data.obs, data.action, memory_of(model, data))
    error = (prediction.mean[prediction.elites].mean(0) - data.next_obs) / scale
    square = error[:, scale.isfinite()].square().mean(1)
    if policy is None:
        return float(square.mean().sqrt())
    assert data.spaces is not None
    distance = (scaled(data).action - chosen(policy, data.obs, data.spaces)).square().sum(1)
    weight = (-0.5 * distance / bandwidth**2).exp()
    if float(weight.sum()) < 1:
        raise DataError(
            f"no held-out action lies near those of {type(policy).__name__} (bandwidth {bandwidth}): what the model "
            "knows of its steps cannot be told from this log"
        )
    return float(((weight * square).sum() / weight.sum()).sqrt())


@dataclass(frozen=True)
class Candidate:
    """What is known of a policy without playing it. ``in_model`` and ``model_error`` are None where nothing was asked.

    ``model_error`` is weighted towards the policy's actions; it is infinite where the held-out log holds none.
    """

    name: str
    fqe: Estimate
    residual: float
    in_model: Estimate | None = None
    model_error: float | None = None


@dataclass(frozen=True)
class Ranking:
    """Candidates, the best by fitted Q evaluation first."""

    candidates: tuple[Candidate, ...]
    gamma: float

    @property
    def best(self) -> str:
        """Name of the first."""
        return self.candidates[0].name

    def __str__(self) -> str:
        """Return a table in Markdown."""
        lines = [
            f"| policy | discounted value, FQE (γ = {self.gamma:g}) | return in the model | one-step error |",
            "|---|---|---|---|",
        ]
        for row in self.candidates:
            inside = "" if row.in_model is None else _told(row.in_model)
            error = "" if row.model_error is None else f"{row.model_error:.3g}"
            lines.append(f"| {row.name} | {_told(row.fqe)} | {inside} | {error} |")
        return "\n".join(lines)

    def to_json(self) -> list[Json]:
        """Return a plain list."""
        rows = []
        for row in self.candidates:
            inside = None if row.in_model is None else row.in_model.to_json()
            error = row.model_error if row.model_error is None or np.isfinite(row.model_error) else None
            plain = {"name": row.name, "fqe": row.fqe.to_json(), "residual": row.residual}
            rows.append(plain | {"in_model": inside, "model_error": error})
        return rows


def rank(
    policies: Mapping[str, Policy],
    log: Transitions,
    *,
    worlds: World | Mapping[str, World] | None = None,
    held_out: Transitions | None = None,
    gamma: float = 0.99,
    horizon: int | None = None,
    starts: int = 100,
    level: float = 0.95,
    seed: int = 0,
    **fqe_options: Any,
) -> Ranking:
    """Judge policies without a simulator, all on the same log, bootstraps, starts and noise.

    Args:
        policies: by name.
        log: that all critics learn from; its episodes begin where the real ones do.
        worlds: to play them in: one for all, or one for each (a model-based agent's own). None leaves that out.
        held_out: rows that the worlds' models have not seen, for their error. None leaves that out.
        gamma: discount of the critics.
        horizon: steps in the worlds, by default the task's time limit.
        starts: first observations of the log that are played, drawn without replacement.
        level: nominal coverage of the intervals.
        seed: of everything.
        **fqe_options: other arguments of `fqe`.

    Raises:
        ValueError: no policy, held-out rows without a world, a policy without its world, or one that keeps a memory.
        DataError: see `fqe`.
    """
    if not policies:
        raise ValueError("rank needs at least one policy, got none")
    if worlds is None and held_out is not None:
        raise ValueError("held_out rows judge the model of a world: pass worlds, too")
    if isinstance(worlds, Mapping) and (missing := set(policies) - set(worlds)):
        raise ValueError(f"there is no world for {sorted(missing)}, given are those of {sorted(worlds)}")
    begins = log.obs[log.positions() == 0]
    some = begins[torch.randperm(len(begins), generator=generator(seed))[:starts].to(begins.device)]
    spaces = check(log, rewards=False).spaces
    assert spaces is not None
    for policy in policies.values():  # none is judged for nothing
        chosen(policy, some[:1], spaces)
    rows = []
    for name, policy in policies.items():
        value = fqe(policy, log, gamma=gamma, level=level, seed=seed, **fqe_options)
        world = worlds[name] if isinstance(worlds, Mapping) else worlds
        inside = error = None
        if world is not None:
            worst = float(log.reward.min())
            inside = return_in_model(policy, world, some, worst=worst, horizon=horizon, level=level, seed=seed)
            error = None if held_out is None else _error_near(policy, world.dynamics, held_out)
        rows.append(Candidate(name, value.value, value.residual, inside, error))
    return Ranking(tuple(sorted(rows, key=lambda row: -row.fqe.value)), gamma)


def _error_near(policy: Policy, model: Dynamics, held_out: Transitions) -> float:
    held_out.check()
    try:
        return model_error(model, held_out, policy)
    except DataError:
        return float("inf")


class _Pinned:
    """A sampler that asks the member of every lane, however the world has dealt them."""

    def __init__(self, member: Int[Tensor, " b"]) -> None:
        self.member = member

    def __call__(
        self, state: State, action: Float[Tensor, "b a"], dynamics: Dynamics, rng: torch.Generator
    ) -> tuple[State, Outcome]:
        """Ask it."""
        outcome = dynamics.sample(state.obs, action, self.member, rng, state.memory)
        return State(outcome.next_obs, self.member, outcome.memory), outcome


def _told(estimate: Estimate) -> str:
    return f"{estimate.value:.4g} [{estimate.low:.4g}, {estimate.high:.4g}]"
