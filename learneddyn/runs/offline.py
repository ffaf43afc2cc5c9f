"""Learn from a log, judge in the real environment, and go on after a kill as if nothing had happened.

A run of one seed is a folder: ``curve.json`` (one mark per judgement), ``checkpoint/`` (agent and imagined rows),
``best.zip`` (where the best checkpoint is asked for), ``agent.zip`` (the policy that is reported), ``result.json`` and
SB3's logs.

Two protocols say which policy is reported. *last*: that of the last update. *best*: that of the judgement with the
highest return; the real environment then decided, and the figure is no result of learning offline. Either is judged on
fresh episodes, which decided nothing.

A log of a plant that nobody can simulate is learned from as well. Nothing is judged then, and the report says so.
"""

import importlib.util
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import KVWriter, configure

from learneddyn.core import Json
from learneddyn.data.replay import Replay
from learneddyn.data.scores import REFERENCES, normalized_score
from learneddyn.evaluation import evaluate
from learneddyn.evaluation.stats import Estimate, bootstrap_interval
from learneddyn.files import replace_file, replaced_folder, surviving_folder, write_file
from learneddyn.runs.claims import panels, told
from learneddyn.runs.marks import draw_marks, read_marks, write_marks
from learneddyn.runs.seeds import Notify, silent

Protocol = Literal["last", "best"]
JUDGE_SEED, FRESH_SEED = 10_000, 20_000
"""Added to the seed: episodes of the judgements on the way, and of the reported policy."""
LAST_MARKS = 10
UNJUDGED = (
    "**Nothing was judged**: no environment was at hand, and what the policies (`seed-N/agent.zip`) earn in the plant "
    "is unknown. Estimates from the log alone, none of them a bound on the truth: `learneddyn.offline.rank`."
)


class Mark(NamedTuple):
    """One judgement: updates done, returns of the deterministic policy, CPU seconds of learning, logged figures.

    Without an environment there are no returns.
    """

    updates: int
    returns: list[float]
    cpu_seconds: float
    figures: dict[str, float]

    @property
    def mean(self) -> float:
        """Mean return, NaN where nothing was judged."""
        return sum(self.returns) / len(self.returns) if self.returns else math.nan


class Outcome(NamedTuple):
    """What a seed ends with: protocol, updates of the reported policy, its returns on fresh episodes, all marks.

    Without an environment there are no returns.
    """

    protocol: str
    updates: int
    returns: list[float]
    marks: list[Mark]

    @property
    def mean(self) -> float:
        """Mean return of the reported policy."""
        return sum(self.returns) / len(self.returns)

    @property
    def last_marks(self) -> float:
        """Mean return of the last ten judgements, which many papers report."""
        return float(np.mean([mark.mean for mark in self.marks[-LAST_MARKS:]]))


def learn_offline(
    make: Callable[[], BaseAlgorithm],
    load: Callable[[Path], BaseAlgorithm],
    env_id: str | None,
    folder: Path,
    *,
    updates: int,
    judge_every: int = 10_000,
    episodes: int = 10,
    fresh_episodes: int = 20,
    protocol: str = "last",
    env_kwargs: Json | None = None,
    seed: int = 0,
    device: str = "cpu",
    notify: Notify = silent,
) -> Outcome:
    """Do ``updates`` updates, judge every ``judge_every`` of them and at the end, and judge the reported policy.

    A folder that holds a checkpoint is gone on with; marks after it are made again. The result is that of a run that
    was never interrupted, as far as the agent's own file holds all of its state.

    Args:
        make: a new agent with its data; one timestep is one update.
        load: the agent in a zip, with its data.
        env_id: Gymnasium id of the real environment; None where there is none to judge in.
        folder: of this seed, made if missing.
        updates: in all.
        judge_every: updates between two judgements (and checkpoints).
        episodes: per judgement on the way.
        fresh_episodes: that judge the reported policy.
        protocol: which policy is reported.
        env_kwargs: arguments of the environment.
        seed: of the judged episodes.
        device: of the agent.
        notify: told how far it is.

    Raises:
        ValueError: an unknown protocol, a number below 1, or the best policy asked for and no environment.
    """
    check_run(updates, judge_every, episodes, fresh_episodes, protocol, judged=env_id is not None)
    done = folder / "result.json"
    if done.exists():
        return _read(json.loads(done.read_text()))

    def play(policy: BaseAlgorithm, episodes: int, seed: int) -> list[float]:
        if env_id is None:
            return []
        played = evaluate(policy, env_id, episodes=episodes, seed=seed, env_kwargs=env_kwargs, device=device)
        return played.returns.tolist()

    marks = read_marks(folder, Mark)

    def judge(agent: BaseAlgorithm, figures: dict[str, float], spent: float) -> str:
        updates = agent.num_timesteps
        mark = Mark(updates, play(agent, episodes, JUDGE_SEED + seed), spent, figures)
        marks[:] = [mark for mark in marks if mark.updates < updates]
        best = max((earlier.mean for earlier in marks), default=-np.inf) if protocol == "best" else np.inf
        before = marks[-1].cpu_seconds if marks else 0.0
        marks.append(mark._replace(cpu_seconds=round(before + spent, 1)))
        write_marks(folder, marks)
        if protocol == "best" and mark.mean > best:
            agent.save(folder / ".best.new.zip")
            (folder / ".best.new.zip").replace(folder / "best.zip")
        return f"return {mark.mean:.4g}" if mark.returns else ""

    agent = train_offline(make, load, folder, updates=updates, save_every=judge_every, at_save=judge, notify=notify)
    at = max(marks, key=lambda mark: mark.mean).updates if protocol == "best" else updates
    reported = load(folder / "best.zip") if protocol == "best" else agent
    notify("judging the reported policy" if env_id else "saving", 1.0)
    fresh = play(reported, fresh_episodes, FRESH_SEED + seed)
    reported.save(folder / "agent.zip")
    outcome = Outcome(protocol, at, fresh, marks)
    entry = outcome._asdict() | {"marks": [mark._asdict() for mark in marks]}
    replace_file(done, json.dumps(entry).encode())
    return outcome


