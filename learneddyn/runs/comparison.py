"""Model classes side by side on one log: open-loop error, calibration, and what they cost.

    figure        meaning
    1 step        error of a prediction one step ahead on held-out rows, in standard deviations of the training data
    k steps       error after k steps of its own, fed the logged actions; "diverged" where a rollout left the numbers
    coverage      share of held-out next observations inside the central 90 % interval of the one-step prediction
    ECE           mean distance of all such shares from their levels, 0 for a calibrated model
    fit           CPU seconds
    steps/s       imagined steps per CPU second, one member per row, 1024 rows at once
    bytes         of the weights, normalisation included

Every model class that `learneddyn.models` exports takes part, with the settings of `SETTINGS` where it is named there,
or is listed with the reason why it cannot. Fits are short (`BUDGET`): the table compares what classes make of a small
log in seconds, and no class is tuned to a log.
"""

import hashlib
import inspect
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from torch import Tensor

from learneddyn import models
from learneddyn.core import Dynamics, Json, Task, Transitions, generator
from learneddyn.evaluation.calibration import one_step_calibration
from learneddyn.evaluation.fidelity import fidelity_of_log, longest_window
from learneddyn.evaluation.stats import Estimate, bootstrap_interval, plain
from learneddyn.files import write_file
from learneddyn.models import AbstractContinual, AbstractDynamics
from learneddyn.runs.cells import FAILED, Cells
from learneddyn.runs.claims import panels
from learneddyn.tasks.endless import never
from learneddyn.world import World

HORIZON, WINDOWS, LANES = 50, 200, 1024
LEVEL = 0.9
SPEED_SECONDS = 0.2
"""CPU time that a model is stepped for."""
NO_CHANGE = "no change"
"""The row of the prediction that nothing changes."""
EXCLUDED = "excluded"
"""The key of a class that cannot take part; its value says why."""
BUDGET: Json = {"updates": 1000, "max_epochs": 40, "epochs": 20}
"""Arguments that keep a fit short, for the classes that take them."""
SETTINGS: dict[str, dict[str, Json]] = {
    "ComponentLaw": {"": {"updates": 250}},
    "ProbabilisticEnsemble": {"": {"num_members": 5, "num_elites": 5, "hidden": [64, 64], "scale_targets": True}},
    "SINDy": {"": {"degree": 2, "bootstraps": 5, "bias": True}},
    "Koopman": {
        "polynomial": {"degree": 2},
        "rbf": {"lift": "rbf", "centres": 100},
        "learned": {"lift": "learned", "centres": 32},
    },
    "PLRNN": {
        "clipped": {"window": 20, "updates": 500},
        "almost-linear": {"kind": "almost-linear", "relus": 2, "window": 20, "updates": 500},
    },
    "Hybrid": {"sparse": {}, "neural": {"residual": "neural"}},
    "RecurrentDynamics": {
        "gru": {"window": 32, "updates": 300},
        "s4d": {"cell": "s4d", "window": 32, "updates": 300},
        "s4d, ptd": {"cell": "s4d", "init": "ptd", "window": 32, "updates": 300},
        "companion": {"cell": "companion", "window": 32, "updates": 300},
    },
    "SparseReLU": {"": {"hidden": [64, 64], "relus": 32}},
}
"""Arguments by class and variant; a class that is not named here has one variant, its defaults."""
WIDE, OF_WIDE = 16, {"SINDy": {"degree": 1}}
"""Columns of observation and action from which on these settings go first: terms of degree 2 would be hundreds."""
REASONS = {
    "ComponentLaw": "learns a law inside equations, and none are given for this system",
    "Hybrid": "corrects a physics prior, and none is given for this system",
    "KinematicBicycle": "holds the equations of a vehicle: pose, speed and steering angle",
    "MixER": "tells several environments apart, and this log is of one (see reproduce mixer)",
}
"""Why classes that ask for knowledge of the system cannot take part without it (`Log.known`)."""


@dataclass(frozen=True)
class Log:
    """A log that models are compared on.

    Args:
        name: in tables.
        train: what they learn from.
        held_out: what they are judged by, of the same spaces.
        angles: observation columns in radians; their errors are taken the short way round.
        known: what is known of the system: arguments by class, such as the ``prior`` of "Hybrid".
        horizon: steps of the longest rollout, by default `horizon_of` the held-out episodes; it must be the same for
            all seeds of a table.
    """

    name: str
    train: Transitions
    held_out: Transitions
    angles: tuple[int, ...] = ()
    known: dict[str, Json] = field(default_factory=dict)
    horizon: int | None = None


