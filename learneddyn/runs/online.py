"""Learn in the real environment, judge on the way, and go on after a kill as if nothing had happened.

A run of one seed is a folder: ``curve.json`` (one mark per judgement), ``checkpoint/`` (`learneddyn.agents.checkpoint`,
for model-based agents), ``agent.zip`` (SB3's, at the end) and SB3's logs.
"""

import importlib.util
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
from matplotlib.backends.backend_agg import FigureCanvasAgg
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import configure

from learneddyn.agents import Dyna
from learneddyn.agents.checkpoint import load_checkpoint, save_checkpoint
from learneddyn.core import Json
from learneddyn.evaluation import Returns, evaluate
from learneddyn.files import surviving_folder
from learneddyn.runs.claims import panels
from learneddyn.runs.marks import draw_marks, read_marks, write_marks
from learneddyn.runs.seeds import Notify, silent

JUDGE_SEED = 10_000
"""Judged episodes are the same at every mark, and not those of training."""


class Mark(NamedTuple):
    """One judgement: real steps learned from, returns of the deterministic policy, CPU seconds of learning, figures."""

    real_steps: int
    returns: list[float]
    cpu_seconds: float
    figures: dict[str, float]

    @property
    def mean(self) -> float:
        """Mean return."""
        return sum(self.returns) / len(self.returns)


def learn_online(
    make: Callable[[gym.Env[Any, Any]], BaseAlgorithm],
    env_id: str,
    folder: Path,
    *,
    steps: int,
    judge_every: int = 1000,
    episodes: int = 5,
    env_kwargs: Json | None = None,
    seed: int = 0,
    device: str = "cpu",
    notify: Notify = silent,
) -> list[Mark]:
    """Learn for ``steps`` real steps, and judge every ``judge_every`` of them, at the end too.

    A folder that holds a checkpoint is gone on with: the marks after it are dropped and made again, bit-equal where the
    environment allows it. Agents that are no `Dyna` have no checkpoints, and begin anew.

    Args:
        make: the agent for an environment; called again for a resumed run, to know its class.
        env_id: Gymnasium id.
        folder: of this seed, made if missing.
        steps: real steps in all.
        judge_every: real steps between two judgements (and checkpoints).
        episodes: per judgement.
        env_kwargs: arguments of the environment.
        seed: of the judged episodes.
        device: of agent and model.
        notify: told how far it is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with closing(gym.make(env_id, **env_kwargs or {})) as env:
        agent = make(env)
        marks: list[Mark] = []
        if isinstance(agent, Dyna) and surviving_folder(folder / "checkpoint").exists():
            agent = load_checkpoint(type(agent), folder / "checkpoint", env, device)
            marks = [mark for mark in read_marks(folder, Mark) if mark.real_steps <= agent.num_timesteps]
        begun = agent.num_timesteps
        if begun >= steps:
            if not (folder / "agent.zip").exists():  # killed between its last checkpoint and this file
                agent.save(folder / "agent.zip")
            return marks
        judged = partial(evaluate, real_id=env_id, episodes=episodes, seed=JUDGE_SEED + seed, env_kwargs=env_kwargs)
        judge = _Judge(judged, folder, marks, judge_every, notify, steps)
        sinks = ["csv", "tensorboard"] if importlib.util.find_spec("tensorboard") else ["csv"]
        with closing(configure(str(folder / f"log-{begun}"), sinks)) as logger:
            agent.set_logger(logger)
            agent.learn(steps - begun, callback=judge, reset_num_timesteps=begun == 0)
            judge.judge()
        agent.save(folder / "agent.zip")
    return marks


def draw_curves(path: Path, title: str, curves: dict[int, list[Mark]]) -> Path:
    """Draw every seed's mean returns over real steps into a PNG, with their range over episodes."""
    figure, (ax,) = panels()
    draw_marks(ax, curves, title, "real steps")
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=130)
    return path


class _Judge(BaseCallback):
    """Judges and saves between two steps."""

    def __init__(
        self, judged: Callable[..., Returns], folder: Path, marks: list[Mark], every: int, notify: Notify, steps: int
    ) -> None:
        super().__init__()
        self.judged, self.folder, self.marks, self.every = judged, folder, marks, every
        self.notify, self.steps = notify, steps
        self.spent = marks[-1].cpu_seconds if marks else 0.0
        self.begun = time.process_time()

    def _on_rollout_start(self) -> None:
        last = self.marks[-1].real_steps if self.marks else 0
        if self.num_timesteps and self.num_timesteps // self.every > last // self.every:
            self.judge()

    def judge(self) -> None:
        """Add a mark for now, unless there is one."""
        steps = self.model.num_timesteps
        if self.marks and self.marks[-1].real_steps == steps:
            return
        spent = self.spent + time.process_time() - self.begun
        real = self.judged(self.model)
        figures = dict(self.model.figures) if isinstance(self.model, Dyna) else {}
        self.marks.append(Mark(steps, [float(value) for value in real.returns], round(spent, 1), figures))
        write_marks(self.folder, self.marks)
        if isinstance(self.model, Dyna):
            save_checkpoint(self.model, self.folder / "checkpoint")
        self.notify(f"{steps} real steps: return {real.mean:.4g}", steps / self.steps)
        self.spent, self.begun = spent, time.process_time()

    def _on_step(self) -> bool:
        return True
