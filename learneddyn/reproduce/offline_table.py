"""Offline methods side by side on data sets that are built here: Reacher in four grades.

`learneddyn.reproduce.offline_table_hopper` is the same on Hopper, in two.

    per seed and task    train one agent to medium (its record is the replay grade), one to expert; collect the rest
    per grade            fit one model, which all model-based methods share
    per method           a number of updates that is fixed beforehand; the last policy plays real episodes

Every data set, model and score is a cell of its own (`learneddyn.runs.cells`): a killed run goes on where it stopped,
and a method that is added later, or was given other settings, leaves the other cells as they are. Cells are played
grade by grade, in the order of `ORDER`, every method of one before the data of the next; with one worker per seed
(``--workers 3``) the seeds keep pace. `show` writes what there is of a run that was stopped.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import minari
import numpy as np
import torch
from matplotlib.figure import Figure

from learneddyn import offline, tasks
from learneddyn.core import Json, Task, Transitions, generator
from learneddyn.data import collect, load, save
from learneddyn.data.grades import GradeNotReached, train
from learneddyn.data.scores import normalized_score
from learneddyn.evaluation.returns import evaluate
from learneddyn.evaluation.stats import Estimate, bootstrap_interval
from learneddyn.files import surviving_folder
from learneddyn.models import AbstractDynamics, ProbabilisticEnsemble
from learneddyn.runs.cells import FAILED, UNPLAYED, Cells
from learneddyn.runs.claims import Claim, Finding, Measure, panels, run_claim
from learneddyn.runs.seeds import Notify

METHODS = ("BC", "TD3+BC", "IQL", "EDAC", "MOPO", "MOBILE", "RAVL", "MOREC")
"""In the order of the table; the class of a method is what `learneddyn.offline` exports by that name, without signs."""
MODEL_BASED = ("MOPO", "MOBILE", "RAVL", "MOREC")
GRADES = ("random", "medium", "replay", "expert")
ORDER = ("medium", "replay", "random", "expert")
"""In which grades are played: what is judged comes first."""
JUDGE_SEED = 10_000


@dataclass(frozen=True)
class Part:
    """One task of the table.

    Args:
        task: what is asked, with what its observation determines.
        grades: data sets, names of `GRADES`.
        rows: transitions of each (replay: at most; it is the record of training the medium agent).
        medium: mean return at which the behaviour agent of medium and replay is stopped.
        training: real steps that the medium agent may take, and those that the expert takes.
        behaviour: algorithm of the behaviour agents and its arguments.
        model: arguments of the ensemble that all model-based methods share.
        updates: gradient updates by method.
        shared: arguments of all methods.
        imagined: arguments of the model-based methods.
        own: further arguments by method.
        episodes: real episodes that judge a policy.
    """

    task: Task
    grades: tuple[str, ...]
    rows: int
    medium: float
    training: tuple[int, int]
    behaviour: Json
    model: Json
    updates: dict[str, int]
    shared: Json
    imagined: Json
    own: dict[str, Json] = field(default_factory=dict)
    episodes: int = 20

    def arguments(self, method: str) -> Json:
        """Return the constructor arguments of a method."""
        return self.shared | (self.imagined if method in MODEL_BASED else {}) | self.own.get(method, {})


Parts = Mapping[str, Part]
"""Tasks of a table by name."""

PARTS = {
    "Reacher": Part(
        task=tasks.get("Reacher-v5"),
        grades=GRADES,
        rows=5000,
        medium=-25.0,
        training=(30_000, 12_000),
        behaviour={"algorithm": "SAC", "kwargs": {"policy_kwargs": {"net_arch": [64, 64]}, "learning_starts": 500}},
        model={"num_members": 5, "num_elites": 5, "hidden": [64, 64], "scale_targets": True, "weight_decay": 1e-5}
        | {"batch_size": 64, "max_epochs": 100},
        updates={"BC": 5000, "TD3+BC": 10_000, "IQL": 10_000, "EDAC": 10_000}
        | {"MOPO": 15_000, "MOBILE": 10_000, "RAVL": 15_000, "MOREC": 12_000},
        shared={"learning_rate": 1e-3, "policy_kwargs": {"net_arch": [64, 64]}, "batch_size": 128},
        imagined={"actor_learning_rate": 1e-3, "ent_coef_learning_rate": 1e-3}
        | {"rollout_every": 250, "rollout_batch": 1000, "retain": 10},
        own={
            "EDAC": {"n_critics": 5},
            "MOPO": {"penalty": "ensemble_std", "penalty_weight": 0.1},
            "MOBILE": {"inconsistency": 0.5, "inconsistency_draws": 2},
            "RAVL": {"n_critics": 5},
            # Rewards are negative here: a halt, worth 0, would be a way out.
            "MOREC": {"penalty": "ensemble_std", "penalty_weight": 0.1, "horizon": 25, "rollout_batch": 100}
            | {"least_dynamics_reward": 0.0}
            | {"dynamics_reward": {"snapshots": 10, "updates": 3000, "hidden": [64, 64], "generator_hidden": [64, 64]}},
        },
    ),
}


def kind_of(method: str) -> type[offline.OfflineAlgorithm] | None:
    """Return the class of a method, None as long as the package exports none."""
    return getattr(offline, method.replace("+", ""), None)


def measure(seed: int, home: Path, notify: Notify) -> Json:
    """Play all cells of one seed."""
    return play_parts(PARTS, seed, home, notify)


def play_parts(parts: Parts, seed: int, home: Path, notify: Notify, *, frozen: bool = False) -> Json:
    """Return the returns of behaviours and methods of one seed, by task and grade; ``frozen`` plays no cell.

    A grade without data holds why under ``FAILED``, and so does every method there.
    """
    total = sum(1 + len(part.grades) * (2 + len(part.updates)) for part in parts.values())
    cells, figures = Cells(home, notify, total, frozen=frozen), dict[str, Json]()
    for name, part in parts.items():
        found: Json = {}
        idle = cells.play(f"{name}, no action", {"episodes": part.episodes, "seed": seed}, partial(_idle, part, seed))
        for grade in sorted(part.grades, key=ORDER.index):
            log = log_of(part, name, grade, seed, cells)
            if FAILED in log:
                found[grade] = log | dict.fromkeys(part.updates, log)
                continue
            found[grade] = {"behaviour": log["return"], "rows": log["rows"]}
            found[grade] |= {} if FAILED in idle else {"idle": idle["return"]}
            found[grade] |= methods(part, name, grade, log["id"], seed, home, cells)
        figures[name] = {grade: found[grade] for grade in part.grades}
    return figures


def show(claim: Claim, parts: Parts, out: str | Path, *, seeds: Sequence[int] | None = None) -> list[Finding]:
    """Write result and picture of what there is of a run in ``out``; what is missing is "not played yet".

    For example ``show(offline_table_hopper.CLAIM, offline_table_hopper.PARTS, "runs/reproduce")``. The run goes on
    with ``--resume true`` as before.

    Raises:
        RunExists: the run there has other seeds.
    """
    read = partial(play_parts, parts, frozen=True)
    return run_claim(replace(claim, measure=read), out, seeds=seeds, workers=1, resume=True, progress=False)


class Idle:
    """Plays the middle of the action range: what a policy earns that does nothing."""

    def __init__(self, real_id: str) -> None:
        space = gym.spec(real_id).make().action_space
        assert isinstance(space, gym.spaces.Box)
        self.action = (0.5 * (space.low + space.high)).astype(np.float32)

    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[np.ndarray, Any]:
        """Return the action for every row."""
        return np.repeat(self.action[None], len(observation), axis=0), state


def _idle(part: Part, seed: int) -> Json:
    real_id = part.task.real_id
    return {"return": evaluate(Idle(real_id), real_id, episodes=part.episodes, seed=JUDGE_SEED + seed).mean}


def log_of(part: Part, name: str, grade: str, seed: int, cells: Cells) -> Json:
    """Return the id of a grade's Minari data set, its rows and its behaviour's mean return, or why there is none.

    Medium, expert and random: real episodes of the behaviour, actions sampled. Replay: the episodes in the data. One
    agent makes medium and replay, in one cell.
    """
    own: Json
    settings: Json = {"task": part.task.real_id, "rows": part.rows, "training": part.training}
    settings |= {"behaviour": part.behaviour, "seed": seed}
    work: Callable[..., Json]
    if grade == "random":
        made, own, work = [grade], {"grade": grade}, partial(_random, part)
    elif grade == "expert":
        made, own, work = [grade], {"grade": grade}, partial(_trained, part, None)
    else:
        made, own, work = ["medium", "replay"], {"goal": part.medium}, partial(_trained, part, part.medium)
    ids = {grade: f"learneddyn-table/{name.lower()}-{grade}-{seed}-v0" for grade in made}
    play = partial(cells.play, f"{name}, {made[0]} data", settings | own, partial(work, ids, seed))
    found = play()
    if FAILED not in found and not set(ids.values()) <= set(minari.list_local_datasets()):
        found = play(anew=True)
    return found if FAILED in found else found[grade]


def _random(part: Part, ids: dict[str, str], seed: int) -> Json:
    made = collect(part.task.real_id, ids["random"], steps=part.rows, seed=seed, progress=False, overwrite=True)
    return {"random": {"id": ids["random"], "rows": part.rows, "return": mean_return(made, part.task)}}


def _trained(part: Part, goal: float | None, ids: dict[str, str], seed: int) -> Json:
    real_id, name, kwargs = part.task.real_id, part.behaviour["algorithm"], part.behaviour["kwargs"]
    budget: Json = {"train_steps": part.training[goal is None], "goal": goal, "algorithm_kwargs": kwargs}
    try:
        agent = train(real_id, name, seed=seed, progress=False, **budget)
    except GradeNotReached as error:
        return {FAILED: f"GradeNotReached: {error}"}
    found = {}
    for grade, dataset_id in ids.items():
        if grade == "replay":
            data = agent.record[-part.rows :]
            save(data, dataset_id, env_id=real_id, algorithm=name, overwrite=True)
            earned = mean_return(data, part.task)
        else:
            acting: Any = {"behaviour": agent.policy, "algorithm": name, "overwrite": True}
            data = collect(real_id, dataset_id, steps=part.rows, seed=seed, progress=False, **acting)
            played = evaluate(
                agent.policy, real_id, episodes=part.episodes, seed=JUDGE_SEED + seed, deterministic=False
            )
            earned = played.mean
        found[grade] = {"id": dataset_id, "rows": len(data), "return": earned}
    return found


def mean_return(data: Transitions, task: Task) -> float:
    """Return the mean return of the episodes that the data hold to their end."""
    _, number, length = torch.unique_consecutive(data.episode, return_inverse=True, return_counts=True)
    returns = torch.zeros(len(length), dtype=torch.float64).index_add_(0, number, data.reward.double())
    whole = (length == task.max_episode_steps) | data.terminated[length.cumsum(0) - 1]
    return float(returns[whole].mean())


def methods(part: Part, name: str, grade: str, dataset_id: str, seed: int, home: Path, cells: Cells) -> Json:
    """Return the mean real return of every method on one data set, or why there is none."""
    where = f"{name} {grade}"
    data, folder = load(dataset_id), home / "models" / where.replace(" ", "-")
    basis = {"data": dataset_id, "rows": len(data), "earned": float(data.reward.sum())}
    fitting = basis | {"model": part.model}

    def fit() -> Json:
        model = ProbabilisticEnsemble(**part.model)
        report = model.fit(data, rng=generator(seed))
        model.save(folder)
        return dict(report.metrics)

    def judge(method: str, kind: type[offline.OfflineAlgorithm]) -> Json:
        own = part.arguments(method) | {"task": part.task, "seed": seed, "device": "cpu"}
        if method in MODEL_BASED:
            own["model"] = AbstractDynamics.load(folder)
        if "dynamics_reward" in own:
            own["dynamics_reward"] = offline.DynamicsReward(**own["dynamics_reward"])
        agent = kind("MlpPolicy", data, **own).learn(part.updates[method])
        played = evaluate(agent, part.task.real_id, episodes=part.episodes, seed=JUDGE_SEED + seed)
        return {"return": played.mean, "returns": played.returns.tolist()}

    if set(part.updates) & set(MODEL_BASED):
        cells.play(f"{where}, model", fitting, fit, anew=not surviving_folder(folder).exists())
    found: Json = {}
    for method, updates in part.updates.items():
        kind = kind_of(method)
        if kind is None:
            found[method] = {FAILED: "not part of the package yet"}
            continue
        settings = (fitting if method in MODEL_BASED else basis) | {"updates": updates, "own": part.arguments(method)}
        found[method] = cells.play(f"{where}, {method}", settings, partial(judge, method, kind))
    return found


Figures = dict[int, Json]


def score_of(figures: Figures, part: Part, name: str, grade: str, method: str) -> Estimate | None:
    """Return a method's normalised score over the seeds that it could play, None where there are none."""
    cells = [seed[name][grade][method] for seed in figures.values()]
    returns = [cell["return"] for cell in cells if FAILED not in cell]
    return bootstrap_interval(normalized_score(part.task.real_id, returns)) if returns else None


