"""Rate of `learneddyn.data.collect` beside the bare vector env and beside Minari's DataCollector.

    python benchmarks/collect.py [--threads 1] [--rounds 5] [--steps 4000] [--lanes 8]

A row is a transition (reset rows do not count); making the environments is included. The bare vector env is Gymnasium's
SyncVectorEnv with its default settings, stepped with actions that were drawn beforehand and with nothing kept. "saved"
includes writing the Minari data set, as does Minari's collector, which takes one single env.
"""

import os
import shutil
import tempfile
import warnings

import gymnasium as gym
import minari
import numpy as np
from contest import Contestant, Row, Turns, main, missing
from gymnasium.vector import SyncVectorEnv
from minari.storage import get_dataset_path

from learneddyn.data import collect

ENVS = ("HalfCheetah-v5", "InvertedPendulum-v5")
TABLE = "Collecting transitions"


def bare(env_id: str, steps: int, lanes: int) -> None:
    env = SyncVectorEnv([lambda: gym.make(env_id)] * lanes)
    env.action_space.seed(0)
    actions = [env.action_space.sample() for _ in range(1024)]
    env.reset(seed=0)
    rows, step, done = 0, 0, np.zeros(lanes, bool)
    while rows < steps:
        rows += lanes - int(done.sum())
        _, _, terminated, truncated, _ = env.step(actions[step % 1024])
        done = terminated | truncated
        step += 1
    env.close()


def ours(env_id: str, steps: int, lanes: int, dataset_id: str | None = None) -> None:
    collect(env_id, dataset_id, steps=steps, lanes=lanes, progress=False, overwrite=True)


def minaris(env_id: str, steps: int) -> None:
    env = minari.DataCollector(gym.make(env_id))
    env.action_space.seed(0)
    actions = [env.action_space.sample() for _ in range(1024)]
    env.reset(seed=0)
    for step in range(steps):
        _, _, terminated, truncated, _ = env.step(actions[step % 1024])
        if terminated or truncated:
            env.reset()
    env.create_dataset("benchmark/minari-v0")
    shutil.rmtree(get_dataset_path("benchmark/minari-v0"))
    env.close()


def measure(turns: Turns, steps: int = 4000, lanes: int = 8) -> list[Row]:
    warnings.filterwarnings("ignore", category=UserWarning)
    contestants = {
        "bare vector env": lambda env_id: bare(env_id, steps, lanes),
        "collect": lambda env_id: ours(env_id, steps, lanes),
        "collect, saved": lambda env_id: ours(env_id, steps, lanes, "benchmark/ours-v0"),
    }
    absent = []
    try:
        import jax.tree_util  # noqa: F401  # what Minari's collector needs and does not bring

        contestants["Minari's DataCollector, saved"] = lambda env_id: minaris(env_id, steps)
    except ImportError as error:
        absent = [missing(TABLE, "Minari's DataCollector, saved", error)]
    field = [
        Contestant(name, env_id, steps, lambda run=run, env_id=env_id: run(env_id), peer="collect" not in name)
        for env_id in ENVS
        for name, run in contestants.items()
    ]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MINARI_DATASETS_PATH"] = folder
        return turns.contest(TABLE, field) + absent


if __name__ == "__main__":
    main(measure, __doc__, steps=4000, lanes=8)
