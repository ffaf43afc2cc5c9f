"""A simulator with wrong parameters and a learned residual: better than either alone, and with fewer data."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from learneddyn.core import Json, Transitions, generator
from learneddyn.data import collect
from learneddyn.evaluation.fidelity import windows_of
from learneddyn.evaluation.stats import bootstrap_interval
from learneddyn.models import AbstractDynamics, Hybrid, ProbabilisticEnsemble
from learneddyn.runs import Notify
from learneddyn.runs.claims import Claim, Finding, panels
from learneddyn.world.prior import simulated

TASK, DT = "Hopper-v5", 0.008
WRONG: Json = {
    "task": TASK,
    "bodies": {
        "torso": {"mass": 1.5},
        "thigh": {"gear": 0.8},
        "leg": {"gear": 0.8, "mass": 0.7, "damping": 0.3},
        "foot": {"gear": 0.8, "mass": 1.5, "friction": 0.5},
    },
}
"""What the simulator believes, in factors of the truth."""
ROWS, HELD_OUT, WINDOWS = (200, 2000), 3000, 200
HORIZON, MOST = 20, 10.0
"""Steps of a free run; error that counts for any larger one, so that no single window that diverges is all there is."""
MODELS: dict[str, Callable[[], AbstractDynamics]] = {
    "hybrid": lambda: _network("learneddyn.world.prior.simulated", WRONG),
    "hybrid, sparse": lambda: Hybrid("learneddyn.world.prior.simulated", WRONG, dt=DT),
    "learned": lambda: _network("learneddyn.models.hybrid.persistence", {}),
    "ensemble": lambda: ProbabilisticEnsemble(5, 5, [64, 64], scale_targets=True),
}
"""The learned model is the hybrid's own network without its prior; the ensemble stops early and averages five."""
STYLES = {
    "hybrid": "tab:blue",
    "hybrid, sparse": "tab:cyan",
    "learned": "tab:orange",
    "ensemble": "tab:red",
    "prior alone": "black",
}


def _network(prior: str, arguments: Json) -> Hybrid:
    return Hybrid(prior, arguments, dt=DT, residual="neural", epochs=300, learning_rate=1e-3)


@torch.no_grad()
def free_run(
    step: Callable[[Float[Tensor, "w o"], Float[Tensor, "w a"]], Float[Tensor, "w o"]], train: Transitions, seed: int
) -> list[float]:
    """Return the error after 1 to `HORIZON` steps along held-out episodes of the real environment.

    The error of a window is the root mean square over columns, in standard deviations of the training observations; the
    mean over windows is returned.
    """
    log = windows_of(_log(HELD_OUT, seed + 1000), HORIZON, rng=generator(seed), windows=WINDOWS)
    scale, obs, errors = train.obs.std(dim=0), log.start, []
    for t in range(HORIZON):
        obs = step(obs, log.action[:, t])
        error = ((obs - log.next_obs[:, t]) / scale).square().mean(dim=1).sqrt()
        errors.append(float(error.nan_to_num(MOST, MOST).clamp_max(MOST).mean()))
    return errors


def _log(rows: int, seed: int) -> Transitions:
    """Return random actions in the real environment, one episode after the other."""
    return collect(TASK, steps=rows, lanes=1, seed=seed, progress=False)


def _mean(model: AbstractDynamics) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda obs, action: model.predict(obs, action).mean.mean(dim=0)


def measure(seed: int, home: Path, notify: Notify) -> Json:
    """Run the prior free, and every model fitted on the first rows of one log."""
    whole, figures = _log(max(ROWS), seed), Json()
    figures["prior alone"] = free_run(lambda obs, action: simulated(obs, action, **WRONG), whole, seed)
    for rows in ROWS:
        for name, make in MODELS.items():
            notify(f"{name}, {rows} rows", 0.5)
            model = make()
            model.fit(whole[:rows], rng=generator(seed))
            figures[f"{name}, {rows} rows"] = free_run(_mean(model), whole, seed)
    return figures


