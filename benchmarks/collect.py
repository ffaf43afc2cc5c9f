"""Rate of `learneddyn.data.collect` beside the bare vector env and beside Minari's DataCollector.

    python benchmarks/collect.py [--steps 20000] [--repeats 5] [--lanes 8]

Every rate is transitions (reset rows do not count) per second of CPU time of this process, making the environments
included. The contestants take turns, so that a busy machine slows all of them; the table shows the median over the
repeats. The bare vector env is Gymnasium's SyncVectorEnv with its default settings, stepped with actions that were
drawn beforehand and with nothing kept. "saved" includes writing the Minari data set, as does Minari's collector, which
takes one single env.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable

import gymnasium as gym
import minari
import numpy as np
from gymnasium.vector import SyncVectorEnv
from minari.storage import get_dataset_path

from learneddyn.data import collect


def bare(env_id: str, steps: int, lanes: int) -> float:
    start = time.process_time()
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
    rate = rows / (time.process_time() - start)
    env.close()
    return rate


def ours(env_id: str, steps: int, lanes: int, dataset_id: str | None = None) -> float:
    start = time.process_time()
    collect(env_id, dataset_id, steps=steps, lanes=lanes, progress=False, overwrite=True)
    return steps / (time.process_time() - start)


def saved(env_id: str, steps: int, lanes: int) -> float:
    return ours(env_id, steps, lanes, "benchmark/ours-v0")


def minaris(env_id: str, steps: int, lanes: int) -> float:
    start = time.process_time()
    env = minari.DataCollector(gym.make(env_id))
    env.action_space.seed(0)
    actions = [env.action_space.sample() for _ in range(1024)]
    env.reset(seed=0)
    for step in range(steps):
        _, _, terminated, truncated, _ = env.step(actions[step % 1024])
        if terminated or truncated:
            env.reset()
    env.create_dataset("benchmark/minari-v0")
    rate = steps / (time.process_time() - start)
    shutil.rmtree(get_dataset_path("benchmark/minari-v0"))
    env.close()
    return rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--envs", nargs="+", default=["HalfCheetah-v5", "InvertedPendulum-v5"])
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--lanes", type=int, default=8)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)
    contestants: dict[str, Callable[[str, int, int], float]] = {"bare": bare, "collect": ours, "saved": saved}
    try:
        import jax.tree_util  # noqa: F401

        contestants["minari"] = minaris
    except ImportError:
        print("Minari's DataCollector is left out: it needs jax (pip install minari[create])")
    print(f"{'environment':22}{'contestant':12}{'steps/s':>10}{'x bare':>9}   (lanes {args.lanes}, CPU time, median)")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MINARI_DATASETS_PATH"] = folder
        for env_id in args.envs:
            rates: dict[str, list[float]] = {name: [] for name in contestants}
            for _ in range(args.repeats):
                for name, run in contestants.items():
                    rates[name].append(run(env_id, args.steps, args.lanes))
            for name, values in rates.items():
                ratio = statistics.median(v / b for v, b in zip(values, rates["bare"], strict=True))
                print(f"{env_id:22}{name:12}{statistics.median(values):10.0f}{ratio:9.2f}")


if __name__ == "__main__":
    main()
