"""The loop: fit a model on real data, train an agent inside it only, judge it in the real environment, refit.

    for each round:
        model.fit(data)                                  # data: real transitions, all of them
        world = World(model, task, trust=within data)
        agent.learn(imagined_steps) inside the world     # no real step is taken here
        real return, imagined return, model error        # the judge; its episodes are never trained on
        if the agent falls short: data += the agent's own real steps

An agent is any Stable-Baselines3 or sb3-contrib algorithm. Every round leaves a complete state on disk, so a killed run
goes on at the round it was in.
"""

import importlib.util
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium as gym
import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import configure

from learneddyn import tasks
from learneddyn.core import Json, Transitions, generator
from learneddyn.data import algorithm_class, collect, load_agent
from learneddyn.data.grades import check_arguments, new_agent
from learneddyn.data.store import load_transitions, save_transitions
from learneddyn.envs import LearnedVecEnv, LoadedWorld, first_observations, load_world, save_world
from learneddyn.evaluation import Imagined, Returns, Round, evaluate, fidelity_of_log, imagined, longest_window
from learneddyn.files import replace_file
from learneddyn.models import AbstractDynamics
from learneddyn.runs.seeds import Notify, silent
from learneddyn.spaces import Spaces, flat_dim

_ERROR_HORIZON = 20
"""Steps over which the model's open-loop error is measured on the agent's own episodes (fewer if those are shorter)."""


