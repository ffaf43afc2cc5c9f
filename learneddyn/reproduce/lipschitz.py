"""One model with a critic that varies slowly, beside an ensemble, inside MBPO on the pendulum."""

from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from matplotlib.figure import Figure

from learneddyn.agents import MBPO
from learneddyn.agents.checkpoint import load_checkpoint
from learneddyn.agents.lipschitz import AdversarialNoise, CriticRegulariser, value_slopes
from learneddyn.core import Json
from learneddyn.data.scores import REFERENCES
from learneddyn.evaluation.stats import Estimate, bootstrap_difference, bootstrap_interval
from learneddyn.models import ProbabilisticEnsemble
from learneddyn.reproduce.mbpo import settings
from learneddyn.runs.claims import Claim, Finding, panels
from learneddyn.runs.online import learn_online
from learneddyn.runs.seeds import Notify

ENV = "Pendulum-v1"
STEPS, JUDGE_EVERY, EPISODES = 3000, 250, 10
LAST = 1000
"""Real steps at the end over whose judgements a return is averaged: one policy's return still flickers."""
STATES = 2000
"""Real states of all agents of a seed, at which their values' slopes are compared."""
RADIUS = 0.05
WEIGHTS = (0.1, 1.0)
MAIN, ENSEMBLE, SINGLE = "noise 0.1", "ensemble of 5", "single"
"""The variant that the claim is judged by was chosen, with the weights, on a seed that is not among the claim's."""
VARIANTS: dict[str, tuple[int, CriticRegulariser | None]] = {
    ENSEMBLE: (5, None),
    SINGLE: (1, None),
    **{f"noise {weight:g}": (1, AdversarialNoise(weight, RADIUS)) for weight in WEIGHTS},
}
"""Members of the model, and what regularises the critic."""


