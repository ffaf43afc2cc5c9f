"""Search settings with Optuna: propose, play side by side, keep every finished trial, go on after a kill.

A sweep is a folder: ``study.journal`` (Optuna's storage), ``trial-N/`` for whatever a trial keeps while it is played,
``trials.json``, ``summary.md`` and ``sweep.png``. A trial that was being played when the sweep was killed is played
again with the same settings, from its own checkpoints.

With ``ray=True`` the trials are played by Ray Tune, on the cores of this machine or of the cluster that
``RAY_ADDRESS`` names; the folder must then be on a file system that all its machines share.
"""

import importlib
import json
import math
import multiprocessing
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from tqdm import tqdm

from learneddyn.core import Json
from learneddyn.files import replace_file, write_file
from learneddyn.runs.claims import panels
from learneddyn.runs.seeds import begin_worker, one_thread

Play = Callable[[Json, Path], float]
"""One trial: (settings, folder for its checkpoints) -> what is to be maximised. A function of a module: it pickles."""
SAMPLERS = ("tpe", "gp", "random")


class Trial(NamedTuple):
    """A finished trial: its settings, and its value or why it has none."""

    number: int
    settings: Json
    value: float | None
    failed: str = ""


def run_sweep(
    space: Mapping[str, Any],
    play: Play,
    folder: Path,
    *,
    trials: int,
    sampler: str = "tpe",
    workers: int | None = None,
    seed: int = 0,
    ray: bool = False,
    progress: bool = True,
) -> list[Trial]:
    """Play trials until there are ``trials`` of them, and return all, in the order of their numbers.

    A trial that raises ValueError or ArithmeticError (settings that go together with no model, a loss that is not
    finite) has failed; anything else ends the sweep, and the trial is played again on resume.

    Args:
        space: what is searched, by name: a list of choices, or ``{low, high}`` with ``log`` and ``step`` if wanted;
            whole numbers give whole numbers.
        play: one trial.
        folder: of the sweep, made if missing.
        trials: in all, those of an earlier run among them.
        sampler: "tpe" (tree of Parzen estimators), "gp" (Bayesian optimisation with a Gaussian process) or "random".
        workers: trials at once, by default one per core.
        seed: of the sampler.
        ray: play the trials with Ray Tune.
        progress: show a progress bar.

    Raises:
        ImportError: Optuna or Ray is missing; names the extra.
        ValueError: an empty or unreadable space, an unknown sampler, or a number below 1.
    """
    optuna = _extra("optuna", "sweep")
    distributions = check_sweep(space, trials=trials, sampler=sampler, workers=workers, ray=ray)
    study = open_study(folder, sampler, seed)
    asked = []
    for trial in study.get_trials(states=[optuna.trial.TrialState.RUNNING]):
        if set(trial.params) == set(distributions):
            asked.append(trial)
        else:  # killed while its settings were drawn
            study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
    done = len(study.trials) - len(asked)
    with tqdm(total=trials, initial=done, unit="trial", disable=not progress) as bar:

        def ask() -> tuple[int, Json] | None:
            """Return the next trial: one that was killed, a new one, or None when there are enough."""
            if asked:
                trial = asked.pop()
                return trial.number, trial.params
            if len(study.trials) >= trials:
                return None
            fresh = study.ask(distributions)
            return fresh.number, fresh.params

        def tell(number: int, value: float | None, failed: str) -> None:
            if value is not None and np.isfinite(value):
                study.tell(number, value)
            else:
                study.set_user_attr(f"failed {number}", failed or f"the value is {value}")
                study.tell(number, state=optuna.trial.TrialState.FAIL)
            replace_file(folder / "trials.json", json.dumps([trial._asdict() for trial in trials_of(study)]).encode())
            bar.update()
            bar.set_postfix_str(f"best {_best(study)}")

        (_play_by_ray if ray else _play_here)(ask, tell, play, folder, workers or os.cpu_count() or 1)
    return trials_of(study)


def check_sweep(
    space: Mapping[str, Any], *, trials: int, sampler: str = "tpe", workers: int | None = None, ray: bool = False
) -> dict[str, Any]:
    """Return Optuna's distributions of a space: call it before anything is spent on a sweep; see `run_sweep`.

    Raises:
        ImportError: Optuna or Ray is missing; names the extra.
        ValueError: an empty or unreadable space, a range without end or turned round, an unknown sampler, or a number
            below 1.
    """
    _extra("optuna", "sweep")
    if sampler == "gp":
        _extra("scipy", "sweep")
    if ray:
        _extra("ray.tune", "ray")
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, got {sampler!r}")
    if trials < 1 or (workers is not None and workers < 1):
        raise ValueError(f"trials and workers must be at least 1, got trials={trials}, workers={workers}")
    if not space:
        raise ValueError("the space of a sweep must hold at least one setting, got {}")
    return {name: _distribution(name, entry) for name, entry in space.items()}