def reference_of(figures: Figures, part: Part, name: str, grade: str, kind: str = "behaviour") -> Estimate | None:
    """Return the normalised score over seeds of the behaviour, or of doing nothing ("idle"), None where unknown."""
    cells = [seed[name][grade] for seed in figures.values()]
    earned = [cell[kind] for cell in cells if kind in cell]
    return bootstrap_interval(normalized_score(part.task.real_id, earned)) if earned else None


def findings(parts: Parts, judged: Sequence[str], figures: Figures) -> list[Finding]:
    """Judge the best model-based method against BC and behaviour on the sets of these names; report all others.

    A set with cells that have not been played yet is reported, not judged.
    """
    rows = []
    for name, part in parts.items():
        for grade in part.grades:
            where, lost = f"{name} {grade}", _without_data(figures, name, grade)
            scores = {method: score_of(figures, part, name, grade, method) for method in part.updates}
            based = {method: score for method, score in scores.items() if score and method in MODEL_BASED}
            levels = {
                "the behaviour": reference_of(figures, part, name, grade),
                "no action": reference_of(figures, part, name, grade, "idle"),
                "BC": scores["BC"],
            }
            whole = not any(_count(figures, name, grade, method, unplayed=True) for method in part.updates)
            judge = whole and where in judged
            if lost:
                what = f"{where}: seeds without data ({'; '.join(sorted(set(lost)))})"
                rows.append(
                    Finding(what, _number(len(lost)), "none" if judge else "reported", False if judge else None)
                )
            if based:
                method = max(based, key=lambda method: based[method].value)
                best = based[method]
                bar = max(level.high for level in levels.values() if level)
                bound = f"above BC, behaviour and no action, {bar:.4g}"
                what = f"{where}: score of the best model-based method, {method}"
                held = bool(best.low > bar) if judge else None
                rows.append(Finding(what, best, bound if judge else f"reported ({bound}?)", held))
            elif judge:
                rows.append(Finding(f"{where}: model-based methods with a score", _number(0), "at least 1", False))
            for level, score in levels.items():
                if score:
                    rows.append(Finding(f"{where}: score of {level}", score, "reported", None))
    return rows