class Rival(NamedTuple):
    """A model class and its arguments."""

    kind: type[AbstractDynamics] | type[AbstractContinual]
    arguments: Json


def rivals(log: Log) -> dict[str, Rival | str]:
    """Return the rivals for a log by the name of their row, or the reason why a class cannot take part."""
    found: dict[str, Rival | str] = {}
    for name in models.__all__:
        kind = getattr(models, name)
        dynamics = isinstance(kind, type) and issubclass(kind, AbstractDynamics | AbstractContinual)
        if not dynamics or inspect.isabstract(kind):
            continue
        if name in REASONS and name not in log.known:
            found[name] = REASONS[name]
            continue
        parameters = inspect.signature(kind).parameters
        given = {"angles": list(log.angles)} | BUDGET
        shared = {key: value for key, value in given.items() if key in parameters} | log.known.get(name, {})
        for variant, own in SETTINGS.get(name, {"": {}}).items():
            wide = OF_WIDE.get(name, {}) if log.train.obs.shape[1] + log.train.action.shape[1] >= WIDE else {}
            found[f"{name}, {variant}" if variant else name] = Rival(kind, shared | own | wide)
    return found


def check_known(known: Mapping[str, Json]) -> None:
    """Refuse knowledge of a system (`Log.known`) that no model class asks for.

    Raises:
        ValueError: a name that is no model class, or an argument that it does not take, or cannot use.
    """
    for name, arguments in known.items():
        if name not in REASONS:
            raise ValueError(f"known may hold arguments of {', '.join(REASONS)}, got {name!r}")
        parameters = inspect.signature(getattr(models, name)).parameters
        if unknown := sorted(set(arguments) - set(parameters)):
            raise ValueError(f"{name} does not take {', '.join(unknown)}; it takes {', '.join(parameters)}")
        getattr(models, name)(**arguments)  # imports what the arguments name


def horizon_of(held_out: Transitions) -> int:
    """Return the steps of the longest rollout: `HORIZON`, or what ten held-out rows can begin (one, if so few can)."""
    return min(HORIZON, longest_window(held_out, windows=10) or longest_window(held_out))


def compare(log: Log, seed: int, cells: Cells) -> dict[str, Json]:
    """Return the figures of every row for a log and seed, each from its own cell.

    Raises:
        Exception: what a class says to its arguments (`SETTINGS`, `Log.known`); what goes wrong later, in a fit or
            its judgement, is that class's failed cell.
    """
    basis = {"rows": len(log.train), "held_out": len(log.held_out), "seed": seed, "log": _fingerprint(log)}
    basis |= {"angles": list(log.angles)} if log.angles else {}
    basis |= {"horizon": log.horizon} if log.horizon not in (None, horizon_of(log.held_out)) else {}
    found: dict[str, Json] = {}
    taking_part = rivals(log)
    for rival in taking_part.values():
        if isinstance(rival, Rival):
            rival.kind(**rival.arguments)
    for name, rival in taking_part.items():
        if isinstance(rival, str):
            found[name] = {EXCLUDED: rival}
            continue
        work = partial(_judged, rival, log, seed)
        found[name] = cells.play(f"{log.name}, {name}", basis | {"arguments": rival.arguments}, work)
    return found


def count(logs: Sequence[Log]) -> int:
    """Return the number of cells of one seed."""
    return sum(isinstance(rival, Rival) for log in logs for rival in rivals(log).values())


def judge(rival: Rival, log: Log, seed: int) -> Json:
    """Fit one rival and return its figures.

    Raises:
        ValueError: the class refuses the log, or no held-out episode is as long as the horizon.
        ArithmeticError: the fit diverged.
    """
    rng, begun = generator(seed), time.process_time()
    model = rival.kind(**rival.arguments)
    if isinstance(model, AbstractContinual):
        model.fit_task(0, log.train, rng=rng)
    else:
        model.fit(log.train, rng=rng)
    seconds = time.process_time() - begun
    dynamics: AbstractDynamics = model.on(0) if isinstance(model, AbstractContinual) else model
    bare = Task(log.name, reward=_nothing, terminated=never, angles=log.angles)
    horizon = horizon_of(log.held_out) if log.horizon is None else log.horizon
    followed = fidelity_of_log(
        World(dynamics, bare, sampler="mean"),
        log.held_out,
        horizon=horizon,
        windows=WINDOWS,
        reference=log.train,
        rng=generator(seed),
    )
    calibrated = one_step_calibration(dynamics, log.held_out, angles=log.angles)
    return {
        "one": plain(followed.overall[0]),
        "far": plain(followed.overall[-1]),
        "horizon": horizon,
        "still": [plain(followed.persistence_overall[0]), plain(followed.persistence_overall[-1])],
        "coverage": plain(calibrated.mean_coverage[LEVEL][0]),
        "ece": plain(calibrated.mean_ece[0]),
        "fit": round(seconds, 3),
        "rate": round(_rate(dynamics, log.held_out, seed)),
        "bytes": sum(part.numel() * part.element_size() for part in model.state_dict().values()),
    }


