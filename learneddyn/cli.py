"""The command line: one function a command, listed in `COMMANDS`. Only it reads configs.

Every command takes ``--config FILE`` or ``--config NAME`` (a preset that ships, see ``learneddyn list``) and overrides
on top of it; ``--print_config`` shows what it would run with. Unknown keys are errors.
"""

import inspect
import json
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from functools import cache, partial
from importlib import import_module
from importlib.resources import files
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import jsonargparse
import numpy as np
import torch
import yaml
from rich.console import Console
from rich.table import Table

from learneddyn import offline as learners
from learneddyn import reproduce as experiments
from learneddyn import tasks
from learneddyn.agents.pets import PETS, described
from learneddyn.core import DataError, Transitions, generator
from learneddyn.data import collect as collect_steps
from learneddyn.data import (
    collect_grade,
    decimate,
    from_csv,
    from_parquet,
    load,
    load_action_free,
    load_agent,
    save,
)
from learneddyn.data.grades import Grade, algorithms
from learneddyn.data.logs import Gaps, LastRow
from learneddyn.data.minari import check_free
from learneddyn.envs import check_settings, first_observations, load_world, save_world, world_names
from learneddyn.evaluation import Round
from learneddyn.evaluation.render import side_by_side
from learneddyn.files import replace_file, write_file
from learneddyn.models import AbstractDynamics, AbstractModel, InverseDynamics, ProbabilisticEnsemble
from learneddyn.offline import objectives
from learneddyn.offline.dataset import bounds
from learneddyn.offline.dataset import check as check_log
from learneddyn.offline.ss_orl import unlabelled
from learneddyn.planners import AbstractPlanner
from learneddyn.runs import (
    Notify,
    RoundsConfig,
    RunFolder,
    check_real_spaces,
    comparison,
    for_each_seed,
    judge_agent,
    read_rounds,
    run_rounds,
    train_in_world,
)
from learneddyn.runs.cells import Cells, file_stem
from learneddyn.runs.claims import publish, run_claim, told, verdict
from learneddyn.runs.offline import (
    Outcome,
    Protocol,
    check_run,
    learn_offline,
    restored,
    summary,
    train_offline,
    write_offline_report,
)
from learneddyn.runs.online import Mark, draw_curves, learn_online
from learneddyn.runs.report import report_runs
from learneddyn.runs.sweep import check_sweep, run_sweep, write_summary
from learneddyn.runs.trials import Trial, learn_trials

console = Console(width=None if sys.stdout.isatty() else 120)
_PRESETS = Path(str(files("learneddyn") / "configs"))