def _number(count: int) -> Estimate:
    return Estimate(count, -np.inf, np.inf)


def _without_data(figures: Figures, name: str, grade: str) -> list[str]:
    """Return, for every seed whose data could not be made, why."""
    reasons = [seed[name][grade].get(FAILED, UNPLAYED) for seed in figures.values()]
    return [reason for reason in reasons if reason != UNPLAYED]


def table(parts: Parts, figures: Figures) -> str:
    """Return all scores as a Markdown table: a row per data set, a column per method."""
    lines = [
        "| data set | rows | behaviour | no action | " + " | ".join(METHODS) + " |",
        "|---" * (4 + len(METHODS)) + "|",
    ]
    for name, part in parts.items():
        for grade in part.grades:
            counts = sorted({seed[name][grade]["rows"] for seed in figures.values() if "rows" in seed[name][grade]})
            cells = [f"{name} {grade}", "-".join(map(str, counts[:: max(1, len(counts) - 1)]))]
            for kind in ("behaviour", "idle"):
                score = reference_of(figures, part, name, grade, kind)
                cells.append(_short(score) if score else "")
            for method in METHODS:
                if method not in part.updates:
                    cells.append("")
                    continue
                score = score_of(figures, part, name, grade, method)
                failed, unplayed = (_count(figures, name, grade, method, unplayed=kind) for kind in (False, True))
                told = [_short(score)] if score else []
                told += [f"**failed** {failed}x"] if failed else []
                cells.append(" ".join(told + ([f"{UNPLAYED} {unplayed}x"] if unplayed else [])))
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _count(figures: Figures, name: str, grade: str, method: str, *, unplayed: bool) -> int:
    """Return the seeds in which a method failed, or in which it has not been played yet."""
    reasons = [seed[name][grade][method].get(FAILED) for seed in figures.values()]
    return sum(reason is not None and (reason == UNPLAYED) is unplayed for reason in reasons)


