"""What a model-based agent logs about itself. Functions return figures under Stable-Baselines3's logger keys.

    model/fresh_nll           nats per column: elites' mean negative log-likelihood of real steps they have not seen
    model/fresh_mse           the same steps' mean squared error
    model/depth_error         root mean squared error of the elites' mean after `DEPTH` open-loop steps
    model/break_even          steps after which the open loop is no better than "nothing changes" (at most `DEPTH`)
    imagined/uncertainty      mean uncertainty of imagined rows (a `learneddyn.core.Penalty`), in the penalty's units
    imagined/uncertainty_p95  its 95th percentile; both are left out for models with memory
    imagined/terminated       share of imagined rows that end their episode
    imagined/return           mean return of `DEPTH` imagined steps of the policy of now, without any penalty
    real/return               mean return of `DEPTH` real steps from the same states, by the policy of the last steps
    time/<part>_share         share of the time that the loop spends in real steps, fits, imagination, updates

Errors of columns are divided by the standard deviation of the column's change in the data: 1 is the error of always
predicting the mean change. The depth-wise error under the policy of now is what the bounds of Janner, Fu, Zhang,
Levine, "When to Trust Your Model: Model-Based Policy Optimization" (2019), ask about a rollout length.
"""

import math
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor

from learneddyn.core import ActionFn, Dynamics, Penalty, State, Transitions
from learneddyn.models.base import AbstractDynamics, memory_of
from learneddyn.models.windows import remaining
from learneddyn.world import PENALTIES, Divergence, World, mean

MOST = 2000
"""Rows that an estimate of a mean looks at: its cost must not grow with the imagination."""
DEPTH = 20
"""Steps of the windows that open loops and returns are compared over."""


class Stopwatch:
    """Measures where the wall time goes: ``with watch("fit"): ...``. A section inside another pauses the outer one.

    On a GPU, work that is queued counts where the host waits for it.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def __call__(self, section: str) -> Iterator[None]:
        """Count the time inside for ``section``."""
        self._turn()
        self._open.append(section)
        try:
            yield
        finally:
            self._turn()
            self._open.pop()

    def _turn(self) -> None:
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] = self.seconds.get(self._open[-1], 0.0) + now - self._since
        self._since = now

    def shares(self) -> dict[str, float]:
        """Return every section's share of the time measured."""
        total = sum(self.seconds.values()) or 1.0
        return {f"time/{section}_share": seconds / total for section, seconds in self.seconds.items()}


class Alarm:
    """A sentinel (`learneddyn.world.sentinel`) that warns once: a broken model diverges at every step.

    Args:
        consequence: what becomes of such rows, for the message.
    """

    def __init__(self, consequence: str) -> None:
        self.consequence = consequence
        self.begin("")

    def begin(self, when: str) -> None:
        """Warn of the next divergence again, with ``when`` before its name."""
        self._when, self._silent = when, False

    def __call__(self, divergence: Divergence) -> None:
        """Warn, unless it has been done since `begin`."""
        if not self._silent:
            warnings.warn(f"{self._when}{divergence}; {self.consequence}", RuntimeWarning, stacklevel=2)
            self._silent = True


def change_scale(data: Transitions) -> Float[Tensor, " o"]:
    """Return the standard deviation of every column's change; columns without any have scale infinity (no error)."""
    std = (data.next_obs - data.obs).std(dim=0, correction=0)
    return torch.where(std > 1e-6, std, torch.inf)


@torch.no_grad()
def model_error(dynamics: Dynamics, fresh: Transitions, data: Transitions) -> dict[str, float]:
    """Judge a model on real steps taken since its last fit, as the policy of now takes them; call it before the next.

    Args:
        dynamics: fitted on older rows.
        fresh: rows that the model has not seen.
        data: all rows, for the scale.
    """
    scale = change_scale(data)
    moving = scale.isfinite()
    prediction = dynamics.predict(fresh.obs, fresh.action, memory_of(dynamics, fresh))
    mean, std = (part[prediction.elites][..., moving] for part in (prediction.mean, prediction.std))
    error, std = (fresh.next_obs[:, moving] - mean) / scale[moving], std / scale[moving]
    nll = 0.5 * (error / std).square() + std.log() + 0.5 * math.log(2 * math.pi)
    return {"model/fresh_nll": float(nll.mean()), "model/fresh_mse": float(error.square().mean())}