def open_study(folder: Path, sampler: str = "tpe", seed: int = 0) -> Any:
    """Return the Optuna study in a folder, a new one if there is none; it maximises.

    Raises:
        ImportError: Optuna is missing; names the extra.
    """
    optuna = _extra("optuna", "sweep")
    journal = _extra("optuna.storages.journal", "sweep")
    folder.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    path = folder / "study.journal"
    if path.exists() and not (content := path.read_bytes()).endswith(b"\n"):
        # A kill tore the last line, and Optuna would read nothing after it.
        replace_file(path, content[: content.rfind(b"\n") + 1])
    storage = optuna.storages.JournalStorage(journal.JournalFileBackend(str(path)))
    study = optuna.create_study(storage=storage, study_name="sweep", direction="maximize", load_if_exists=True)
    # A sampler that starts anew would draw its first proposals again.
    seed += 1000 * len(study.trials)
    samplers = optuna.samplers
    study.sampler = {
        "tpe": lambda: samplers.TPESampler(seed=seed, constant_liar=True),
        "gp": lambda: samplers.GPSampler(seed=seed),
        "random": lambda: samplers.RandomSampler(seed=seed),
    }[sampler]()
    return study


def trials_of(study: Any) -> list[Trial]:
    """Return the trials of a study that have ended."""
    notes = study.user_attrs
    return [
        Trial(trial.number, trial.params, trial.value, notes.get(f"failed {trial.number}", ""))
        for trial in study.trials
        if trial.state.is_finished()
    ]


def importances(study: Any) -> dict[str, float]:
    """Return the share of the value's variation that each setting explains (PED-ANOVA), {} if it cannot be told."""
    importance = _extra("optuna.importance", "sweep")
    values = {trial.value for trial in trials_of(study) if trial.value is not None}
    return (
        importance.get_param_importances(study, evaluator=importance.PedAnovaImportanceEvaluator())
        if len(values) >= 4
        else {}
    )


def write_summary(folder: Path, title: str, notes: Sequence[str], *, shown: int = 20) -> Path:
    """Write ``summary.md`` and ``sweep.png`` of the sweep in a folder, and return the first.

    Args:
        folder: of the sweep.
        title: headline.
        notes: sentences above the table: what is maximised, and by whom it was judged.
        shown: best trials in the table.
    """
    study = open_study(folder)
    ended = trials_of(study)
    ranked = sorted((trial for trial in ended if trial.value is not None), key=lambda trial: -(trial.value or 0.0))
    weights = importances(study)
    names = sorted({name for trial in ended for name in trial.settings})
    lines = [f"# {title}", "", *notes, "", f"{len(ended)} trials, {len(ended) - len(ranked)} of them failed.", ""]
    lines += ["| trial | value | " + " | ".join(names) + " |", "|---" * (2 + len(names)) + "|"]
    for trial in ranked[:shown]:
        cells = (f"{trial.settings.get(name, ''):.4g}" if isinstance(trial.settings.get(name), float)
                 else str(trial.settings.get(name, "")) for name in names)  # fmt: skip
        lines.append(f"| {trial.number} | {trial.value:.5g} | " + " | ".join(cells) + " |")
    if weights:
        lines += ["", "Importance (PED-ANOVA): " + ", ".join(f"{name} {share:.2f}" for name, share in weights.items())]
    lines += [f"- trial {trial.number} failed: {trial.failed}" for trial in ended if trial.value is None]
    lines += ["", "![values by trial, importance of settings](sweep.png)", ""]
    _draw(folder / "sweep.png", ended, weights)
    write_file(folder / "summary.md", "\n".join(lines).encode())
    return folder / "summary.md"