def _short(score: Estimate) -> str:
    value, low, high = (f"{number:.1f}" for number in score)
    return value if len({value, low, high}) == 1 or "inf" in high else f"{value} [{low}, {high}]"


def draw(parts: Parts, figures: Figures) -> Figure:
    """Show every method's score as a bar with its interval, the seeds as dots, behaviour and idleness as lines."""
    sets = [(name, grade) for name, part in parts.items() for grade in part.grades]
    figure, axes = panels(len(sets), width=2.3, height=3.2)
    for ax, (name, grade) in zip(axes, sets, strict=True):
        part = parts[name]
        methods = [method for method in METHODS if method in part.updates]
        if behaviour := reference_of(figures, part, name, grade):
            if np.isfinite(behaviour.low):  # one seed alone has no interval
                ax.axhspan(behaviour.low, behaviour.high, color="grey", alpha=0.25, linewidth=0)
            ax.axhline(behaviour.value, color="grey", linewidth=1)
        if idle := reference_of(figures, part, name, grade, "idle"):
            ax.axhline(idle.value, color="grey", linewidth=1, linestyle=":")
        for place, method in enumerate(methods):
            colour = "tab:blue" if method in MODEL_BASED else "tab:grey"
            if score := score_of(figures, part, name, grade, method):
                ax.bar(place, score.value, color=colour, alpha=0.6)
                if np.isfinite(score.low):
                    ax.vlines(place, score.low, score.high, color="black", linewidth=1)
                cells = [seed[name][grade][method] for seed in figures.values()]
                returns = [cell["return"] for cell in cells if FAILED not in cell]
                scores = normalized_score(part.task.real_id, returns)
                ax.plot([place] * len(returns), scores, ".", color="black", markersize=3)
            for unplayed, told, ink in ((True, UNPLAYED, "0.3"), (False, "failed", "tab:red")):
                if _count(figures, name, grade, method, unplayed=unplayed):
                    ax.text(place, 2, told, rotation=90, ha="center", va="bottom", fontsize=6, color=ink)
        ax.set_xticks(range(len(methods)), methods, rotation=90, fontsize=7)
        ax.set_xlim(-0.7, len(methods) - 0.3)
        ax.set_ylim(-5, 112)
        ax.set_title(f"{name}\n{grade}", fontsize=8)
        ax.grid(axis="y", alpha=0.3)
    axes[0].set_ylabel("normalised score\n(line: behaviour, dotted: no action)", fontsize=8)
    return figure