def _judged(rival: Rival, log: Log, seed: int) -> Json:
    """Judge a rival; whatever goes wrong is a class that could not be judged, and no end of the table.

    A fault of the machine (a missing package, memory, files) is none of the class's, and is not kept as its result.
    """
    try:
        return judge(rival, log, seed)
    except (ImportError, MemoryError, OSError):
        raise
    except Exception as error:
        return {FAILED: f"{type(error).__name__}: {error}"}


def _nothing(obs: Float[Tensor, "b o"], action: Float[Tensor, "b a"], next_obs: Float[Tensor, "b o"]) -> Tensor:
    """Return no reward: only observations are compared."""
    return torch.zeros(len(obs), device=obs.device)


@torch.no_grad()
def _rate(dynamics: Dynamics, data: Transitions, seed: int) -> float:
    rng, rows = generator(seed), torch.arange(LANES) % len(data)
    obs, action, member, memory = data.obs[rows], data.action[rows], torch.zeros(LANES, dtype=torch.long), None
    for _ in range(2):
        memory = dynamics.sample(obs, action, member, rng, memory).memory
    steps, begun = 0, time.process_time()
    while (spent := time.process_time() - begun) < SPEED_SECONDS:
        memory = dynamics.sample(obs, action, member, rng, memory).memory
        steps += 1
    return LANES * steps / spent


