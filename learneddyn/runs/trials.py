"""Learn by trials: an agent whose every episode in the real environment is also its judgement.

A run of one seed is a folder: ``agent/`` (`learneddyn.agents.PETS.save`, after every trial), and SB3's logs.
"""

import importlib.util
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import configure

from learneddyn.agents import PETS
from learneddyn.core import Json
from learneddyn.files import surviving_folder
from learneddyn.runs.seeds import Notify, silent


class Trial(NamedTuple):
    """One episode: real steps up to its end, its return, and the agent's diagnostics at its end."""

    real_steps: int
    earned: float
    figures: dict[str, float]


def learn_trials(
    make: Callable[[gym.Env[Any, Any]], PETS],
    env_id: str,
    folder: Path,
    *,
    steps: int,
    env_kwargs: Json | None = None,
    device: str = "cpu",
    notify: Notify = silent,
) -> list[Trial]:
    """Learn for ``steps`` real steps and return the trials.

    A folder that holds an agent is gone on with: the result is that of a run that was never interrupted.

    Args:
        make: the agent for an environment, where the folder holds none.
        env_id: Gymnasium id.
        folder: of this seed, made if missing.
        steps: real steps in all.
        env_kwargs: arguments of the environment.
        device: of agent and model.
        notify: told how far it is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    env, kept = gym.make(env_id, **env_kwargs or {}), folder / "agent"
    agent = PETS.load(kept, env, device) if surviving_folder(kept).exists() else make(env)
    left = steps - agent.num_timesteps
    if left > 0:
        sinks = ["csv", "tensorboard"] if importlib.util.find_spec("tensorboard") else ["csv"]
        agent.set_logger(configure(str(folder / f"log-{agent.num_timesteps}"), sinks))
        agent.learn(left, _Progress(notify, steps), reset_num_timesteps=False, checkpoint=kept)
        agent.logger.close()
    env.close()
    return trials_of(agent)


def trials_of(agent: PETS) -> list[Trial]:
    """Return every finished trial of an agent."""
    if agent.data is None:
        return []
    ends = accumulate(agent.data.episode.bincount().tolist())
    return list(map(Trial, ends, agent.returns, agent.history))


class _Progress(BaseCallback):
    """Tells how far the run is, at the end of every trial."""

    def __init__(self, notify: Notify, steps: int) -> None:
        super().__init__()
        self.notify, self.steps = notify, steps

    def _on_rollout_end(self) -> None:
        assert isinstance(self.model, PETS)
        told = f"trial {self.model.trials}: return {self.model.returns[-1]:.4g}"
        self.notify(told, self.num_timesteps / self.steps)

    def _on_step(self) -> bool:
        return True