AtSave = Callable[[BaseAlgorithm, dict[str, float], float], str]
"""Called before a checkpoint: (agent, latest logged figures, CPU seconds since the last one) -> words to show."""


def train_offline(
    make: Callable[[], BaseAlgorithm],
    load: Callable[[Path], BaseAlgorithm],
    folder: Path,
    *,
    updates: int,
    save_every: int,
    at_save: AtSave | None = None,
    notify: Notify = silent,
) -> BaseAlgorithm:
    """Do ``updates`` updates with a checkpoint every ``save_every`` of them and at the end, and return the agent.

    A folder that holds a checkpoint is gone on with. No environment is needed.

    Args:
        make: a new agent with its data; one timestep is one update.
        load: the agent in a zip, with its data.
        folder: made if missing.
        updates: in all.
        save_every: updates between two checkpoints.
        at_save: called before each.
        notify: told how far it is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    notify("preparing", 0.0)
    agent = restored(load, folder) if surviving_folder(folder / "checkpoint").exists() else make()
    begun = agent.num_timesteps
    if begun < updates:
        saver = _Saver(folder, updates, save_every, at_save, notify)
        for mark in read_marks(folder, Mark):
            # What is logged once, such as the fit of the model, was logged before the kill.
            saver.latest.figures |= mark.figures if mark.updates <= begun else {}
        sinks = ["csv", "tensorboard"] if importlib.util.find_spec("tensorboard") else ["csv"]
        with closing(configure(str(folder / f"log-{begun}"), sinks)) as logger:
            logger.output_formats.append(saver.latest)
            agent.set_logger(logger)
            agent.learn(updates - begun, saver, log_interval=min(1000, save_every), reset_num_timesteps=begun == 0)
    return agent


def restored(load: Callable[[Path], BaseAlgorithm], folder: Path) -> BaseAlgorithm:
    """Return the agent of the last checkpoint of a seed, with what it had imagined.

    Args:
        load: the agent in a zip, with its data.
        folder: of the seed.

    Raises:
        FileNotFoundError: there is no checkpoint.
    """
    kept = surviving_folder(folder / "checkpoint")
    agent = load(kept / "agent.zip")
    if isinstance(imagined := getattr(agent, "imagined", None), Replay):
        imagined.become(Replay.load(kept / "imagined", agent.device))
    return agent


def check_run(
    updates: int, judge_every: int, episodes: int, fresh_episodes: int, protocol: str, *, judged: bool = True
) -> None:
    """Make sure of the settings of a run before anything is spent on it.

    Raises:
        ValueError: an unknown protocol, a number below 1, or the best policy asked for where nothing is judged.
    """
    numbers = {"updates": updates, "judge_every": judge_every, "episodes": episodes, "fresh_episodes": fresh_episodes}
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if protocol not in get_args(Protocol):
        raise ValueError(f"protocol must be one of {', '.join(get_args(Protocol))}, got {protocol!r}")
    if protocol == "best" and not judged:
        raise ValueError("protocol 'best' asks the real environment for its choice: without one it must be 'last'")


def summary(outcomes: Mapping[int, Outcome]) -> Estimate:
    """Return the mean return of the reported policies: over seeds, or over the episodes of the only one."""
    means = [outcome.mean for outcome in outcomes.values()]
    return bootstrap_interval(means if len(means) > 1 else next(iter(outcomes.values())).returns)


def write_offline_report(
    folder: Path, title: str, env_id: str | None, outcomes: Mapping[int, Outcome], settings: Json, notes: Sequence[str]
) -> Path:
    """Write ``report.md`` and, of judged policies, ``curve.png`` of a run, and return the report.

    Args:
        folder: of the run.
        title: its headline.
        env_id: Gymnasium id of the real environment, None where nothing was judged; scores are normalised where its
            references are known.
        outcomes: by seed.
        settings: plain JSON, printed at the end.
        notes: sentences above the table, for example on how a penalty was weighted.
    """
    lines = [f"# {title}", ""]
    if env_id is None:
        lines += [UNJUDGED, *notes, ""]
    else:
        lines += [*_judged(env_id, outcomes, notes), "", "![returns on the way](curve.png)", ""]
        _draw(folder / "curve.png", title, outcomes)
    lines += ["## What the learner logged last, mean over seeds", ""]
    figures = [outcome.marks[-1].figures for outcome in outcomes.values()]
    for name in sorted(set.intersection(*(set(entry) for entry in figures))):
        lines.append(f"- `{name}` {np.mean([entry[name] for entry in figures]):.4g}")
    lines += ["", "## Settings", "", "```json", json.dumps(settings, indent=2), "```", ""]
    write_file(folder / "report.md", "\n".join(lines).encode())
    return folder / "report.md"


def _judged(env_id: str, outcomes: Mapping[int, Outcome], notes: Sequence[str]) -> list[str]:
    """Return what the report says of policies that were judged."""
    scored = env_id in REFERENCES and REFERENCES[env_id].expert is not None
    first, over = next(iter(outcomes.values())), "seeds" if len(outcomes) > 1 else "episodes"
    whole = summary(outcomes)
    lines = [f"Return in {env_id}: **{told(whole)}** (95 % bootstrap interval over {over})."]
    if scored:
        score = Estimate(*(normalized_score(env_id, value) for value in whole))
        lines[-1] += f" Normalised score: **{told(score)}** (0: random, 100: expert; learneddyn.data.scores)."
    reported = {
        "last": "Protocol *last*: the policy of the last update, judged on fresh episodes.",
        "best": "Protocol *best*: the checkpoint with the highest return on the way, judged on fresh episodes. "
        "The real environment chose it, so this is no score of learning offline.",
    }
    lines += ["", reported[first.protocol], *notes, ""]
    lines += ["| seed | return | score | at update | last ten judgements |", "|---|---|---|---|---|"]
    for seed, outcome in outcomes.items():
        mean = bootstrap_interval(outcome.returns)
        normal = f"{normalized_score(env_id, outcome.mean):.1f}" if scored else ""
        lines.append(f"| {seed} | {told(mean)} | {normal} | {outcome.updates} | {outcome.last_marks:.4g} |")
    return lines


def _draw(path: Path, title: str, outcomes: Mapping[int, Outcome]) -> None:
    figure, (ax,) = panels()
    draw_marks(ax, {seed: outcome.marks for seed, outcome in outcomes.items()}, title, "updates")
    for line, outcome in zip(list(ax.lines), outcomes.values(), strict=True):
        ax.plot(outcome.updates, outcome.mean, "o", color=line.get_color(), markersize=4)
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=130)


def _read(entry: Json) -> Outcome:
    return Outcome(**entry | {"marks": [Mark(**mark) for mark in entry["marks"]]})


def _saved(agent: BaseAlgorithm, folder: Path) -> None:
    """Write a checkpoint; imagined rows are part of it, or the agent would imagine others."""
    with replaced_folder(folder) as fresh:
        agent.save(fresh / "agent.zip")
        if isinstance(imagined := getattr(agent, "imagined", None), Replay):
            imagined.save(fresh / "imagined")


class _Latest(KVWriter):
    """Keeps the latest of every logged number."""

    def __init__(self) -> None:
        self.figures: dict[str, float] = {}

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        """Take one line of the log; the run's time is no figure of the learner."""
        numbers = {key: float(value) for key, value in key_values.items() if isinstance(value, int | float | np.number)}
        self.figures |= {key: value for key, value in numbers.items() if not key.startswith("time/")}

    def close(self) -> None:
        """Do nothing."""


class _Saver(BaseCallback):
    """Saves after every so many updates."""

    def __init__(self, folder: Path, updates: int, every: int, at_save: AtSave | None, notify: Notify) -> None:
        super().__init__()
        self.folder, self.updates, self.every, self.at_save, self.notify = folder, updates, every, at_save, notify
        self.latest, self.begun = _Latest(), time.process_time()

    def _on_step(self) -> bool:
        done = self.num_timesteps
        if done % self.every == 0 or done == self.updates:
            spent, words = time.process_time() - self.begun, ""
            if self.at_save is not None:
                words = self.at_save(self.model, dict(self.latest.figures), spent)
            _saved(self.model, self.folder / "checkpoint")
            self.notify(f"{done} updates" + (words and f": {words}"), done / self.updates)
            self.begun = time.process_time()
        return True
