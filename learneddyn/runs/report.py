"""From run folders to the report: the final agents judged once more, on episodes that decided nothing."""

from collections.abc import Sequence
from csv import DictReader
from pathlib import Path
from typing import Any

from learneddyn import tasks
from learneddyn.core import Json, Transitions, generator
from learneddyn.data import algorithm_class, collect
from learneddyn.data.store import load_transitions
from learneddyn.envs import load_world
from learneddyn.evaluation import (
    Calibration,
    Fidelity,
    Returns,
    Round,
    StepAccuracy,
    cloud_calibration,
    evaluate,
    fidelity_of_log,
    longest_window,
    step_accuracy,
    write_report,
)
from learneddyn.evaluation.render import side_by_side
from learneddyn.runs.rounds import RoundsConfig, imagined_beside, read_rounds
from learneddyn.runs.seeds import one_thread
from learneddyn.world import World
from learneddyn.world.draw import RenderError

_FRESH = 777_000
"""Added to the seed of the last judgement, so that the rounds' stop rule has not seen these episodes."""
_HORIZON = 50
_CLOUDS = (1, 2, 5, 10, 20)
_RANDOM_STEPS = 2000


@one_thread()
def report_runs(
    folder: Path,
    config: RoundsConfig,
    seeds: Sequence[int],
    *,
    title: str,
    settings: Json,
    world: str | None = None,
    device: str = "cpu",
) -> tuple[Path, dict[int, Returns]]:
    """Judge every seed's last agent on fresh episodes, write ``report.html`` and ``metrics.json``, return both results.

    Args:
        folder: holds ``seed-N`` for every seed.
        config: of the loop.
        seeds: whose rounds have been played.
        title: of the page.
        settings: plain JSON, shown in the report.
        world: the world the agents were trained in, where it is not the last round's own.
        device: of worlds and agents.
    """
    rounds: dict[int, list[Round]] = {}
    final: dict[int, Returns] = {}
    fresh: dict[int, Round] = {}
    fidelity: dict[str, Fidelity] = {}
    calibration: dict[str, Calibration] = {}
    accuracy: dict[str, StepAccuracy] = {}
    curves: dict[str, tuple[list[float], list[float]]] = {}
    gif: Path | None = None
    unseen = ""
    for seed in seeds:
        home = folder / f"seed-{seed}"
        rounds[seed] = read_rounds(home)
        last = home / f"round-{len(rounds[seed]) - 1}"
        agent: Any = algorithm_class(config.algorithm).load(last / "agent.zip", device=device)
        real = evaluate(agent, config.real_id, episodes=config.episodes, seed=seed + _FRESH, record=True, device=device)
        final[seed], curves[f"seed {seed}"] = real, _curve(home, len(rounds[seed]))
        loaded = load_world(world or last / "world", device)
        imagination = loaded.world
        name, rng = f"seed {seed}, the agent's own real episodes", generator(seed, device)
        random = collect(config.real_id, steps=_RANDOM_STEPS, lanes=1, seed=seed + _FRESH, progress=False)
        data = last / "data.safetensors"
        reference = load_transitions(data, device) if data.exists() else random
        assert real.transitions is not None
        fidelity[name], clouds = _fidelity(imagination, real.transitions, reference, rng)
        judged = rounds[seed][-1]
        fresh[seed] = Round.from_episodes(
            judged.round,
            judged.real_steps,
            imagined_beside(agent, loaded, real, rng),
            real,
            fidelity=fidelity[name],
            at=judged.model_error_horizon or fidelity[name].horizon,
        )
        accuracy[name] = step_accuracy(imagination, real.transitions, rng=rng)
        if clouds is not None:
            calibration[name] = clouds
        if seed == seeds[0]:
            fidelity[f"seed {seed}, fresh episodes of random actions"], _ = _fidelity(
                imagination, random.to(device), reference, rng
            )
            # The judgement is done: a task or a machine that cannot draw must not cost it.
            if imagination.task.codec is None:
                unseen = f"No picture: the task of {config.real_id} has no codec to draw observations with."
            else:
                try:
                    gif = folder / "side_by_side.gif"
                    side_by_side(agent, imagination, config.real_id, gif, seed=seed, device=device)
                except RenderError as error:
                    gif, unseen = None, f"No picture: {error}"
    notes = [
        f"A round's real episodes also decide whether it is the last. The headline therefore judges the last agents on "
        f"{config.episodes} fresh episodes each: "
    ]
    notes[0] += "; ".join(f"seed {seed}: {_told(real)}" for seed, real in final.items()) + "."
    logs = {seed: folder / f"seed-{seed}" / "round-0" / "data.safetensors" for seed in seeds}
    if earned := [f"seed {seed}: {_earned(load_transitions(log))}" for seed, log in logs.items() if log.exists()]:
        notes.append(f"What the first data earned, cut-off episodes included: {'; '.join(earned)}.")
    task = tasks.get(config.real_id)
    path = write_report(
        folder,
        title=title,
        rounds=rounds,
        fresh=fresh,
        fidelity=fidelity,
        calibration=calibration,
        accuracy=accuracy,
        curves={"Imagined return while learning": curves},
        gif=gif,
        config=settings,
        target=config.target,
        notes=[*notes, *(note for note in (task.notes, unseen) if note)],
    )
    return path, final


def _told(real: Returns) -> str:
    estimate = real.interval()
    return f"{estimate.value:.1f} [{estimate.low:.1f}, {estimate.high:.1f}]"


def _earned(data: Transitions) -> str:
    _, episode = data.episode.unique(return_inverse=True)
    returns = data.reward.new_zeros(int(episode.max()) + 1).index_add_(0, episode, data.reward)
    return f"{float(returns.mean()):.1f} on average, {float(returns.max()):.1f} at best, in {len(returns)} episodes"


def _fidelity(
    world: World, own: Transitions, reference: Transitions | None, rng: Any
) -> tuple[Fidelity, Calibration | None]:
    longest = longest_window(own, windows=50)
    fidelity = fidelity_of_log(
        world, own, horizon=max(1, min(_HORIZON, longest)), rng=rng, windows=500, full=False, reference=reference
    )
    ahead = [h for h in _CLOUDS if h <= longest]
    return fidelity, cloud_calibration(world, own, horizons=ahead, rng=rng) if ahead else None


def _curve(home: Path, rounds: int) -> tuple[list[float], list[float]]:
    """Return imagined steps and mean return of the finished imagined episodes, as SB3 logged them."""
    x: list[float] = []
    y: list[float] = []
    for path in (home / f"round-{number}" / "progress.csv" for number in range(rounds)):
        if not path.exists():
            continue
        with path.open() as file:
            for row in DictReader(file):
                if row.get("rollout/ep_rew_mean") and row.get("time/total_timesteps"):
                    x.append(float(row["time/total_timesteps"]))
                    y.append(float(row["rollout/ep_rew_mean"]))
    return x, y