def _draw(path: Path, ended: Sequence[Trial], weights: Mapping[str, float]) -> None:
    figure, (history, bars) = panels(2, width=4.0)
    played = [(trial.number, trial.value) for trial in ended if trial.value is not None]
    if played:
        numbers, values = zip(*played, strict=True)
        history.plot(numbers, values, "o", color="tab:blue", markersize=4, alpha=0.7)
        history.step(
            numbers, np.maximum.accumulate(values), where="post", color="black", linewidth=1, label="best so far"
        )
        history.legend(frameon=False, fontsize=7)
    history.set(xlabel="trial", ylabel="value")
    bars.barh(range(len(weights)), list(weights.values()), color="tab:blue", alpha=0.6)
    bars.set_yticks(range(len(weights)), [name.rpartition(".")[2] for name in weights], fontsize=7)
    bars.set(xlabel="importance (PED-ANOVA)", xlim=(0, 1))
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=130)


def _play_here(ask: Any, tell: Any, play: Play, folder: Path, workers: int) -> None:
    """Play trials in processes of this machine, as many at once as ``workers``; one worker is this process."""
    if workers == 1:
        with one_thread():
            while (given := ask()) is not None:
                tell(given[0], *_played(play, given[1], folder / f"trial-{given[0]}"))
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, begin_worker) as pool:
        running: dict[Future[tuple[float | None, str]], int] = {}
        while True:
            while len(running) < workers and (given := ask()) is not None:
                running[pool.submit(_played, play, given[1], folder / f"trial-{given[0]}")] = given[0]
            if not running:
                return
            ended, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in ended:
                tell(running.pop(future), *future.result())


def _play_by_ray(ask: Any, tell: Any, play: Play, folder: Path, workers: int) -> None:
    """Let Ray Tune play the trials; it asks for each and is told by the study here, so that a kill loses none."""
    tune, search = _extra("ray.tune", "ray"), _extra("ray.tune.search", "ray")

    class Asked(search.Searcher):  # type: ignore[name-defined, misc]
        """The study, as Ray Tune sees it."""

        def suggest(self, trial_id: str) -> Any:
            given = ask()
            return search.Searcher.FINISHED if given is None else {"number": given[0], "settings": given[1]}

        def on_trial_complete(self, trial_id: str, result: Json | None = None, error: bool = False) -> None:
            if result and not error:
                value = result["value"]
                tell(result["number"], None if np.isnan(value) else value, result["failed"])

    limited = search.ConcurrencyLimiter(Asked(metric="value", mode="max"), max_concurrent=workers)
    config = tune.TuneConfig(search_alg=limited, num_samples=-1, metric="value", mode="max")
    outcome = tune.Tuner(
        tune.with_resources(tune.with_parameters(_ray_trial, play=play, home=folder.resolve()), {"cpu": 1}),
        tune_config=config,
        run_config=tune.RunConfig(storage_path=str(folder.resolve() / "ray"), verbose=0),
    ).fit()
    if outcome.errors:
        raise RuntimeError(f"{len(outcome.errors)} trials ended in an error, the first: {outcome.errors[0]}")


def _ray_trial(config: Json, play: Play, home: Path) -> Json:
    """Play one trial on a machine of the cluster."""
    value, failed = _played(play, config["settings"], home / f"trial-{config['number']}")
    return {"number": config["number"], "value": float("nan") if value is None else value, "failed": failed}


def _played(play: Play, settings: Json, folder: Path) -> tuple[float | None, str]:
    """Play one trial; runs in a process of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return float(play(settings, folder)), ""
    except (ValueError, ArithmeticError) as error:
        return None, f"{type(error).__name__}: {error}"


def _best(study: Any) -> str:
    values = [trial.value for trial in trials_of(study) if trial.value is not None]
    return f"{max(values):.4g}" if values else "none"


def _distribution(name: str, entry: Any) -> Any:
    distributions = _extra("optuna.distributions", "sweep")
    if isinstance(entry, list) and entry:
        return distributions.CategoricalDistribution(entry)
    if not isinstance(entry, Mapping) or not {"low", "high"} <= set(entry) <= {"low", "high", "log", "step"}:
        raise ValueError(f"{name} must be a list of choices, or low and high with log or step, got {entry!r}")
    numbers = {key: entry[key] for key in ("low", "high", "step") if entry.get(key) is not None}
    for key, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
            raise ValueError(f"{name}: {key} must be a finite number, got {number!r}")
    whole = all(isinstance(number, int) for number in numbers.values())
    kind = distributions.IntDistribution if whole else distributions.FloatDistribution
    try:
        return kind(**entry)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _extra(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{module.partition('.')[0]} is not installed: pip install 'learneddyn[{extra}]'") from error
