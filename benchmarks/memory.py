"""Peak memory of an offline run on a million logged transitions, beyond what importing torch takes.

    python benchmarks/memory.py [--rows 1000000] [--updates 200]

Sizes are those of HalfCheetah. One process makes random transitions, fits the default ensemble on all of them for one
epoch, puts them into a replay of a million rows, imagines 50 000 rollouts of 5 steps into a pool of 250 000 rows, and
trains SAC on both. The figures are the process's high-water marks (resident memory) after each stage, less that of a
process that only imports torch.
"""

import multiprocessing
import resource
import sys
from collections.abc import Callable
from typing import Any

from contest import Row, Turns, main

TABLE, GIB = "Peak memory of an offline run", 2**30
STARTS, STEPS = 50_000, 5


def peak() -> int:
    """Return the high-water mark of this process's resident memory in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def torch_alone() -> list[tuple[str, int]]:
    import torch

    torch.zeros(1)
    return [("torch alone", peak())]


def offline_run(rows: int, updates: int, threads: int) -> list[tuple[str, int]]:
    import torch
    from rollout import inputs
    from stable_baselines3.common.logger import configure

    from learneddyn.agents import MBPO
    from learneddyn.core import Transitions, generator
    from learneddyn.models import ProbabilisticEnsemble
    from learneddyn.spaces import Spaces

    torch.set_num_threads(threads)
    model = ProbabilisticEnsemble(learn_reward=True, max_epochs=1)
    agent = MBPO(
        "MlpPolicy",
        "HalfCheetah-v5",
        model=model,
        buffer_size=rows,
        rollout_batch=STARTS,
        schedule=(0, 1, STEPS, STEPS),
        diagnose=False,
        device="cpu",
        seed=0,
    )
    agent.set_logger(configure(None, []))
    stages = [("imports, agent", peak())]
    obs, action = inputs(rows)
    never, episode = torch.zeros(rows, dtype=torch.bool), torch.arange(rows)
    spaces = Spaces(agent.observation_space, agent.action_space)
    data = Transitions(obs, action, obs[:, 0], obs + 0.1 * torch.randn(obs.shape), never, episode, spaces)
    stages.append(("+ transitions", peak()))
    model.fit(data, rng=generator(0))
    stages.append(("+ one epoch of the ensemble", peak()))
    agent.replay_buffer.real.add(data)
    stages.append(("+ replay", peak()))
    agent.world = agent.make_world()
    agent.imagine()
    stages.append(("+ imagination", peak()))
    agent.train(updates, 256)
    stages.append(("+ SAC updates", peak()))
    return stages


def measure(turns: Turns, rows: int = 1_000_000, updates: int = 200) -> list[Row]:
    (_, base), *_ = _alone(torch_alone)
    stages = _alone(offline_run, rows, updates, turns.threads)
    beyond = [(name, (total - base) / GIB) for name, total in stages]
    return [Row(TABLE, name, f"{rows} rows", note=f"{amount:.2f} GiB", amount=amount) for name, amount in beyond]


def _alone(work: Callable[..., Any], *args: Any) -> Any:
    """Return ``work(*args)``, called in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, args)


if __name__ == "__main__":
    main(measure, __doc__, rows=1_000_000, updates=200)