def _fingerprint(log: Log) -> str:
    """Return a text that changes with the log, so that a cell of another log is not taken for this one's."""
    digest = hashlib.sha256()
    for part in (log.train, log.held_out):
        for column in part.tensors().values():
            digest.update(column.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


Figures = dict[int, dict[str, dict[str, Json]]]
"""By seed, log and row."""


def estimate(figures: Figures, log: str, row: str, name: str) -> Estimate | None:
    """Return a figure over all seeds; None where one failed or diverged."""
    values = [seed[log][row].get(name) for seed in figures.values()]
    return bootstrap_interval(values) if None not in values else None


def best(figures: Figures, log: str, name: str = "far") -> tuple[str, Estimate] | None:
    """Return the row with the smallest figure on a log, None where every class diverged on some seed."""
    rows = [row for row, cell in next(iter(figures.values()))[log].items() if EXCLUDED not in cell]
    found = {row: estimate(figures, log, row, name) for row in rows}
    known = {row: value for row, value in found.items() if value is not None}
    return min(known.items(), key=lambda item: item[1].value) if known else None


def still(figures: Figures, log: str) -> tuple[Estimate, Estimate, int] | None:
    """Return the errors of predicting no change, after one step and after the last, and how many steps those are.

    None where no class could be fitted on the log.

    Raises:
        ValueError: the seeds' rollouts differ in their steps, so that their errors are no samples of one figure.
    """
    cells = [cell for seed in figures.values() for cell in seed[log].values() if "still" in cell]
    if not cells:
        return None
    steps = sorted({int(cell["horizon"]) for cell in cells})
    if len(steps) > 1:
        raise ValueError(
            f"the seeds' longest rollouts on {log!r} have {steps} steps, and must be of one length: give "
            f"Log(..., horizon={steps[0]})"
        )
    one, far = (bootstrap_interval([cell["still"][place] for cell in cells]) for place in (0, 1))
    return one, far, steps[0]


def told_best(figures: Figures) -> list[str]:
    """Say which class is best on each log, after one step and after the last."""
    lines = []
    for log in next(iter(figures.values())):
        if bars := still(figures, log):
            for name, bar, steps in (("one", bars[0], "1 step"), ("far", bars[1], f"{bars[2]} steps")):
                if found := best(figures, log, name):
                    lines.append(f"{log}, {steps}: {found[0]} {_short(found[1])} sd (no change: {_short(bar)})")
    return lines


def write(folder: Path, figures: Figures) -> Path:
    """Write ``comparison.md`` and ``comparison.png``, and return the first."""
    figure = draw(figures)
    FigureCanvasAgg(figure)
    figure.savefig(folder / "comparison.png", dpi=130)
    write_file(folder / "comparison.md", f"{table(figures)}\n".encode())
    return folder / "comparison.md"


def table(figures: Figures) -> str:
    """Return all figures as one Markdown table, a row per log and class; intervals are over seeds.

    Classes that cannot take part are listed below it.
    """
    out: dict[str, list[str]] = {}
    lines = [
        "| log | model | 1 step | k steps | coverage of 90 % | ECE | fit, CPU s | steps/s | bytes |",
        "|---" * 9 + "|",
    ]
    first = next(iter(figures.values()))
    for log, rows in first.items():
        if bars := still(figures, log):
            one, far, horizon = bars
            lines.append(f"| {log}, k = {horizon} | *{NO_CHANGE}* | {_short(one)} | {_short(far)} ||||||")
        for row in rows:
            cells = [seed[log][row] for seed in figures.values()]
            if EXCLUDED in cells[0]:
                out.setdefault(f"{row}: {cells[0][EXCLUDED]}", []).append(log)
                continue
            if why := _why(cells):
                lines.append(f"| {log} | {row} | {why} |||||||")
                continue
            parts = {name: estimate(figures, log, row, name) for name in ("one", "far", "coverage", "ece")}
            shown = [_short(value) if value else f"diverged {_lost(cells, name)}x" for name, value in parts.items()]
            cost = [float(np.mean([cell[name] for cell in cells])) for name in ("fit", "rate", "bytes")]
            shown += [f"{cost[0]:.2g}" if cost[0] < 10 else f"{cost[0]:.0f}", f"{cost[1]:.2g}", f"{cost[2]:,.0f}"]
            lines.append(f"| {log} | {row} | " + " | ".join(shown) + " |")
    left = [f"- {why} ({', '.join(where)})" for why, where in out.items()]
    return "\n".join([*lines, "", "Left out:", "", *left] if left else lines)


def _why(cells: Sequence[Json]) -> str:
    """Say why a class could not be fitted, "" where it could."""
    failed = [cell[FAILED] for cell in cells if FAILED in cell]
    return f"**failed** {len(failed)}x: {' '.join(failed[0].split())}".replace("|", "/") if failed else ""


def _lost(cells: Sequence[Json], name: str) -> int:
    return sum(cell[name] is None for cell in cells)


def _short(value: Estimate) -> str:
    told = [f"{number:.3g}" for number in value]
    return told[0] if len(set(told)) == 1 or "inf" in told[2] else f"{told[0]} [{told[1]}, {told[2]}]"


def draw(figures: Figures) -> Figure:
    """Show one-step error against k-step error, a panel per log; dotted: no change; hollow, at the top: diverged."""
    first = next(iter(figures.values()))
    figure, axes = panels(len(first), width=2.6, height=3.6)
    names = list(dict.fromkeys(row for rows in first.values() for row, cell in rows.items() if EXCLUDED not in cell))
    looks = dict(zip(names, _looks(len(names)), strict=True))
    for ax, (log, rows) in zip(axes, first.items(), strict=True):
        drawn: Mapping[str, tuple[Estimate | None, Estimate | None]] = {
            row: (estimate(figures, log, row, "one"), estimate(figures, log, row, "far"))
            for row, cell in rows.items()
            if EXCLUDED not in cell
        }
        ends = [far.value for one, far in drawn.values() if one and far]
        top = 3 * max(ends, default=1.0)
        for row, (one, far) in drawn.items():
            if one is not None:
                style = looks[row] | {"linestyle": "", "markersize": 6, "label": row}
                ax.plot(one.value, far.value if far else top, fillstyle="full" if far else "none", **style)
        if bars := still(figures, log):
            before, after, horizon = bars
            ax.axhline(after.value, color="grey", linewidth=1, linestyle=":")
            ax.axvline(before.value, color="grey", linewidth=1, linestyle=":")
            ax.set_xlabel("error after 1 step (sd)", fontsize=8)
            ax.set_title(f"{log}\n(k = {horizon})", fontsize=8)
        ax.set(xscale="log", yscale="log")
        for axis in (ax.xaxis, ax.yaxis):  # a panel may span less than a power of ten
            axis.set_major_locator(LogLocator(subs=(1.0, 3.0), numticks=7))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_locator(NullLocator())
    axes[0].set_ylabel("error after k steps (sd; hollow: diverged)", fontsize=8)
    handles = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5, frameon=False, fontsize=7)
    return figure


def _looks(number: int) -> list[dict[str, Any]]:
    colours = [f"tab:{name}" for name in ("blue", "orange", "green", "red", "purple", "brown", "pink", "olive", "cyan")]
    return [{"marker": "osD^vPX*"[i % 8], "color": colours[i % len(colours)], "alpha": 0.8} for i in range(number)]