def setting(parts: Parts) -> str:
    """Say what is run, from the settings themselves."""
    told = [
        "Every seed trains its own behaviour agents, fits its own models and judges the last policy (no checkpoint is "
        "chosen); all model-based methods of a grade and seed share one model. Scores: 0 random, 100 expert, see "
        "learneddyn.data.scores; no action is the middle of the range throughout."
    ]
    for name, part in parts.items():
        budgets = ", ".join(f"{method} {updates:,}" for method, updates in part.updates.items())
        told.append(
            f"{name}: {part.task.real_id}; grades {', '.join(part.grades)} of {part.rows:,} rows (replay: the record "
            f"of training the medium agent, if shorter; {part.behaviour['algorithm']} until a mean return of "
            f"{part.medium:g}); updates: {budgets}; weight of MOPO's and MOREC's penalty (ensemble_std), the same for "
            f"all grades: {part.own['MOPO']['penalty_weight']}; {part.episodes} real episodes of the last policy."
        )
    return " ".join(told)


def claim_of(name: str, parts: Parts, measure: Measure, judged: Sequence[str], claim: str, notes: str) -> Claim:
    """Return the experiment that plays these tasks."""
    return Claim(
        name=name,
        paper="Yu et al., MOPO, 2020; Sun et al., MOBILE, 2023; Sims et al., RAVL, 2024; Luo et al., MOREC, 2024; and "
        "the model-free Fujimoto, Gu, TD3+BC, 2021; Kostrikov et al., IQL, 2021; An et al., EDAC, 2021",
        claim=claim,
        setting=setting(parts),
        measure=measure,
        findings=partial(findings, parts, judged),
        draw=partial(draw, parts),
        table=partial(table, parts),
        notes=notes,
        cells=True,
    )


CLAIM = claim_of(
    "offline_table",
    PARTS,
    measure,
    ("Reacher medium", "Reacher replay"),
    "A policy optimised inside a model of the log surpasses the policy that wrote the log, and its clone.",
    "Standing still beats a policy that wastes torque: no action is the level to compare with, not 0. The best of "
    "several methods is chosen by the figure that is shown, so its interval is a little too good. For the CPU's sake "
    "EDAC and RAVL have 5 critics (10 in their sources) and MOBILE draws 2 next states per elite (10). MOREC does not "
    "halt here: rewards are negative, so that a halt would be a way out.",
)