def collect(
    env_id: str,
    dataset_id: str,
    steps: int = 10_000,
    grade: Grade = "random",
    agent: str | None = None,
    algorithm: str = "SAC",
    algorithm_kwargs: dict[str, Any] | None = None,
    random_share: float = 0.0,
    epsilon: float = 0.0,
    noise: float = 0.0,
    train_steps: int = 1_000_000,
    fraction: float = 1 / 3,
    target_return: float | None = None,
    lanes: int = 8,
    seed: int = 0,
    env_kwargs: dict[str, Any] | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> None:
    """Collect real steps into a Minari data set: a grade (random, medium, expert, replay) or an agent of yours.

    Args:
        env_id: Gymnasium id of the real environment.
        dataset_id: of the data set to write, (namespace/)name-v0.
        steps: transitions.
        grade: random, or train an agent to medium or expert first, or keep what the medium agent saw (replay).
        agent: zip of a Stable-Baselines3 agent that acts instead of a grade.
        algorithm: of the agent, or the one that trains the grade.
        algorithm_kwargs: for the algorithm that trains the grade.
        random_share: share of the agent's episodes that the random policy plays.
        epsilon: probability of a random action at each of the agent's steps.
        noise: standard deviation of Gaussian noise on the agent's actions, as a share of half their range.
        train_steps: budget of real steps for training a grade.
        fraction: how far between random and expert return medium is.
        target_return: return that is medium, for environments without reference returns.
        lanes: environments side by side.
        seed: of everything.
        env_kwargs: arguments of the environment.
        overwrite: replace a data set of the same id.
        progress: show progress bars.
    """
    if agent is None:
        data = collect_grade(
            env_id,
            dataset_id,
            steps=steps,
            grade=grade,
            algorithm=algorithm,
            algorithm_kwargs=algorithm_kwargs,
            train_steps=train_steps,
            fraction=fraction,
            target_return=target_return,
            lanes=lanes,
            seed=seed,
            progress=progress,
            env_kwargs=env_kwargs,
            overwrite=overwrite,
        )
    else:
        policy = load_agent(algorithm, agent)
        mixture = [(1.0 - random_share, policy), (random_share, "random")]
        data = collect_steps(
            env_id,
            dataset_id,
            steps=steps,
            behaviour=[(share, acting) for share, acting in mixture if share > 0],
            epsilon=epsilon,
            noise=noise,
            lanes=lanes,
            seed=seed,
            progress=progress,
            env_kwargs=env_kwargs,
            algorithm=algorithm,
            overwrite=overwrite,
        )
    episodes = len(data.episode.unique())
    console.print(f"{dataset_id}: {len(data)} steps, {episodes} episodes, {float(data.reward.sum()) / episodes:.1f} "
                  "mean return (cut-off episodes included)")  # fmt: skip


def import_logs(
    files: list[str],
    dataset_id: str,
    obs: list[str] | None = None,
    action: list[str] | None = None,
    reward: str | None = None,
    terminated: str | None = None,
    episode: str | None = None,
    next_obs: list[str] | None = None,
    truncated: str | None = None,
    time: str | None = None,
    gaps: Gaps = "refuse",
    last_row: LastRow | None = None,
    discrete: bool | int = False,
    delimiter: str = ",",
    every: int = 1,
    episode_steps: int | None = None,
    env_id: str | None = None,
    overwrite: bool = False,
) -> None:
    """Turn measured logs, CSV or Parquet files, into a Minari data set that all other commands take.

    Args:
        files: one or several files, or folders of them; no episode goes on in the next file.
        dataset_id: of the data set to write, (namespace/)name-v0.
        obs: columns of the observation.
        action: columns of the action; none for a system that nobody acts on.
        reward: column of the reward; zeros without.
        terminated: column that is true where the step truly ended the episode.
        episode: column of the episode's number or name; without, each file is one, cut after terminated or truncated.
        next_obs: columns of the observation after the step, where the log has them.
        truncated: column that is true where an episode was cut off.
        time: column of time stamps, which must be evenly spaced within an episode.
        gaps: refuse a log with uneven time steps, or split its episodes there.
        last_row: what an episode's last row is (learneddyn.data.from_arrays): its final state, or a step to drop.
        discrete: the action is one column of integers; a number tells how many there are.
        delimiter: between the cells of a CSV file.
        every: join so many rows to one step, with the mean of their actions and the sum of their rewards.
        episode_steps: cut longer recordings into episodes of so many steps.
        env_id: Gymnasium id of an environment that the log is of.
        overwrite: replace a data set of the same id.
    """
    found = []
    for path in map(Path, files):
        inside = sorted(path.iterdir()) if path.is_dir() else [path]
        found += [each for each in inside if each == path or (each.is_file() and not each.name.startswith("."))]
    parquet = {path.suffix == ".parquet" for path in found}
    if len(parquet) != 1:
        raise ValueError(f"files must be all CSV or all Parquet, got {[path.name for path in found]}")
    if episode_steps is not None and episode_steps < 2:
        raise ValueError(f"episode_steps must be null or at least 2, got {episode_steps}")
    columns: dict[str, Any] = {"obs": obs or (), "action": action or (), "reward": reward, "terminated": terminated}
    columns |= {"episode": episode, "next_obs": next_obs, "truncated": truncated, "time": time}
    given = columns | {"gaps": gaps, "last_row": last_row, "discrete": discrete}
    data = from_parquet(found, **given) if parquet == {True} else from_csv(found, **given, delimiter=delimiter)
    data = decimate(data, every)
    if episode_steps is not None:
        piece = data.positions() // episode_steps
        data = replace(data, episode=data.episode * (int(piece.max()) + 1) + piece)
    save(data, dataset_id, env_id=env_id, description=f"imported from {', '.join(path.name for path in found)}",
         overwrite=overwrite)  # fmt: skip
    console.print(
        f"{dataset_id}: {len(data)} steps, {len(data.episode.unique())} episodes, {data.obs.shape[1]} columns of "
        f"observation, {data.action.shape[1]} of action, {int(data.terminated.sum())} terminations"
    )


def compare(
    dataset: list[str],
    out: str = "runs/compare",
    angles: list[int] | None = None,
    known: dict[str, dict[str, Any]] | None = None,
    max_rows: int = 10_000,
    seeds: list[int] | None = None,
    workers: int | None = None,
    resume: bool = False,
    progress: bool = True,
) -> None:
    """Fit every model class on your data and compare open-loop error, calibration and cost in one table.

    A fifth of the episodes judges. Fits are short, and no class is tuned to the data (learneddyn.runs.comparison).

    Args:
        dataset: ids of Minari data sets, each compared on its own; see ``learneddyn import`` for logs of yours.
        out: run folder; comparison.md and comparison.png show the result.
        angles: observation columns that are angles in radians.
        known: what is known of the system, arguments by class: {Hybrid: {prior: module.function, dt: 0.01}}.
        max_rows: take the first so many rows of a data set.
        seeds: of splits and fits, by default 0, 1, 2.
        workers: processes at once, by default one per core.
        resume: go on with the run in the folder.
        progress: show progress.
    """
    chosen, dataset = seeds or [0, 1, 2], _ids(dataset)
    comparison.check_known(known or {})
    settings = {"dataset": dataset, "angles": angles, "known": known, "max_rows": max_rows, "seeds": chosen}
    work = partial(_one_comparison, dataset, tuple(angles or ()), known or {}, max_rows, chosen, Path(out))
    _logs_of(dataset, tuple(angles or ()), {}, max_rows, chosen, chosen[0])  # mistakes must not cost a process
    folder = RunFolder(out, settings, resume=resume)
    figures = for_each_seed(work, chosen, workers=workers, progress=progress)
    path = comparison.write(folder.path, figures)
    for line in comparison.told_best(figures):
        console.print(line, soft_wrap=True)
    console.print(str(path), soft_wrap=True)


def fit(
    env_id: str,
    dataset: list[str],
    out: str = "runs/world",
    model: AbstractDynamics | None = None,
    sampler: str = "elite",
    bounds: dict[str, Any] | None = None,
    penalty: str | None = None,
    penalty_weight: float = 0.0,
    trust_margin: float | None = 0.5,
    halt_reward: float | None = None,
    horizon: int | None = None,
    start: Literal["task", "data", "data:first"] = "task",
    max_rows: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    progress: bool = True,
) -> None:
    """Fit a model on Minari data sets and write a world that gym.make opens.

    Args:
        env_id: Gymnasium id of the real environment; it gives task, start states and the judge.
        dataset: ids of Minari data sets of that environment.
        out: world folder to write; a world there is replaced.
        model: class path and arguments of the dynamics model, by default ProbabilisticEnsemble.
        sampler: mean, ts1, tsinf or elite.
        bounds: of imagined observations: low, high, unit_pairs and angles of learneddyn.world.Bounded.
        penalty: name of an uncertainty penalty on the reward.
        penalty_weight: reward units per penalty unit.
        trust_margin: widening of the data's box, as a share of each column's range; null trusts every step.
        halt_reward: reward of a step outside that box, which then terminates; null truncates there.
        horizon: steps of an episode; null is the task's time limit.
        start: where episodes begin.
        max_rows: fit on a random draw of so many rows.
        seed: of draw and fit.
        device: of the model.
        progress: show a progress bar.
    """
    if max_rows is not None and max_rows < 2:
        raise ValueError(f"max_rows must be null or at least 2, got {max_rows}")
    settings: dict[str, Any] = {
        "task": env_id,
        "sampler": sampler,
        "bounds": bounds,
        "penalty": penalty,
        "penalty_weight": penalty_weight,
        "trust_margin": trust_margin,
        "halt_reward": halt_reward,
        "horizon": horizon,
    }
    # A mistake in the settings must not cost a fit.
    check_settings(out, **settings, model=model)
    rng = generator(seed, device)
    data = load(dataset, device=device)
    if data.spaces is not None and _registered(env_id):
        check_real_spaces(env_id, data.spaces, f"the data {data.source!r}")
    if max_rows is not None and max_rows < len(data):
        data = data[torch.randperm(len(data), generator=rng, device=device)[:max_rows].sort().values]
    model = _default_model(env_id) if model is None else model
    report = model.to(device).fit(data, rng=rng, progress=progress)
    save_world(
        out,
        model,
        **settings,
        data=data,
        start={"task": None, "data": data.obs, "data:first": first_observations(data)}[start],
    )
    figures = ", ".join(f"{name} {value:.4g}" for name, value in report.metrics.items())
    console.print(f"{out}: {report.epochs} epochs in {report.seconds:.0f} s, {figures}")


def train(
    env_id: str,
    out: str = "runs/train",
    world: str | None = None,
    dataset: list[str] | None = None,
    grades: dict[str, int] | None = None,
    grade_kwargs: dict[str, Any] | None = None,
    model: AbstractDynamics | None = None,
    algorithm: str = "PPO",
    algorithm_kwargs: dict[str, Any] | None = None,
    imagined_steps: int = 200_000,
    lanes: int = 64,
    horizon: int | None = None,
    sampler: str = "elite",
    penalty: str | None = None,
    penalty_weight: float = 0.0,
    trust_margin: float | None = 0.5,
    halt_reward: float | None = None,
    start: Literal["task", "data", "data:first"] = "task",
    rounds: int = 1,
    real_steps: int = 1000,
    max_real_steps: int | None = None,
    target: float | None = None,
    episodes: int = 20,
    seeds: list[int] | None = None,
    seed: int = 0,
    workers: int | None = None,
    device: str = "cpu",
    resume: bool = False,
    progress: bool = True,
) -> None:
    """Train an agent inside a model only, and judge it in the real environment.

    With --world: in that world as it is. Otherwise: fit a model on --dataset (or on --grades collected on the spot),
    train in it, and with --rounds N act in the real environment, refit, and go on.

    Args:
        env_id: Gymnasium id of the real environment, the judge.
        out: run folder.
        world: name or folder of a world, or truth:ID for the simulator itself.
        dataset: ids of Minari data sets to fit on.
        grades: without a data set: real steps to collect per grade, such as {random: 1000}; each seed its own.
        grade_kwargs: further arguments for collecting them, such as algorithm, train_steps, target_return.
        model: class path and arguments of the dynamics model, by default ProbabilisticEnsemble.
        algorithm: name of a Stable-Baselines3 or sb3-contrib algorithm.
        algorithm_kwargs: for its constructor.
        imagined_steps: steps inside the model per round.
        lanes: imagined environments side by side.
        horizon: steps of an imagined episode; null is the task's time limit.
        sampler: mean, ts1, tsinf or elite.
        penalty: name of an uncertainty penalty on the reward.
        penalty_weight: reward units per penalty unit.
        trust_margin: widening of the data's box, as a share of each column's range; null trusts every step.
        halt_reward: reward of a step outside that box, which then terminates; null truncates there.
        start: where imagined episodes begin.
        rounds: of fit, imagine, judge at most.
        real_steps: steps the agent takes in the real environment between two rounds.
        max_real_steps: real steps to learn from in all.
        target: real mean return at which no further round is needed.
        episodes: real episodes per judgement.
        seeds: run several, side by side on the cores.
        seed: run one, where seeds is not given.
        workers: processes at once, by default one per core.
        device: of model and agent.
        resume: go on with the run in the folder.
        progress: show progress.
    """
    config = RoundsConfig(
        real_id=env_id,
        algorithm=algorithm,
        algorithm_kwargs=algorithm_kwargs or {},
        imagined_steps=imagined_steps,
        lanes=lanes,
        horizon=horizon,
        sampler=sampler,
        penalty=penalty,
        penalty_weight=penalty_weight,
        trust_margin=trust_margin,
        halt_reward=halt_reward,
        start=start,
        rounds=rounds,
        real_steps=real_steps,
        max_real_steps=max_real_steps,
        target=target,
        episodes=episodes,
    )
    if bool(world) + bool(dataset) + bool(grades) != 1:
        raise ValueError("give exactly one of --world, --dataset and --grades")
    if world is not None and rounds > 1:
        raise ValueError(f"--rounds {rounds} refits a model: give --dataset or --grades instead of --world")
    if world is not None:
        check_real_spaces(env_id, load_world(world, device).world.spaces, f"the world {world!r}")
    model = _default_model(env_id) if model is None else model
    chosen = seeds or [seed]
    kind = f"{type(model).__module__}.{type(model).__qualname__}"
    settings = asdict(config) | {
        "world": world,
        "dataset": dataset,
        "grades": grades,
        "grade_kwargs": grade_kwargs,
        "model": None if world else {"class": kind, "config": model.config()},
        "seeds": chosen,
    }
    folder = RunFolder(out, settings, resume=resume)
    work = partial(_one_seed, config, world, dataset, grades, grade_kwargs or {}, model, folder.path, device)
    results = for_each_seed(work, chosen, workers=workers, progress=progress)
    with console.status("writing the report"):
        path, final = report_runs(
            folder.path,
            config,
            chosen,
            title=f"{algorithm} in a learned {env_id}",
            settings=settings,
            world=world,
            device=device,
        )
    _print_rounds(results)
    for number, real in final.items():
        estimate = real.interval()
        console.print(
            f"seed {number}: final real return {estimate.value:.1f} [{estimate.low:.1f}, {estimate.high:.1f}] over "
            f"{len(real.returns)} fresh episodes of {env_id}"
        )
    console.print(f"report: {path}", soft_wrap=True)


def evaluate(
    world: str,
    agent: str,
    out: str = "runs/evaluate",
    algorithm: str = "PPO",
    episodes: int = 20,
    seed: int = 0,
    device: str = "cpu",
    resume: bool = False,
) -> None:
    """Judge an agent: real and imagined return, fidelity and calibration of the world; writes report.html.

    Args:
        world: name or folder of the world.
        agent: zip of a Stable-Baselines3 agent.
        out: run folder.
        algorithm: of the agent.
        episodes: real episodes.
        seed: of the judged episodes.
        device: of world and agent.
        resume: overwrite the report in the folder.
    """
    real_id = load_world(world, device).world.task.real_id
    load_agent(algorithm, agent, device)
    config = RoundsConfig(real_id=real_id, algorithm=algorithm, episodes=episodes)
    settings = {"world": world, "agent": agent, "algorithm": algorithm, "episodes": episodes, "seed": seed}
    folder = RunFolder(out, settings, resume=resume)
    results = {seed: judge_agent(config, world, Path(agent), folder.path / f"seed-{seed}", seed=seed, device=device)}
    path, _ = report_runs(
        folder.path, config, [seed], title=f"{algorithm} in {real_id}", settings=settings, world=world, device=device
    )
    _print_rounds(results)
    console.print(f"report: {path}", soft_wrap=True)


def render(
    world: str,
    agent: str | None = None,
    out: str = "runs/side_by_side.gif",
    algorithm: str = "PPO",
    steps: int = 200,
    closed_loop: bool = True,
    panel: int = 240,
    seed: int = 0,
    device: str = "cpu",
) -> None:
    """Write a GIF of imagination beside reality from the same start.

    Args:
        world: name or folder of the world.
        agent: zip of a Stable-Baselines3 agent; without one, random actions on both sides.
        out: the GIF.
        algorithm: of the agent.
        steps: longest episode shown.
        closed_loop: the agent acts on what it sees on each side; false replays the real side's actions on both.
        panel: side of a panel in pixels.
        seed: of start and world.
        device: of world and agent.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    loaded = load_world(world, device).world
    space = loaded.spaces.action
    space.seed(seed)
    if agent is None:
        from learneddyn.spaces import encode

        acting: Any = encode(space, [space.sample() for _ in range(steps)])
    else:
        acting = load_agent(algorithm, agent, device)
    side_by_side(
        acting,
        loaded,
        loaded.task.real_id,
        out,
        steps=steps,
        closed_loop=closed_loop,
        panel=panel,
        seed=seed,
        device=device,
    )
    console.print(out, soft_wrap=True)


def demo(
    task: str = "inverted-pendulum",
    seeds: list[int] | None = None,
    out: str | None = None,
    workers: int | None = None,
    device: str = "cpu",
    resume: bool = False,
) -> None:
    """Run the whole chain of a preset: collect real steps, fit, train inside the model only, judge on MuJoCo, refit.

    Args:
        task: a demo preset, see ``learneddyn list``.
        seeds: by default those of the preset.
        out: run folder, by default runs/demo-TASK.
        workers: processes at once, by default one per core.
        device: of model and agent.
        resume: go on with the run in the folder.
    """
    arguments = ["train", "--config", str(_preset("demo", task)), "--out", out or f"runs/demo-{task}"]
    arguments += ["--device", device, "--resume", str(resume).lower()]
    arguments += ["--seeds", str(seeds)] if seeds else []
    arguments += ["--workers", str(workers)] if workers else []
    main(arguments)


def mbpo(
    env_id: str,
    out: str = "runs/mbpo",
    steps: int = 100_000,
    model: AbstractDynamics | None = None,
    algorithm: Literal["MBPO", "COPlanner", "DynaTD3", "DynaTQC", "DynaCrossQ", "SINDyRL"] = "MBPO",
    algorithm_kwargs: dict[str, Any] | None = None,
    env_kwargs: dict[str, Any] | None = None,
    judge_every: int = 1000,
    episodes: int = 5,
    seeds: list[int] | None = None,
    seed: int = 0,
    workers: int | None = None,
    device: str = "cpu",
    resume: bool = False,
    progress: bool = True,
) -> None:
    """Learn in the real environment with a model of it: MBPO and its relatives. Killed runs go on with --resume.

    Args:
        env_id: Gymnasium id of the real environment.
        out: run folder; curve.png shows the returns so far.
        steps: real steps in all.
        model: class path and arguments of the dynamics model, by default the paper's ensemble.
        algorithm: MBPO learns by SAC, COPlanner too and plans its actions, SINDyRL in a sparse model; the others by
            TD3, TQC, CrossQ.
        algorithm_kwargs: for its constructor: those of learneddyn.agents.Dyna and of the algorithm itself.
        env_kwargs: arguments of the environment.
        judge_every: real steps between two judgements; each leaves a checkpoint.
        episodes: real episodes per judgement.
        seeds: run several, side by side on the cores.
        seed: run one, where seeds is not given.
        workers: processes at once, by default one per core.
        device: of model and agent.
        resume: go on with the run in the folder.
        progress: show progress.
    """
    chosen = seeds or [seed]
    given = {"env_id": env_id, "algorithm": algorithm, "algorithm_kwargs": algorithm_kwargs, "env_kwargs": env_kwargs}
    part = None if model is None else described(model)
    settings = given | {
        "steps": steps,
        "judge_every": judge_every,
        "episodes": episodes,
        "seeds": chosen,
        "model": part,
    }
    make = partial(_online_agent, algorithm, algorithm_kwargs or {}, model, device)
    with closing(gym.make(env_id, **env_kwargs or {})) as env:
        asked = make(chosen[0], env).work(steps)
    folder = RunFolder(out, settings, resume=resume)
    console.print(
        f"each seed: {steps} real steps, " + ", ".join(f"{number:.3g} {name}" for name, number in asked.items())
    )
    work = partial(_one_online, make, env_id, folder.path, steps, judge_every, episodes, env_kwargs, device)
    curves = for_each_seed(work, chosen, workers=workers, progress=progress)
    picture = draw_curves(folder.path / "curve.png", f"{algorithm} in {env_id}", curves)
    table = Table(title=f"{algorithm} in {env_id} after {steps} real steps: mean return of {episodes} episodes")
    for column in ("seed", "last", "best on the way", "at step"):
        table.add_column(column, justify="right")
    for number, marks in curves.items():
        best = max(marks, key=lambda mark: mark.mean)
        table.add_row(str(number), f"{marks[-1].mean:.1f}", f"{best.mean:.1f}", str(best.real_steps))
    console.print(table)
    console.print(str(picture), soft_wrap=True)


def pets(
    env_id: str,
    out: str = "runs/pets",
    steps: int = 3000,
    model: AbstractDynamics | None = None,
    planner: AbstractPlanner | None = None,
    particles: int = 20,
    sampler: Literal["tsinf", "ts1"] = "tsinf",
    random_trials: int = 1,
    env_kwargs: dict[str, Any] | None = None,
    seeds: list[int] | None = None,
    seed: int = 0,
    workers: int | None = None,
    device: str = "cpu",
    resume: bool = False,
    progress: bool = True,
) -> None:
    """Learn in a handful of trials: plan in an ensemble, act, fit it anew. Killed runs go on with --resume.

    Args:
        env_id: Gymnasium id of the real environment.
        out: run folder; seed-N/agent holds the agent after its last finished trial.
        steps: real steps in all.
        model: class path and arguments of the dynamics model, by default the paper's ensemble.
        planner: class path and arguments of the planner, by default the paper's CEM.
        particles: imagined futures per plan.
        sampler: tsinf keeps a particle's network, ts1 draws another at every step.
        random_trials: trials of random actions before the first fit.
        env_kwargs: arguments of the environment.
        seeds: run several, side by side on the cores.
        seed: run one, where seeds is not given.
        workers: processes at once, by default one per core.
        device: of model and planning.
        resume: go on with the run in the folder.
        progress: show progress.
    """
    chosen = seeds or [seed]
    arguments = {"particles": particles, "sampler": sampler, "random_trials": random_trials}
    parts = {name: None if part is None else described(part) for name, part in (("model", model), ("planner", planner))}
    settings = {"env_id": env_id, "env_kwargs": env_kwargs, "steps": steps, "seeds": chosen} | arguments | parts
    make = partial(_trial_agent, model, planner, arguments, device)
    with closing(gym.make(env_id, **env_kwargs or {})) as env:
        asked = make(chosen[0], env).work(steps)
    folder = RunFolder(out, settings, resume=resume)
    console.print(f"each seed: {steps} real steps, {asked['planned_steps']:.3g} planned_steps")
    work = partial(_one_pets, make, env_id, folder.path, steps, env_kwargs, device)
    played = for_each_seed(work, chosen, workers=workers, progress=progress)
    table = Table(title=f"PETS in {env_id}: return of every trial")
    table.add_column("real steps", justify="right")
    for number in played:
        table.add_column(f"seed {number}", justify="right")
    for trial in range(max(map(len, played.values()))):
        rows = [trials[trial] if trial < len(trials) else None for trials in played.values()]
        at = ", ".join(dict.fromkeys(str(row.real_steps) for row in rows if row))
        table.add_row(at, *(f"{row.earned:.1f}" if row else "" for row in rows))
    console.print(table)
    console.print(str(folder.path), soft_wrap=True)


def offline(
    agent: str | None = None,
    dataset: list[str] | str | None = None,
    env_id: str | None = None,
    out: str = "runs/offline",
    updates: int = 1_000_000,
    model: AbstractDynamics | None = None,
    agent_kwargs: dict[str, Any] | None = None,
    label_actions: bool | InverseDynamics = False,
    env_kwargs: dict[str, Any] | None = None,
    chosen_by: str | None = None,
    imagined: str | None = None,
    judge: bool = True,
    protocol: Protocol = "last",
    judge_every: int = 10_000,
    episodes: int = 10,
    fresh_episodes: int = 20,
    seeds: list[int] | None = None,
    seed: int = 0,
    workers: int | None = None,
    device: str = "cpu",
    resume: bool = False,
    progress: bool = True,
) -> None:
    """Learn from Minari data sets alone; the real environment, if any, judges the last policy. Killed runs go on.

    Args:
        agent: an offline learner, see ``learneddyn list``; upper case and signs do not matter.
        dataset: one or several ids of Minari data sets.
        env_id: Gymnasium id of the real environment, the judge, or of a task; null takes what the data set names.
        out: run folder; report.md and curve.png show the result.
        updates: gradient updates in all.
        model: class path and arguments of the dynamics model, for learners that have one.
        agent_kwargs: for the learner's constructor; {class: ..., config: {...}} makes an object of a class.
        label_actions: fill in actions that the data lack by inverse dynamics first (SS-ORL); true, or class path and
            arguments: {class_path: InverseDynamics, init_args: {past: 3}}.
        env_kwargs: arguments of the environment.
        chosen_by: what a sweep maximised when it chose these settings; the report says so.
        imagined: id of a Minari data set to write, of what the agent imagined last, with its provenance; of several
            seeds each gets its own, (namespace/)name-seed-1-v0. A run that has ended does so with ``resume``.
        judge: false where the plant has no simulator: policies are learned and saved, and nobody says what they earn.
        protocol: last reports the last policy; best reports the checkpoint that the real environment likes best.
        judge_every: updates between two judgements; each leaves a checkpoint.
        episodes: real episodes per judgement on the way.
        fresh_episodes: real episodes that judge the reported policy.
        seeds: run several, side by side on the cores.
        seed: run one, where seeds is not given.
        workers: processes at once, by default one per core.
        device: of the learner.
        resume: go on with the run in the folder.
        progress: show progress.
    """
    kind, kwargs, chosen = _learner(agent), agent_kwargs or {}, seeds or [seed]
    check_run(updates, judge_every, episodes, fresh_episodes, protocol, judged=judge)
    _check_learner(kind, kwargs, model)
    dataset = _ids(dataset)
    real_id = env_id or _env_of(dataset)
    if judge:
        _check_judge(real_id)
    dreams = _dream_ids(kind, imagined, chosen)
    judging = real_id if judge else None
    # Data that cannot be learned from must not cost a process, nor a fit: this learner is checked and no more.
    _offline_agent(kind, _log_to_check(dataset, label_actions), real_id, model, kwargs, "cpu", chosen[0])
    settings = {
        "agent": kind.__name__,
        "dataset": dataset,
        "env_id": real_id,
        "env_kwargs": env_kwargs,
        "updates": updates,
        "model": None if model is None else described(model),
        "agent_kwargs": kwargs,
        "label_actions": _told_labels(label_actions),
        "chosen_by": chosen_by,
        "judge": judge,
        "protocol": protocol,
        "judge_every": judge_every,
        "episodes": episodes,
        "fresh_episodes": fresh_episodes,
        "seeds": chosen,
    }
    folder = RunFolder(out, settings, resume=resume)
    asked = {"updates": updates, "judge_every": judge_every, "episodes": episodes, "fresh_episodes": fresh_episodes}
    source = partial(_offline_data, dataset, label_actions)
    work = partial(_one_offline, kind, source, real_id, model, kwargs, device, folder.path,
                   asked | {"env_id": judging, "protocol": protocol, "env_kwargs": env_kwargs})  # fmt: skip
    outcomes = for_each_seed(work, chosen, workers=workers, progress=progress)
    title = f"{kind.__name__} on {', '.join(dataset)}"
    notes = _weight_notes(kind, kwargs, chosen_by) + _label_notes([folder.path / f"seed-{number}" for number in chosen])
    for number, dream in dreams.items():
        home = folder.path / f"seed-{number}"
        again = partial(_offline_again, kind, partial(source, number, home), real_id, kwargs, device)
        learned = restored(again, home)
        assert isinstance(learned, learners.OfflineMBPO)
        console.print(f"{dream}: {learners.save_imagined(learned, dream).total_steps} imagined steps")
    path = write_offline_report(folder.path, title, judging, outcomes, settings, notes)
    if not judge:
        console.print(f"nothing was judged: no environment; report: {path}", soft_wrap=True)
        return
    table = Table(title=f"{title}: {fresh_episodes} real episodes of the {protocol} policy")
    for column in ("seed", "return", "at update", "last ten judgements"):
        table.add_column(column, justify="right")
    for number, outcome in outcomes.items():
        table.add_row(str(number), f"{outcome.mean:.1f}", str(outcome.updates), f"{outcome.last_marks:.1f}")
    console.print(table)
    console.print(f"mean return {told(summary(outcomes))}, report: {path}", soft_wrap=True)


def sweep(
    agent: str | None = None,
    dataset: list[str] | str | None = None,
    space: dict[str, Any] | None = None,
    env_id: str | None = None,
    out: str = "runs/sweep",
    trials: int = 30,
    objective: str = "return_in_model",
    sampler: Literal["tpe", "gp", "random"] = "tpe",
    updates: int = 100_000,
    model: AbstractDynamics | None = None,
    agent_kwargs: dict[str, Any] | None = None,
    label_actions: bool | InverseDynamics = False,
    env_kwargs: dict[str, Any] | None = None,
    save_every: int = 10_000,
    seeds: list[int] | None = None,
    seed: int = 0,
    workers: int | None = None,
    ray: bool = False,
    device: str = "cpu",
    resume: bool = False,
    progress: bool = True,
) -> None:
    """Search an offline learner's settings, judged without the simulator unless it is named. Killed sweeps go on.

    A fifth of the episodes is kept from the learners for the judge. best.yaml in the folder is a configuration of
    ``learneddyn offline``.

    Args:
        agent: an offline learner, see ``learneddyn list``.
        dataset: one or several ids of Minari data sets.
        space: what is searched, such as {agent_kwargs.penalty_weight: {low: 0.1, high: 10.0, log: true}}: names are
            updates, agent_kwargs.NAME and model.NAME; a list holds choices.
        env_id: Gymnasium id of the real environment; null takes what the data set names.
        out: folder of the sweep.
        trials: in all.
        objective: fqe, return_in_model, model_error, real, or the path of a function (learneddyn.offline.objectives).
        sampler: tpe, gp (Bayesian optimisation by a Gaussian process) or random.
        updates: gradient updates of a trial.
        model: class path and arguments of the dynamics model; return_in_model judges by another of the same kind.
        agent_kwargs: for the learner's constructor, where the space does not say otherwise.
        label_actions: see ``learneddyn offline``; all trials learn from the same labels.
        env_kwargs: arguments of the environment, where it is the objective, and of best.yaml's.
        save_every: updates between checkpoints.
        seeds: every trial is the mean over these seeds.
        seed: the only one, where seeds is not given; of the sampler, too.
        workers: trials at once, by default one per core.
        ray: play the trials with Ray Tune, on this machine or a cluster.
        device: of the learners.
        resume: go on with the sweep in the folder.
        progress: show progress.
    """
    kind, kwargs, dataset, chosen = _learner(agent), agent_kwargs or {}, _ids(dataset), seeds or [seed]
    check_sweep(space or {}, trials=trials, sampler=sampler, workers=workers, ray=ray)
    of_agents = [name.split(".")[1] for name in space or {} if name.startswith("agent_kwargs.")]
    _check_learner(kind, kwargs | dict.fromkeys(of_agents), model)
    if wrong := [name for name in space or {} if name.split(".")[0] not in ("updates", "agent_kwargs", "model")]:
        raise ValueError(f"space holds {wrong[0]!r}; names are updates, agent_kwargs.NAME and model.NAME")
    real_id = env_id or _env_of(dataset)
    base = {
        "agent": kind.__name__,
        "dataset": dataset,
        "env_id": real_id,
        "env_kwargs": env_kwargs,
        "updates": updates,
        "model": None if model is None else described(model),
        "agent_kwargs": kwargs,
        "label_actions": _told_labels(label_actions),
    }
    _check_objective(kind, objective, real_id)
    _check_trials(kind, base, space or {}, save_every, chosen)
    log, _ = objectives.split_log(_log_to_check(dataset, label_actions))
    check_log(log, _known_task(kind, real_id, kwargs).get("task"), rewards=kind.from_rewards)
    settings = base | {"space": space, "objective": objective, "sampler": sampler, "seeds": chosen}
    folder = RunFolder(out, settings, resume=resume)
    judge = folder.path.resolve() / "judge"  # Ray's workers stand elsewhere
    if label_actions is not False:
        _offline_data(dataset, label_actions, chosen[0], folder.path)  # once, for the judge and for all trials
    if objective == "return_in_model" and real_id is not None and not judge.exists():
        model = _default_model(real_id) if model is None else model
        fitted = type(model)(**model.config())
        log = _offline_data(dataset, label_actions, chosen[0], folder.path, device)
        fitted.to(device).fit(log, rng=generator(seed + 1, device), progress=progress)
        fitted.save(judge)
    play = partial(_sweep_trial, base, objective, chosen, save_every, device, judge)
    common: dict[str, Any] = {"trials": trials, "sampler": sampler, "workers": workers, "seed": seed}
    ended = run_sweep(space or {}, play, folder.path, ray=ray, progress=progress, **common)
    notes = [f"Maximised: {objective} ({_told_by(objective)}), mean over the seeds {chosen}, after {updates} updates."]
    path = write_summary(folder.path, f"{kind.__name__} on {', '.join(dataset)}", notes + _label_notes([folder.path]))
    if valued := [trial for trial in ended if trial.value is not None]:
        best = max(valued, key=lambda trial: trial.value or 0.0)
        plan = planned(base, best.settings)
        plan["chosen_by"] = objective
        plan["judge"] = real_id is not None and _registered(real_id)
        for name in ("model", "label_actions"):
            if isinstance(plan[name], dict):
                plan[name] = {"class_path": plan[name]["class"], "init_args": plan[name]["config"]}
        write_file(folder.path / "best.yaml", yaml.safe_dump(plan, sort_keys=False).encode())
        console.print(f"best: {best.value:.5g} in trial {best.number}, {best.settings}")
    console.print(str(path), soft_wrap=True)


def reproduce(
    name: str,
    seeds: list[int] | None = None,
    out: str = "runs/reproduce",
    docs: str | None = None,
    workers: int | None = None,
    resume: bool = False,
) -> None:
    """Measure the central claims of papers in small experiments: ``learneddyn reproduce icem``, or ``all``.

    Args:
        name: of an experiment, see ``learneddyn list``, or of several with commas between; ``all`` means every one,
            which takes hours.
        seeds: by default those of each experiment.
        out: folder; every experiment writes result.json and result.png into its own folder there.
        docs: folder of the documentation whose reproduce.md and reproduce/ are refreshed from ``out``.
        workers: processes at once, by default one per core.
        resume: go on where a run was stopped: seeds that ``out`` holds are kept, agents go on from their checkpoints.
    """
    wanted = experiments.names() if name == "all" else name.split(",")
    if unknown := sorted(set(wanted) - set(experiments.names())):
        experiments.get(unknown[0])  # says so now, not when those before it have been played
    if "mbpo_hopper" in wanted:
        console.print("mbpo_hopper plays one seed for more than half an hour; stopped, it goes on with --resume true")
    for chosen in wanted:
        claim = experiments.get(chosen)
        findings = run_claim(claim, out, seeds=seeds, workers=workers, resume=resume)
        table = Table(title=f"{chosen}: {verdict(findings)}", caption=f"{claim.paper}. {claim.claim}")
        for column in ("finding", "measured", "wanted", ""):
            table.add_column(column)
        for entry in findings:
            sign = {True: "holds", False: "fails", None: "reported"}[entry.holds]
            table.add_row(entry.what, told(entry.measured), entry.wanted, sign)
        console.print(table)
        console.print(str(Path(out) / chosen / "result.png"), soft_wrap=True)
    if docs is not None:
        console.print(str(publish(out, docs)), soft_wrap=True)


def list_all() -> None:
    """Show tasks, worlds, presets, algorithms, experiments, and the data sets on this machine."""
    import minari

    presets = sorted(f"{path.parent.name}/{path.stem}" for path in _PRESETS.glob("*/*.yaml"))
    table = Table(show_header=False, box=None, padding=(0, 2))
    for name, entries in (
        ("tasks", tasks.names()),
        ("worlds", world_names()),
        ("presets", presets),
        ("algorithms", sorted(algorithms())),
        ("offline learners", sorted(kind.__name__ for kind in _learners().values())),
        ("experiments", experiments.names()),
        ("data sets here", sorted(minari.list_local_datasets())),
    ):
        table.add_row(f"[bold]{name}", "\n".join(entries) or "none")
    console.print(table)


COMMANDS: dict[str, Any] = {
    "collect": collect,
    "import": import_logs,
    "compare": compare,
    "fit": fit,
    "train": train,
    "evaluate": evaluate,
    "render": render,
    "demo": demo,
    "mbpo": mbpo,
    "pets": pets,
    "offline": offline,
    "sweep": sweep,
    "reproduce": reproduce,
    "list": list_all,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; what users can get wrong ends in one line on stderr and exit code 1."""
    given = _with_presets(list(sys.argv[1:] if arguments is None else arguments))
    try:
        jsonargparse.auto_cli(COMMANDS, args=given, prog="learneddyn")
    except (ValueError, OSError, LookupError, RuntimeError, ArithmeticError, ImportError, gym.error.Error) as error:
        told = error.args[0] if isinstance(error, KeyError) and error.args else error
        print(f"learneddyn: {type(error).__name__}: {told}", file=sys.stderr)
        raise SystemExit(1) from error


def _with_presets(arguments: list[str]) -> list[str]:
    """Replace the name of a preset behind --config by its path, and let it come first: the other words go on top."""
    apart: list[str] = []
    for word in arguments:
        apart += word.split("=", 1) if word.startswith("--config=") else [word]
    configs: list[str] = []
    while "--config" in apart[1:-1]:
        index = apart.index("--config", 1)
        name = apart[index + 1]
        configs += ["--config", name if Path(name).exists() else str(_preset(apart[0], name))]
        del apart[index : index + 2]
    return [*apart[:1], *configs, *apart[1:]]


def _preset(command: str, name: str) -> Path:
    path = _PRESETS / (f"{name}.yaml" if "/" in name else f"{command}/{name}.yaml")
    if not path.exists():
        known = sorted(found.stem for found in (_PRESETS / command).glob("*.yaml"))
        print(f"learneddyn: there is no file or {command} preset {name!r}; presets are {known}", file=sys.stderr)
        raise SystemExit(2)
    return path


def _registered(env_id: str) -> bool:
    """Tell whether Gymnasium knows the environment; tasks of your own logs may have no simulator."""
    module, colon, bare = env_id.partition(":")
    try:
        if colon:  # `gym.make` imports the module, `gym.spec` does not
            import_module(module)
        gym.spec(bare if colon else env_id)
    except gym.error.Error:
        return False
    return True


def _default_model(env_id: str) -> AbstractDynamics:
    """Return the ensemble with the heads that the task cannot answer itself."""
    task = tasks.get(env_id)
    return ProbabilisticEnsemble(
        learn_reward=task.reward is None, learn_termination=task.terminated is None, angles=task.angles
    )


def _one_seed(
    config: RoundsConfig,
    world: str | None,
    dataset: list[str] | None,
    grades: dict[str, int] | None,
    grade_kwargs: dict[str, Any],
    model: AbstractDynamics,
    folder: Path,
    device: str,
    seed: int,
    notify: Notify,
) -> list[Round]:
    """Play all rounds of one seed; runs in a process of its own."""
    home = folder / f"seed-{seed}"
    if world is not None:
        return train_in_world(config, world, home, seed=seed, device=device, notify=notify)
    fresh = type(model)(**model.config())
    if read_rounds(home):
        data = None
    elif dataset is not None:
        data = load(dataset)
    else:
        notify(f"collect {grades}", 0.0)
        parts = []
        for grade, steps in (grades or {}).items():
            common: dict[str, Any] = {"steps": steps, "grade": grade, "seed": seed, "progress": False, "lanes": 1}
            parts.append(collect_grade(config.real_id, **common | (grade_kwargs if grade != "random" else {})))
        data = Transitions.cat(parts)
    return run_rounds(config, fresh, data, home, seed=seed, device=device, notify=notify)


def _logs_of(
    dataset: list[str], angles: tuple[int, ...], known: dict[str, Any], max_rows: int, seeds: list[int], seed: int
) -> list[comparison.Log]:
    """Return the logs as one of the seeds splits them; all seeds roll models out for as many steps."""
    if len({file_stem(name) for name in dataset}) < len(dataset):
        raise ValueError(
            f"data sets must differ in more than case and punctuation (their results share files): {dataset}"
        )
    logs = []
    for name in dataset:
        data = load(name)[:max_rows]
        if wrong := [column for column in angles if not 0 <= column < data.obs.shape[1]]:
            raise ValueError(f"angles must be columns 0 to {data.obs.shape[1] - 1} of {name!r}, got {wrong}")
        if (episodes := len(data.episode.unique())) < 3:
            raise DataError(
                f"the first {len(data)} rows of {name!r} hold {episodes} episodes, three are needed: raise max_rows, "
                "or import the log with episode_steps"
            )
        horizon = min(comparison.horizon_of(objectives.split_log(data, seed=each)[1]) for each in seeds)
        split = objectives.split_log(data, seed=seed)
        logs.append(comparison.Log(name, *split, angles=angles, known=known, horizon=horizon))
    return logs


def _one_comparison(
    dataset: list[str],
    angles: tuple[int, ...],
    known: dict[str, Any],
    max_rows: int,
    seeds: list[int],
    folder: Path,
    seed: int,
    notify: Notify,
) -> dict[str, Any]:
    """Play all cells of one seed; runs in a process of its own."""
    logs = _logs_of(dataset, angles, known, max_rows, seeds, seed)
    cells = Cells(folder / f"seed-{seed}", notify, comparison.count(logs))
    return {log.name: comparison.compare(log, seed, cells) for log in logs}


def _online_agent(
    algorithm: str,
    kwargs: dict[str, Any],
    model: AbstractDynamics | None,
    device: str,
    seed: int,
    env: gym.Env[Any, Any],
) -> Any:
    from learneddyn import agents

    fresh = None if model is None else type(model)(**model.config())
    return getattr(agents, algorithm)("MlpPolicy", env, model=fresh, **{"seed": seed, "device": device} | kwargs)


def _one_online(
    make: Any,
    env_id: str,
    folder: Path,
    steps: int,
    judge_every: int,
    episodes: int,
    env_kwargs: dict[str, Any] | None,
    device: str,
    seed: int,
    notify: Notify,
) -> list[Mark]:
    """Learn with one seed; runs in a process of its own."""
    return learn_online(
        partial(make, seed),
        env_id,
        folder / f"seed-{seed}",
        steps=steps,
        judge_every=judge_every,
        episodes=episodes,
        env_kwargs=env_kwargs,
        seed=seed,
        device=device,
        notify=notify,
    )


def _trial_agent(
    model: AbstractDynamics | None,
    planner: AbstractPlanner | None,
    arguments: dict[str, Any],
    device: str,
    seed: int,
    env: gym.Env[Any, Any],
) -> PETS:
    fresh = None if model is None else type(model)(**model.config())
    return PETS(env, fresh, planner, seed=seed, device=device, **arguments)


def _one_pets(
    make: Any,
    env_id: str,
    folder: Path,
    steps: int,
    env_kwargs: dict[str, Any] | None,
    device: str,
    seed: int,
    notify: Notify,
) -> list[Trial]:
    """Learn with one seed; runs in a process of its own."""
    home = folder / f"seed-{seed}"
    return learn_trials(
        partial(make, seed), env_id, home, steps=steps, env_kwargs=env_kwargs, device=device, notify=notify
    )


def _learners() -> dict[str, type[learners.OfflineAlgorithm]]:
    """Return the offline learners that the package exports, by their names in small letters without signs."""
    exported = (getattr(learners, name) for name in learners.__all__)
    found = [kind for kind in exported if isinstance(kind, type) and issubclass(kind, learners.OfflineAlgorithm)]
    return {_plain(kind.__name__): kind for kind in found if not inspect.isabstract(kind)}


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _learner(name: str | None) -> type[learners.OfflineAlgorithm]:
    known = _learners()
    if name is None or _plain(name) not in known:
        names = sorted(kind.__name__ for kind in known.values())
        raise ValueError(f"agent must be one of {', '.join(names)}, got {name!r}")
    return known[_plain(name)]


def _check_learner(
    kind: type[learners.OfflineAlgorithm], kwargs: dict[str, Any], model: AbstractDynamics | None
) -> None:
    """Refuse arguments that the learner does not take before any data is read."""
    allowed = {
        name
        for base in kind.__mro__
        if issubclass(base, learners.OfflineAlgorithm)
        for name in inspect.signature(base).parameters
    }
    allowed -= {"policy", "data", "env", "model", "seed", "device", "common", "_init_setup_model"}
    if unknown := sorted(set(kwargs) - allowed):
        raise ValueError(f"{kind.__name__} does not take {', '.join(unknown)}; agent_kwargs may hold {sorted(allowed)}")
    for value in kwargs.values():
        _instance(value)
    if model is not None and not issubclass(kind, learners.OfflineMBPO):
        raise ValueError(f"{kind.__name__} learns without a model: leave --model out")


def _ids(dataset: list[str] | str | None) -> list[str]:
    if not dataset:
        raise ValueError("give at least one Minari id with --dataset")
    return [dataset] if isinstance(dataset, str) else dataset


def _env_of(dataset: list[str]) -> str | None:
    """Return the id of the environment that the first data set was collected in, if it names one."""
    import minari

    load_action_free(dataset[:1], max_episodes=1)  # fetches it, or says why it cannot be had
    spec = minari.load_dataset(dataset[0]).env_spec
    return None if spec is None else spec.id


def _told_labels(label_actions: bool | InverseDynamics) -> Any:
    """Return the setting as plain JSON."""
    told = label_actions
    return told if isinstance(told, bool) else {"class": "learneddyn.models.InverseDynamics", "config": told.config()}


def _log_to_check(dataset: list[str], label_actions: bool | InverseDynamics) -> Transitions:
    """Return the log; actions that will be filled in are in the middle of their box."""
    if label_actions is False:
        return load(dataset)
    rows = load_action_free(dataset)
    assert rows.spaces is not None
    low, high = bounds(rows.spaces.action, rows.device)
    return replace(rows, action=rows.action.where(~unlabelled(rows)[:, None], (low + high) / 2))


def _offline_data(
    dataset: list[str], label_actions: bool | InverseDynamics, seed: int, home: Path, device: str = "cpu"
) -> Transitions:
    """Return the log of a seed.

    Where actions were filled in, the folder keeps them in labels.npy, and labels.json says how well.
    """
    if label_actions is False:
        return load(dataset, device=device)
    rows, kept = load_action_free(dataset), home / "labels.npy"
    if not kept.exists():
        model = None if label_actions is True else InverseDynamics(**label_actions.config())
        labelled = learners.semi_supervised(rows, rng=generator(seed), model=model)
        assert labelled.report is not None
        filled = unlabelled(rows)
        figures = {"rows": len(filled), "filled": int(filled.sum()), "std": float(labelled.std[filled].mean())}
        home.mkdir(parents=True, exist_ok=True)
        replace_file(home / "labels.json", json.dumps(figures | labelled.report.metrics).encode())
        with (content := BytesIO()):
            np.save(content, labelled.data.action.numpy())
            replace_file(kept, content.getvalue())
    return replace(rows, action=torch.from_numpy(np.load(kept))).to(device)


def _label_notes(folders: Sequence[Path]) -> list[str]:
    """Say how well the actions were filled in that each folder keeps, as far as the log can tell."""
    found = [folder / "labels.json" for folder in folders]
    labels = {path.parent.name: json.loads(path.read_text()) for path in found if path.exists()}
    return [
        f"{name}: inverse dynamics filled in the actions of {entry['filled']} of {entry['rows']} rows, with a "
        f"mean deviation of {entry['std']:.3g}; learned from {entry['train_rows']:.0f} rows that hold one, it explains "
        f"{entry['holdout_r2']:.3f} of the variance (R2) of the actions in {entry['holdout_rows']:.0f} others."
        for name, entry in labels.items()
    ]


def _check_judge(real_id: str | None) -> None:
    """Refuse an environment that cannot judge, before anything is learned."""
    if real_id is None:
        raise ValueError(
            "the data set names no environment: pass --env_id, the judge, or, where the plant has no simulator, "
            "--judge false to learn without one"
        )
    if not _registered(real_id):
        raise ValueError(
            f"Gymnasium knows no environment {real_id!r}, the judge: pass --env_id, as module:Id-v0 if a module of "
            "yours registers it, or --judge false where the plant has no simulator"
        )


def _dream_ids(kind: type[learners.OfflineAlgorithm], imagined: str | None, seeds: list[int]) -> dict[int, str]:
    """Return the data set that each seed's imagination is written to, none if nobody asks for it.

    Raises:
        DatasetExists: an id is taken.
        ValueError: a malformed id, or a learner that does not imagine.
    """
    if imagined is None:
        return {}
    if not issubclass(kind, learners.OfflineMBPO):
        raise ValueError(f"{kind.__name__} imagines nothing: leave --imagined out")
    check_free(imagined)
    if len(seeds) == 1:
        return {seeds[0]: imagined}
    name, _, version = imagined.rpartition("-")
    ids = {seed: f"{name}-seed-{seed}-{version}" for seed in seeds}
    for each in ids.values():
        check_free(each)
    return ids


def _known_task(kind: type[learners.OfflineAlgorithm], real_id: str | None, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the task of a learner: the one in its arguments, or the environment's, if there is one.

    Learners without a model use it only to check the log, and do without one.

    Raises:
        UnknownTask: no task is known, and the learner needs one to imagine.
    """
    if "task" in kwargs:
        given = _instance(kwargs["task"])
        return {"task": tasks.get(given) if isinstance(given, str) else given}
    if real_id is None:
        return {}
    try:
        return {"task": tasks.get(real_id)}
    except tasks.UnknownTask as error:
        if issubclass(kind, learners.OfflineMBPO):
            raise tasks.UnknownTask(
                f"{error}. Here the second way is agent_kwargs: {{task: {{class: learneddyn.core.Task, config: "
                f"{{real_id: {real_id}}}}}}}: rewards and terminations are then learned from the log"
            ) from error
        return {}


def _offline_agent(
    kind: type[learners.OfflineAlgorithm],
    data: Transitions | None,
    real_id: str | None,
    model: AbstractDynamics | None,
    kwargs: dict[str, Any],
    device: str,
    seed: int,
    **own: Any,
) -> learners.OfflineAlgorithm:
    """Return a new learner; without data it is one whose arguments are checked and no more."""
    given: dict[str, Any] = {name: _instance(value) for name, value in kwargs.items()}
    given |= _known_task(kind, real_id, kwargs)
    if model is not None:
        given["model"] = type(model)(**model.config())
    settled: dict[str, Any] = {"seed": seed, "device": device} | given | own
    return kind("MlpPolicy", data, **settled)


def _offline_again(
    kind: type[learners.OfflineAlgorithm],
    data: Callable[[], Transitions],
    real_id: str | None,
    kwargs: dict[str, Any],
    device: str,
    path: Path,
) -> learners.OfflineAlgorithm:
    """Return the learner in a zip file, with what such a file does not hold: data, task, functions."""
    kept = _known_task(kind, real_id, kwargs)
    if callable(judge := _instance(kwargs.get("dynamics_reward"))) and not isinstance(judge, AbstractModel):
        kept["dynamics_reward"] = judge
    return kind.load(path, data=data(), device=device, **kept)


def _instance(value: Any) -> Any:
    """Return an object for a dictionary of its class and config, anything else as it is."""
    if not isinstance(value, dict) or not {"class", "config"} & set(value):
        return value
    module, _, name = str(value.get("class", "")).rpartition(".")
    try:
        kind = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"an object needs the path of its class and its config, got {value} ({error})") from error
    return kind(**value.get("config", {}))


def _one_offline(
    kind: type[learners.OfflineAlgorithm],
    source: Any,
    real_id: str | None,
    model: AbstractDynamics | None,
    kwargs: dict[str, Any],
    device: str,
    folder: Path,
    asked: dict[str, Any],
    seed: int,
    notify: Notify,
) -> Outcome:
    """Learn with one seed; runs in a process of its own."""
    home = folder / f"seed-{seed}"

    @cache
    def data() -> Transitions:
        """Return the log; a seed that has ended needs none."""
        return source(seed, home)

    def make() -> learners.OfflineAlgorithm:
        return _offline_agent(kind, data(), real_id, model, kwargs, device, seed)

    again = partial(_offline_again, kind, data, real_id, kwargs, device)
    return learn_offline(make, again, folder=home, seed=seed, device=device, notify=notify, **asked)


def planned(base: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a run with those of a trial put in; a model has no more elites than members."""
    plan: dict[str, Any] = json.loads(json.dumps(base))
    for name, value in settings.items():
        place, *path = name.split(".")
        if not path:
            plan[place] = value
            continue
        if plan[place] is None:
            raise ValueError(f"the space holds {name!r}, but there is no {place}: give its class with --{place}")
        inner = plan[place]["config"] if place == "model" else plan[place]
        for step in path[:-1]:
            inner = inner.setdefault(step, {})
        inner[path[-1]] = value
    if plan["model"] and "num_members" in (config := plan["model"]["config"]):
        config["num_elites"] = min(config["num_elites"], config["num_members"])
    return plan


def _check_objective(kind: type[learners.OfflineAlgorithm], name: str, real_id: str | None) -> None:
    """Refuse an objective that cannot judge this learner, before anything is fitted."""
    objectives.objective(name)
    if name == "model_error" and not issubclass(kind, learners.OfflineMBPO):
        raise ValueError(f"model_error judges agents with a model, {kind.__name__} has none: choose another objective")
    if name == "fqe" and kind is learners.TrajectoryDiffuser:
        raise ValueError(f"fqe judges single rows, {kind.__name__} remembers earlier ones: choose another objective")
    if name == "real":
        _check_judge(real_id)
    if name == "return_in_model":
        if real_id is None:
            raise ValueError("return_in_model needs a task, and the data set names none: pass --env_id, or choose fqe")
        tasks.get(real_id)


def _check_trials(
    kind: type[learners.OfflineAlgorithm],
    base: dict[str, Any],
    space: dict[str, Any],
    save_every: int,
    seeds: list[int],
) -> None:
    """Refuse settings that no trial can be played with: each end of each range is tried where all others begin.

    Learners and models are made and thrown away; they check their arguments, and no data is looked at.
    """
    if save_every < 1 or len(set(seeds)) != len(seeds):
        raise ValueError(f"save_every must be at least 1 and seeds distinct, got {save_every} and {seeds}")
    ends = {name: entry if isinstance(entry, list) else [entry["low"], entry["high"]] for name, entry in space.items()}
    begin = {name: values[0] for name, values in ends.items()}
    for name, value in [(name, value) for name, values in ends.items() for value in values]:
        plan = planned(base, begin | {name: value})
        try:
            if plan["updates"] < 1:
                raise ValueError(f"updates must be at least 1, got {plan['updates']}")
            model = _instance(plan["model"])
            _offline_agent(kind, None, base["env_id"], model, plan["agent_kwargs"], "cpu", 0, _init_setup_model=False)
        except (ValueError, TypeError) as error:
            raise ValueError(f"no trial can have {name} = {value!r}: {error}") from error


def _sweep_trial(
    base: dict[str, Any],
    objective: str,
    seeds: list[int],
    save_every: int,
    device: str,
    judge: Path,
    settings: dict[str, Any],
    folder: Path,
) -> float:
    """Learn with every seed and return the mean of the objective; runs in a process of its own."""
    plan, kind, judged = planned(base, settings), _learner(base["agent"]), objectives.objective(objective)
    data = _offline_data(base["dataset"], _instance(base["label_actions"]), seeds[0], judge.parent, device)
    log, held_out = objectives.split_log(data)
    model, real_id, kwargs, values = _instance(plan["model"]), base["env_id"], plan["agent_kwargs"], []
    for seed in seeds:
        home = folder / f"seed-{seed}"
        value = home / "value.json"
        if not value.exists():
            make = partial(_offline_agent, kind, log, real_id, model, kwargs, device, seed)
            again = partial(_offline_again, kind, lambda: log, real_id, kwargs, device)
            learned = train_offline(make, again, home, updates=plan["updates"], save_every=save_every)
            assert isinstance(learned, learners.OfflineAlgorithm)
            worth = judged(objectives.Judgement(learned, log, held_out, judge, real_id, seed, base["env_kwargs"]))
            replace_file(value, json.dumps(worth).encode())
        # The agent stays; what it imagined weighs a hundred times as much, and only going on would need it.
        (home / "checkpoint" / "imagined").unlink(missing_ok=True)
        values.append(json.loads(value.read_text()))
    return sum(values) / len(values)


def _told_by(objective: str) -> str:
    """Say who judged what a sweep maximised."""
    if objective == "real":
        return "the real environment chose: no result of learning offline"
    return "no simulator" if objective in objectives.OBJECTIVES else "a function of the user's"


def _weight_notes(
    kind: type[learners.OfflineAlgorithm], kwargs: dict[str, Any], chosen_by: str | None = None
) -> list[str]:
    """Say how the pessimism of a learner was weighted, and who chose it."""
    weights = ("penalty_weight", "pessimism", "inconsistency", "conservatism", "diversity", "adversary", "alpha", "eta")
    parts = {"penalty": "penalty_weight", "halt_offset": "pessimism", "clip_target": "", "least_dynamics_reward": ""}
    found: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        for name, parameter in inspect.signature(base).parameters.items() if base in _learners().values() else ():
            if name in (*weights, *parts) and parameter.default is not inspect.Parameter.empty:
                found[name] = parameter.default
    found |= {name: kwargs[name] for name in found if name in kwargs}
    filtered = issubclass(kind, learners.MOREC) or kwargs.get("dynamics_reward") is not None
    asked = {"least_dynamics_reward": filtered} | {name: bool(found.get(of)) for name, of in parts.items() if of}
    said = [
        f"{name} = {value} ({'given' if name in kwargs else 'default'})"
        for name, value in found.items()
        if value and asked.get(name, True)
    ]
    notes = [f"Weights of pessimism, from the configuration: {', '.join(said)}."] if said else []
    if chosen_by is not None:
        notes.append(f"The configuration maximised {chosen_by} in a sweep ({_told_by(chosen_by)}).")
    for name in ("penalty_weight", "least_dynamics_reward"):
        if isinstance(found.get(name), str) and asked.get(name, True):
            notes.append(f"{name} is a rule that was worked out on the log: `imagined/{name}` below.")
    return notes


def _print_rounds(results: dict[int, list[Round]]) -> None:
    table = Table(title="Imagined against real return (means, 95 % intervals)")
    for column in ("seed", "round", "real steps", "imagined", "real", "model error", "verdict"):
        table.add_column(column, justify="right")
    for seed, played in results.items():
        for entry in played:
            error = "" if entry.model_error is None else f"{entry.model_error:.3g} @ {entry.model_error_horizon}"
            cells = [
                f"{estimate.value:.1f} [{estimate.low:.1f}, {estimate.high:.1f}]"
                for estimate in (entry.imagined, entry.real)
            ]
            table.add_row(str(seed), str(entry.round), str(entry.real_steps), *cells, error, str(entry.verdict))
    console.print(table)
    console.print(
        "model error: open loop on the agent's own real episodes, in standard deviations of the data, @ steps"
    )


if __name__ == "__main__":
    main()