def findings(figures: dict[int, Json]) -> list[Finding]:
    """Judge the hybrid by the better of its two parts alone, after one step and after all."""

    def errors(name: str, rows: int, steps: int) -> list[float]:
        key = name if name == "prior alone" else f"{name}, {rows} rows"
        return [entry[key][steps - 1] for entry in figures.values()]

    found = []
    for rows, steps in ((rows, steps) for rows in ROWS for steps in (1, HORIZON)):
        text = f"{rows} rows, {steps} step{'s' * (steps > 1)}"
        parts = zip(*(errors(name, rows, steps) for name in ("hybrid", "prior alone", "learned")), strict=True)
        ratio = bootstrap_interval([hybrid / min(prior, learned) for hybrid, prior, learned in parts])
        found.append(Finding(f"{text}: error, hybrid / better part alone", ratio, "below 1", ratio.value < 1))
        for name in ("prior alone", *MODELS):
            value = bootstrap_interval(errors(name, rows, steps))
            found.append(Finding(f"{text}: error of {name} (spreads of the observation)", value, "", None))
    for steps in (1, HORIZON):
        few, many = errors("hybrid", ROWS[0], steps), errors("learned", ROWS[1], steps)
        ratio = bootstrap_interval([a / b for a, b in zip(few, many, strict=True)])
        text = f"{steps} step{'s' * (steps > 1)}: error, hybrid on {ROWS[0]} rows / network alone on {ROWS[1]}"
        found.append(Finding(text, ratio, "below 1", ratio.value < 1))
    return found


def draw(figures: dict[int, Json]) -> Figure:
    """Draw the errors along the free run."""
    figure, axes = panels(len(ROWS), width=3.8, height=3.0)
    steps = np.arange(1, HORIZON + 1)
    for ax, rows in zip(axes, ROWS, strict=True):
        for name, colour in STYLES.items():
            key = name if name == "prior alone" else f"{name}, {rows} rows"
            curves = np.array([entry[key] for entry in figures.values()])
            ax.plot(steps, curves.mean(axis=0), color=colour, label=name)
            ax.fill_between(steps, curves.min(axis=0), curves.max(axis=0), color=colour, alpha=0.15, linewidth=0)
        ax.set_yscale("log")
        ax.set_xticks([1, *range(5, HORIZON + 1, 5)])
        ax.set_title(f"fitted on {rows:,} rows", fontsize=9)
        ax.set_xlabel("steps", fontsize=8)
    axes[0].set_ylabel("error of a free run (spreads)", fontsize=8)
    axes[1].legend(fontsize=7, frameon=False)
    return figure


CLAIM = Claim(
    name="hybrid_prior",
    paper="Ajay, Wu, Fazeli, Bauza, Kaelbling, Tenenbaum, Rodriguez, Augmenting Physical Simulators with Stochastic "
    "Neural Networks: Case Study of Planar Pushing and Bouncing, 2018",
    claim="A physics engine with a learned residual predicts better than the engine alone and than a network alone, "
    "and needs fewer data than the network.",
    setting="Hopper-v5 under random actions; the engine is MuJoCo itself with torso, leg and foot 1.5, 0.7 and 1.5 "
    "times as heavy, motors of 80 %, 30 % of the knee's damping and half the foot's friction. The residual is a "
    "deterministic MLP (2 x 64) or sparse; the same MLP without the engine, and an ensemble of five, stand beside it. "
    f"Errors are means over {WINDOWS} held-out windows of the real environment. The paper has a pushed and a bouncing "
    "disc, recorded and simulated, and stochastic residuals.",
    measure=measure,
    findings=findings,
    draw=draw,
    notes="200 rows are about ten falls. The residual learned from them is right close to the data and wrong further "
    "on: a free run of 20 steps was 1.68 [1.05, 2.07] times as wrong as the engine alone. Since then a neural residual "
    "fades where inputs are farther out than 95 % of the logged ones (Hybrid's `fade`, ours; with the engine and "
    "without). Before the final run, on seeds 10 to 12 with 100 windows, that took the ratio after 20 steps from 1.16, "
    "1.36 and 2.16 to 0.78, 0.90 and 1.02, and the error after one step from 0.066 to 0.059 on average; on 2,000 rows "
    "(seed 10) it changed nothing. Tried there and left: a factor per column that minimises the error of one step on "
    "held-out episodes (0.73 to 1, as the residual is right for one step; ratio 1.41 on average), one factor that "
    "minimises held-out free runs of 10 steps (0.75; 1.22), the mean of five networks (1.38), 100 epochs instead of "
    "300 (1.34). Weight decay (AdamW, 0.3 to 10) was tried on one seed before: 0.60 to 0.50 after 20 steps at best, "
    "where the engine alone had 0.40, and it cost accuracy on 2,000 rows.",
)