@torch.no_grad()
def imagination_figures(world: World, rows: Transitions, penalty: Penalty | None = None) -> dict[str, float]:
    """Describe imagined rows: how uncertain the model is about them, and how many end an episode.

    A model with memory (`AbstractDynamics.begin`) tells no uncertainty: rows do not hold what it remembered at them.

    Args:
        world: that imagined them.
        rows: imagined.
        penalty: measure of uncertainty, by default the world's own, else ``max_pairwise_diff``; of a model of one
            member ``max_aleatoric``.
    """
    if not len(rows):
        return {}
    figures = {"imagined/terminated": float(rows.terminated.float().mean())}
    if isinstance(world.dynamics, AbstractDynamics) and world.dynamics.begin(rows.obs[:1]) is not None:
        return figures
    usual = "max_pairwise_diff" if world.dynamics.num_members > 1 else "max_aleatoric"
    measure = penalty or world.penalty or PENALTIES[usual]
    some = rows[_some(torch.arange(len(rows), device=rows.device))]
    prediction = world.dynamics.predict(some.obs, some.action)
    member = prediction.elites[0].expand(len(some))
    values = measure(some.obs, some.action, prediction, State(some.next_obs, member))
    figures["imagined/uncertainty"] = float(values.mean())
    figures["imagined/uncertainty_p95"] = float(values.quantile(0.95))
    return figures


@torch.no_grad()
def window_figures(
    world: World, policy: ActionFn, fresh: Transitions, data: Transitions, rng: torch.Generator, depth: int = DEPTH
) -> dict[str, float]:
    """Compare model and reality over windows of real steps that the model has not been fitted on.

    Args:
        world: with the model to judge.
        policy: of now.
        fresh: real rows.
        data: all rows, for the scale.
        rng: on the world's device.
        depth: steps of a window; fewer for the open loop where no fresh episode is as long.
    """
    return depth_error(world, fresh, change_scale(data), depth)[0] | return_gap(world, policy, fresh, rng, depth)


@torch.no_grad()
def depth_error(
    world: World, fresh: Transitions, scale: Float[Tensor, " o"], depth: int = DEPTH
) -> tuple[dict[str, float], list[float]]:
    """Roll the elites' mean through logged actions.

    Returns:
        Figures, and the root mean squared error at every depth.
    """
    left = remaining(fresh)
    depth = min(depth, int(left.max()))
    rows = _some((left >= depth).nonzero().flatten())
    moving = scale.isfinite()
    memory = memory_of(world.dynamics, fresh)
    state = State(fresh.obs[rows], torch.zeros_like(rows), None if memory is None else memory[rows])
    errors: list[float] = []
    still: list[float] = []
    for step in range(depth):
        state, _ = mean(state, fresh.action[rows + step], world.dynamics, torch.Generator(rows.device))
        for found, guess in ((errors, state.obs), (still, fresh.obs[rows])):
            error = ((guess - fresh.next_obs[rows + step]) / scale)[:, moving]
            found.append(float(error.square().mean().sqrt()))
    lost = [step for step, (model, nothing) in enumerate(zip(errors, still, strict=True)) if not model < nothing]
    return {"model/depth_error": errors[-1], "model/break_even": float(lost[0] if lost else depth)}, errors


@torch.no_grad()
def return_gap(
    world: World, policy: ActionFn, fresh: Transitions, rng: torch.Generator, depth: int = DEPTH
) -> dict[str, float]:
    """Compare the returns of imagined windows with those of the real windows from the same states.

    Windows that a time-out or the end of the data cuts short do not count; nothing is returned where all are.
    """
    left, index = remaining(fresh), torch.arange(len(fresh), device=fresh.device)
    whole = (left >= depth) | fresh.terminated[index + left - 1]
    starts = _some(whole.nonzero().flatten())
    if not len(starts):
        return {}
    total = torch.cat([fresh.reward.new_zeros(1, dtype=torch.float64), fresh.reward.double().cumsum(0)])
    real = total[starts + left[starts].clamp_max(depth)] - total[starts]
    plain = World(world.dynamics, world.task, sampler=world.sampler, trust=world.trust, halt_reward=world.halt_reward)
    memory = memory_of(world.dynamics, fresh)
    rows = plain.rollout(fresh.obs[starts], policy, depth, rng, None if memory is None else memory[starts])
    imagined = torch.zeros_like(real).index_add_(0, rows.episode, rows.reward.double())
    return {"imagined/return": float(imagined.mean()), "real/return": float(real.mean())}


def _some(rows: Int[Tensor, " n"]) -> Int[Tensor, " m"]:
    """Return at most `MOST` of the rows, evenly spread."""
    return rows[torch.linspace(0, len(rows) - 1, min(len(rows), MOST), device=rows.device).long()]