@dataclass(frozen=True)
class RoundsConfig:
    """Settings of the loop.

    Args:
        real_id: Gymnasium id of the real environment.
        algorithm: name of a Stable-Baselines3 or sb3-contrib algorithm.
        algorithm_kwargs: for its constructor; ``policy`` defaults to the one that suits the observation space.
        imagined_steps: steps inside the world per round.
        lanes: imagined environments side by side.
        horizon: steps until an imagined episode is truncated; None is the task's time limit.
        sampler: of the world.
        penalty: name of an uncertainty penalty, or None.
        penalty_weight: reward units per penalty unit.
        trust_margin: an imagined step is trusted inside the box of the data, widened by this share of each column's
            range; None trusts every finite step.
        halt_reward: reward of a step that is not trusted, which then terminates; None truncates there.
        start: ``"task"``, ``"data"`` (anywhere in the data) or ``"data:first"`` (first observations of its episodes).
        rounds: rounds at most, the first included.
        real_steps: real steps that the agent takes between two rounds, actions sampled.
        target: real mean return at which no further round is needed; None plays all rounds.
        episodes: real episodes per judgement.
        max_real_steps: real steps to learn from in all; further collecting stops there.
    """

    real_id: str
    algorithm: str = "PPO"
    algorithm_kwargs: Json = field(default_factory=dict)
    imagined_steps: int = 200_000
    lanes: int = 64
    horizon: int | None = None
    sampler: str = "elite"
    penalty: str | None = None
    penalty_weight: float = 0.0
    trust_margin: float | None = 0.5
    halt_reward: float | None = None
    start: str = "task"
    rounds: int = 1
    real_steps: int = 1000
    target: float | None = None
    episodes: int = 20
    max_real_steps: int | None = None

    def __post_init__(self) -> None:
        for name in ("imagined_steps", "lanes", "rounds", "real_steps", "episodes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.start not in ("task", "data", "data:first"):
            raise ValueError(f"start must be 'task', 'data' or 'data:first', got {self.start!r}")
        check_arguments(self.algorithm, self.algorithm_kwargs)
        tasks.get(self.real_id)


def run_rounds(
    config: RoundsConfig,
    model: AbstractDynamics,
    data: Transitions | None,
    folder: Path,
    *,
    seed: int = 0,
    device: str = "cpu",
    notify: Notify = silent,
) -> list[Round]:
    """Play the rounds of one seed and return their records.

    Round k leaves ``round-k/`` with ``data.safetensors`` (all real steps learned from so far), ``world/`` (as
    `load_world` and ``gym.make`` open it), ``agent.zip``, SB3's ``progress.csv`` and, where tensorboard is installed,
    its events. ``rounds.json`` is written last: rounds it holds are not played again, others begin anew, with the same
    result. Each round's agent starts from the last one's parameters; a replay buffer starts empty, since what it held
    was imagined by an older model.

    Args:
        config: of the loop.
        model: hyper-parameters and start of the first fit; fitted in place.
        data: real transitions to begin with; None where the folder holds finished rounds already.
        folder: of this seed, made if missing.
        seed: of model, agent, world and real environment.
        device: of model, world and agent.
        notify: told what is going on.

    Raises:
        DataError: data that cannot be learned from.
        ValueError: the data's spaces are not those of the task's environment.
    """
    folder.mkdir(parents=True, exist_ok=True)
    played = read_rounds(folder)
    if data is not None and data.spaces is not None:
        check_real_spaces(config.real_id, data.spaces, f"the data {data.source!r}", exactly=config.rounds > 1)
    while not _finished(played, config):
        number = len(played)
        here, before = folder / f"round-{number}", folder / f"round-{number - 1}"
        here.mkdir(exist_ok=True)
        if number:
            data = load_transitions(before / "data.safetensors")
            wanted = _affordable(data, config)
            notify(f"round {number}: the agent takes {wanted} real steps", 0.0)
            actor = algorithm_class(config.algorithm).load(before / "agent.zip", device=device)
            own = collect(
                config.real_id, steps=wanted, behaviour=actor, lanes=1, seed=_seed(seed, number), progress=False
            )
            data = Transitions.cat([data, own])
            model = AbstractDynamics.load(before / "world", device)
        if data is None:
            raise ValueError(f"{folder} holds no finished round: data is needed to begin")
        save_transitions(here / "data.safetensors", data)
        notify(f"round {number}: fit on {len(data)} real steps", 0.0)
        model.to(device).fit(data.to(device), rng=generator(_seed(seed, number), device))
        _save_world(config, model, data, here / "world")
        last = before / "agent.zip" if number else None
        played.append(_play(config, str(here / "world"), data, last, here, _seed(seed, number), device, notify))
        replace_file(folder / "rounds.json", json.dumps([entry.to_json() for entry in played], indent=2).encode())
    return played


def train_in_world(
    config: RoundsConfig, world: str, folder: Path, *, seed: int = 0, device: str = "cpu", notify: Notify = silent
) -> list[Round]:
    """Train an agent in a world as it is (a name, a folder, or ``truth:<id>``), judge it, and return one record.

    The same files as one round of `run_rounds`, without data and world; a folder that holds a record is not played
    again. The world's own sampler, penalty, trust, horizon and starts count, not the config's.
    """
    here = folder / "round-0"
    here.mkdir(parents=True, exist_ok=True)
    played = read_rounds(folder)
    if not played:
        played = [_play(config, world, None, None, here, _seed(seed, 0), device, notify)]
        replace_file(folder / "rounds.json", json.dumps([played[0].to_json()], indent=2).encode())
    return played


def judge_agent(
    config: RoundsConfig, world: str, agent: Path, folder: Path, *, seed: int = 0, device: str = "cpu"
) -> list[Round]:
    """Judge an agent that was trained elsewhere, and return one record; it is copied into the folder."""
    here = folder / "round-0"
    here.mkdir(parents=True, exist_ok=True)
    acting = load_agent(config.algorithm, agent, device)
    replace_file(here / "agent.zip", agent.read_bytes())
    played = [_judge(config, acting, world, None, here, _seed(seed, 0), device)]
    replace_file(folder / "rounds.json", json.dumps([played[0].to_json()], indent=2).encode())
    return played


def check_real_spaces(real_id: str, spaces: Spaces, what: str, *, exactly: bool = False) -> None:
    """Make sure that an agent that learns in these spaces can be judged in the real environment.

    Raises:
        ValueError: the environment cannot be made, or has other spaces; bounds and dtypes matter only ``exactly``.
    """
    try:
        env = gym.make(real_id)
    except gym.error.Error as error:
        raise ValueError(
            f"{real_id} cannot be made, so nothing can be judged in it ({error}). Without a simulator, train in "
            "Python: any Stable-Baselines3 agent in learneddyn.envs.LearnedVecEnv(world, lanes)"
        ) from error
    real = Spaces(env.observation_space, env.action_space)
    env.close()
    if not (spaces == real if exactly else all(map(_alike, spaces, real))):
        raise ValueError(f"{what} has the spaces {tuple(spaces)}, but {real_id} has {tuple(real)}")


def _alike(one: gym.Space[Any], other: gym.Space[Any]) -> bool:
    if isinstance(one, gym.spaces.Dict) and isinstance(other, gym.spaces.Dict):
        return one.keys() == other.keys() and all(_alike(one[key], other[key]) for key in one)
    return type(one) is type(other) and one.shape == other.shape and flat_dim(one) == flat_dim(other)


def read_rounds(folder: Path) -> list[Round]:
    """Return the rounds that a seed's folder holds, none if it has not finished one."""
    path = folder / "rounds.json"
    return [Round.from_json(entry) for entry in json.loads(path.read_text())] if path.exists() else []


def imagined_beside(agent: BaseAlgorithm, world: LoadedWorld, real: Returns, rng: torch.Generator) -> Imagined:
    """Imagine as many episodes as are given, from their start states.

    They run to the task's time limit, as the real ones do; the agent may have learned on shorter ones.
    """
    horizon = world.world.task.max_episode_steps or world.horizon
    return imagined(agent, world.world, rng=rng, episodes=len(real.returns), horizon=horizon, start=real.starts)


def _finished(played: list[Round], config: RoundsConfig) -> bool:
    if not played:
        return False
    good = config.target is not None and played[-1].real.value >= config.target
    return good or len(played) == config.rounds or played[-1].real_steps >= (config.max_real_steps or math.inf)


def _affordable(data: Transitions, config: RoundsConfig) -> int:
    return (
        config.real_steps
        if config.max_real_steps is None
        else min(config.real_steps, config.max_real_steps - len(data))
    )


def _seed(seed: int, number: int) -> int:
    """Return a seed for a round, distinct for all seeds and rounds one would use."""
    return 1000 * seed + number


def _save_world(config: RoundsConfig, model: AbstractDynamics, data: Transitions, folder: Path) -> None:
    starts = {"task": None, "data": data.obs, "data:first": first_observations(data)}
    save_world(
        folder,
        model,
        task=config.real_id,
        sampler=config.sampler,
        penalty=config.penalty,
        penalty_weight=config.penalty_weight,
        data=data,
        trust_margin=config.trust_margin,
        halt_reward=config.halt_reward,
        horizon=config.horizon,
        start=starts[config.start],
    )


def _play(
    config: RoundsConfig,
    world: str,
    data: Transitions | None,
    last: Path | None,
    here: Path,
    seed: int,
    device: str,
    notify: Notify,
) -> Round:
    agent = _learn(config, world, last, here, seed, device, notify)
    notify(f"{_name(here)}: judge in {config.real_id}", 1.0)
    return _judge(config, agent, world, data, here, seed, device)


def _name(here: Path) -> str:
    return here.name.replace("-", " ")


def _learn(
    config: RoundsConfig, world: str, last: Path | None, here: Path, seed: int, device: str, notify: Notify
) -> BaseAlgorithm:
    """Train in a world, from the agent of the last round if there is one, and save the agent."""
    env = LearnedVecEnv.from_name(world, config.lanes, device=device)
    env.seed(seed)
    if last is None:
        agent = new_agent(config.algorithm, env, config.algorithm_kwargs, seed=seed, device=device)
    else:
        agent = algorithm_class(config.algorithm).load(last, env=env, device=device)
        agent.set_random_seed(seed)
    sinks = ["csv", "tensorboard"] if importlib.util.find_spec("tensorboard") else ["csv"]
    agent.set_logger(configure(str(here), sinks))
    told = f"{_name(here)}: {config.algorithm} learns in the model"
    agent.learn(config.imagined_steps, callback=_Told(told, notify), reset_num_timesteps=last is None)
    fresh = here / ".agent.zip"
    agent.save(fresh)
    os.replace(fresh, here / "agent.zip")
    agent.logger.close()
    env.close()
    return agent


class _Told(BaseCallback):
    """Passes the share of imagined steps on, about a hundred times."""

    def __init__(self, what: str, notify: Notify) -> None:
        super().__init__()
        self.what, self.notify, self.next = what, notify, 0.0

    def _on_training_start(self) -> None:
        self.begun = self.num_timesteps

    def _on_step(self) -> bool:
        share = (self.num_timesteps - self.begun) / (self.model._total_timesteps - self.begun)
        if share >= self.next:
            self.next += 0.01
            self.notify(self.what, min(share, 1.0))
        return True


def _judge(
    config: RoundsConfig,
    agent: BaseAlgorithm,
    world: str,
    data: Transitions | None,
    here: Path,
    seed: int,
    device: str,
) -> Round:
    """Compare real and imagined return from the same start states, and the model with the agent's real episodes.

    The seeds of the judged episodes belong to this round alone, and no episode judged here is ever learned from.
    """
    loaded = load_world(world, device)
    real = evaluate(agent, config.real_id, episodes=config.episodes, seed=seed, record=True, device=device)
    rng = generator(seed, device)
    dreamt = imagined_beside(agent, loaded, real, rng)
    assert real.transitions is not None
    # A world that came without its data is measured in the standard deviations of a random policy's episodes.
    known = collect(config.real_id, steps=1000, lanes=1, seed=seed, progress=False) if data is None else data
    steps = max(1, min(_ERROR_HORIZON, longest_window(real.transitions, windows=50)))
    fidelity = fidelity_of_log(
        loaded.world, real.transitions, horizon=steps, rng=rng, windows=500, full=False, reference=known
    )
    number = int(here.name.removeprefix("round-"))
    learned_from = 0 if data is None else len(data)
    return Round.from_episodes(number, learned_from, dreamt, real, fidelity=fidelity, at=steps)
