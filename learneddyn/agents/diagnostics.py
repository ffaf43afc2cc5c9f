"""What a model-based agent logs about itself. Functions return figures under Stable-Baselines3's logger keys.

    model/fresh_nll          nats per column: elites' mean negative log-likelihood of real steps that they have not seen
    model/fresh_mse          the same steps' mean squared error
    imagined/uncertainty     mean uncertainty of imagined rows (a `learneddyn.core.Penalty`), in the penalty's units
    imagined/uncertainty_p95 its 95th percentile
    imagined/terminated      share of imagined rows that end their episode
    time/<part>_share        share of the time that the loop spends in real steps, fits, imagination, updates

Errors of columns are divided by the standard deviation of the column's change in the data: 1 is the error of always
predicting the mean change.
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor

from learneddyn.core import Dynamics, Penalty, State, Transitions
from learneddyn.world import PENALTIES, World

MOST = 2000
"""Rows that an estimate of a mean looks at: its cost must not grow with the imagination."""


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
    prediction = dynamics.predict(fresh.obs, fresh.action)
    mean, std = (part[prediction.elites][..., moving] for part in (prediction.mean, prediction.std))
    error, std = (fresh.next_obs[:, moving] - mean) / scale[moving], std / scale[moving]
    nll = 0.5 * (error / std).square() + std.log() + 0.5 * math.log(2 * math.pi)
    return {"model/fresh_nll": float(nll.mean()), "model/fresh_mse": float(error.square().mean())}


@torch.no_grad()
def imagination_figures(world: World, rows: Transitions, penalty: Penalty | None = None) -> dict[str, float]:
    """Describe imagined rows: how uncertain the model is about them, and how many end an episode.

    Args:
        world: that imagined them.
        rows: imagined.
        penalty: measure of uncertainty, by default the world's own, else ``max_pairwise_diff``.
    """
    if not len(rows):
        return {}
    measure = penalty or world.penalty or PENALTIES["max_pairwise_diff"]
    some = rows[torch.linspace(0, len(rows) - 1, min(len(rows), MOST), device=rows.device).long()]
    prediction = world.dynamics.predict(some.obs, some.action)
    member = prediction.elites[0].expand(len(some))
    values = measure(some.obs, some.action, prediction, State(some.next_obs, member))
    return {
        "imagined/uncertainty": float(values.mean()),
        "imagined/uncertainty_p95": float(values.quantile(0.95)),
        "imagined/terminated": float(rows.terminated.float().mean()),
    }