def light_model(members: int = 5) -> ProbabilisticEnsemble:
    """Return a small ensemble that learns from few rows: scaled targets, small batches, three of five elites."""
    return ProbabilisticEnsemble(
        num_members=members,
        num_elites=max(1, members * 3 // 5),
        hidden=[64, 64],
        weight_decay=1e-5,
        scale_targets=True,
        batch_size=64,
        max_epochs=60,
    )


def make(variant: str, seed: int, env: gym.Env[Any, Any]) -> MBPO:
    """Return MBPO with the variant's model and critic."""
    members, regulariser = VARIANTS[variant]
    return MBPO(
        "MlpPolicy",
        env,
        model=light_model(members),
        rollout_batch=5000,
        critic_regulariser=regulariser,
        **settings(ENV, seed),
    )


def measure(seed: int, folder: Path, notify: Notify) -> Json:
    """Play one seed of every variant, and compare the slopes of their values at the states that all of them visited."""
    figures: Json = {}
    for index, variant in enumerate(VARIANTS):

        def say(what: str, share: float, index: int = index, variant: str = variant) -> None:
            notify(f"{variant}, {what}", (index + share) / len(VARIANTS))

        marks = learn_online(
            partial(make, variant, seed),
            ENV,
            folder / variant.replace(" ", "-"),
            steps=STEPS,
            judge_every=JUDGE_EVERY,
            episodes=EPISODES,
            seed=seed,
            notify=say,
        )
        figures[variant] = {
            "steps": [mark.real_steps for mark in marks],
            "returns": [mark.mean for mark in marks],
            "cpu_seconds": marks[-1].cpu_seconds,
        }
    agents = {variant: _finished(folder / variant.replace(" ", "-")) for variant in VARIANTS}
    visited = torch.cat([agent.real_data().obs for agent in agents.values()])
    states = visited[torch.linspace(0, len(visited) - 1, STATES).long()]
    for variant, agent in agents.items():
        slopes = value_slopes(agent, states)
        figures[variant] |= {"lipschitz": float(slopes.max()), "slope": float(slopes.mean())}
    return figures


def findings(figures: dict[int, Json]) -> list[Finding]:
    """Judge the returns at the end, as shares of the way from the random policy's to 0, and the values' slopes."""
    random = REFERENCES[ENV].random

    def each(variant: str, name: str) -> np.ndarray:
        return np.array([entry[variant][name] for entry in figures.values()])

    def score(variant: str) -> np.ndarray:
        return 1 - last(variant) / random

    def last(variant: str) -> np.ndarray:
        return np.array([settled(entry[variant], STEPS) for entry in figures.values()])

    ratio = _ratio(score(MAIN), score(ENSEMBLE))
    found = [
        Finding(
            f"last score, single with {MAIN} over {ENSEMBLE}",
            ratio,
            ">= 0.9, the ensemble's above 0.5",
            ratio.value >= 0.9 and score(ENSEMBLE).mean() > 0.5,
        ),
        Finding(f"last score, single alone over {ENSEMBLE}", _ratio(score(SINGLE), score(ENSEMBLE)), "beside it", None),
    ]
    path = [SINGLE, *(f"noise {weight:g}" for weight in WEIGHTS)]
    for name, what in (("lipschitz", "largest slope of V"), ("slope", "mean slope of V")):
        levels = [each(variant, name) for variant in path]
        means = [float(np.exp(np.log(level).mean())) for level in levels]
        fall = factor(levels[-1], levels[0])
        shown = ", ".join(f"{variant} {mean:.3g}" for variant, mean in zip(path, means, strict=True))
        found.append(
            Finding(
                f"{what}, {path[-1]} over {SINGLE} (geometric means: {shown})",
                fall,
                "interval below 1, falling with the weight",
                fall.high < 1 and all(after < before for before, after in pairwise(means)),
            )
        )
    found += [
        Finding(
            f"largest slope of V, {ENSEMBLE} over single alone",
            factor(each(ENSEMBLE, "lipschitz"), each(SINGLE, "lipschitz")),
            "below 1, says the paper",
            None,
        ),
        *(Finding(f"last return, {variant}", bootstrap_interval(last(variant)), "", None) for variant in VARIANTS),
        Finding(
            f"CPU seconds, {MAIN} over {ENSEMBLE}",
            factor(each(MAIN, "cpu_seconds"), each(ENSEMBLE, "cpu_seconds")),
            "beside it",
            None,
        ),
    ]
    return found


def draw(figures: dict[int, Json]) -> Figure:
    """Draw learning curves, and return over slope."""
    colours = dict(zip(VARIANTS, ("black", "#8a8a8a", "#f4a259", "#d8495c"), strict=True))
    figure, (curves, slopes) = panels(2)
    for variant, colour in colours.items():
        runs = [entry[variant] for entry in figures.values()]
        returns = np.mean([run["returns"] for run in runs], axis=0)
        curves.plot(runs[0]["steps"], returns, color=colour, linewidth=1.2, label=variant)
        slopes.plot(
            [run["lipschitz"] for run in runs],
            [settled(run, STEPS) for run in runs],
            "o",
            color=colour,
            markersize=4,
            label=variant,
        )
    curves.set(xlabel="real steps", ylabel="return, mean of seeds", title=ENV)
    curves.legend(frameon=False, fontsize=7)
    slopes.set(xlabel="largest slope of V", ylabel=f"return, last {LAST} steps", xscale="log", title="one dot a seed")
    return figure


def settled(run: Json, steps: int) -> float:
    """Return the mean return over the judgements of the last `LAST` of so many steps."""
    pairs = zip(run["steps"], run["returns"], strict=True)
    return float(np.mean([value for step, value in pairs if step > steps - LAST]))


def factor(over: np.ndarray, under: np.ndarray) -> Estimate:
    """Return the geometric mean of the ratios, with its percentile interval over paired seeds."""
    return Estimate(*(float(np.exp(end)) for end in bootstrap_difference(np.log(over), np.log(under), paired=True)))


def _finished(folder: Path) -> MBPO:
    return load_checkpoint(MBPO, folder / "checkpoint", gym.make(ENV), "cpu")


def _ratio(over: np.ndarray, under: np.ndarray) -> Estimate:
    """Return the ratio of the means, with its percentile interval over paired seeds."""
    pairs = np.array([over, under]).T
    value = pairs[:, 0].mean() / pairs[:, 1].mean()
    if len(pairs) == 1:
        return Estimate(float(value), -np.inf, np.inf)
    draws = pairs[np.random.default_rng(0).integers(len(pairs), size=(5000, len(pairs)))].mean(axis=1)
    low, high = np.quantile(draws[:, 0] / draws[:, 1], (0.025, 0.975))
    return Estimate(float(value), float(low), float(high))


CLAIM = Claim(
    name="lipschitz",
    paper='Zheng, Wang, Xu, Huang, "Is Model Ensemble Necessary? Model-based RL via a Single Model with Lipschitz '
    'Regularized Value Function", 2023',
    claim="An ensemble of models helps because it keeps the value function from varying fast; a single model with a "
    "critic that is regularised to that end does as well.",
    setting=f"MBPO with light parts on {ENV}, {STEPS} real steps, 500 of them random (settings of `mbpo`, model of 2 x "
    "64 with batches of 64 rows and at most 60 epochs a fit): 5 members with 3 elites, or one member with the critic's "
    f"noise loss (radius {RADIUS} standard deviations, one gradient-sign step). Slopes "
    f"|∇V| are taken in standard deviations at {STATES} real states that all agents of a seed visited, the largest "
    "being a lower bound of Lip(V). Returns are means over the judgements of the last "
    f"{LAST} steps, a score the share of the way from the random policy's return "
    f"({REFERENCES[ENV].random}) to 0. The paper's runs are MuJoCo's walking tasks with its own weights.",
    measure=measure,
    findings=findings,
    draw=draw,
)
