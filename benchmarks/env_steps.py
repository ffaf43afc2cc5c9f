"""Steps per second inside a learned world, through every interface, beside MuJoCo's own rate.

    python benchmarks/env_steps.py [--env HalfCheetah-v5] [--lanes 1 256 4096] [--seconds 0.3] [--rounds 7]

The model is the default ensemble (7 networks of 4 x 200, 5 elites; one answers per lane and step) with the heads that
the task needs. It is fitted for one epoch: its quality plays no part. Rates are environment steps (lanes x steps) per
second of CPU time of this process on one thread. The contestants take turns, so that a busy machine slows all of them;
the tables show the median over the rounds. Actions are random and drawn beforehand; episodes end and restart as they do
in training.

The second table is the time per call that an interface adds: the same step calls on a world that computes nothing.
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from itertools import cycle
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import mujoco
import numpy as np
import torch
from mujoco import rollout
from torch import Tensor

from learneddyn import data, tasks
from learneddyn.core import State, Step, generator
from learneddyn.envs import LearnedEnv, LearnedVecEnv, LearnedVectorEnv
from learneddyn.models.ensemble import ProbabilisticEnsemble
from learneddyn.spaces import Spaces
from learneddyn.world import World

Contestant = tuple[int, Callable[[], Any]]
"""Environment steps per call, and the call."""


class NullWorld:
    """Stands where a World stands and computes nothing: what is left is the interface's own time."""

    def __init__(self, spaces: Spaces, lanes: int) -> None:
        self.spaces, self.task = spaces, SimpleNamespace(max_episode_steps=10**9, initial=self.initial)
        self.dynamics = SimpleNamespace(elites=torch.zeros(1, dtype=torch.long))
        flags = torch.zeros(lanes, dtype=torch.bool)
        self.state = State(torch.zeros(lanes, spaces.obs_dim), torch.zeros(lanes, dtype=torch.long))
        self.result = Step(torch.zeros(lanes), flags, ~flags)

    def initial(self, lanes: int, rng: torch.Generator) -> Tensor:
        """Return zeros."""
        return torch.zeros(lanes, self.spaces.obs_dim)

    def start(self, obs: Tensor, rng: torch.Generator) -> State:
        """Return the one state there is."""
        return self.state

    def step(self, state: State, action: Tensor, rng: torch.Generator) -> tuple[State, Step]:
        """Return the one state there is, and a step in which nothing ends."""
        return self.state, self.result


def interfaces(world: Any, lanes: int) -> dict[str, Contestant]:
    """The step calls of every view of ``world``; a null world, which ends no episode, serves them as well."""
    rng = np.random.default_rng(0)
    space = world.spaces.action
    actions = [rng.uniform(space.low, space.high, (lanes, *space.shape)).astype(space.dtype) for _ in range(64)]
    calls: dict[str, Contestant] = {}
    if lanes == 1:
        single, single_actions = LearnedEnv(world), cycle([action[0] for action in actions])
        single.reset(seed=0)

        def step_single() -> None:
            *_, terminated, truncated, _ = single.step(next(single_actions))
            if terminated or truncated:
                single.reset()

        calls["LearnedEnv"] = (1, step_single)
    for name, output in (("LearnedVectorEnv", "numpy"), ("LearnedVectorEnv, torch out", "torch")):
        vector = LearnedVectorEnv(world, lanes, output=output)
        vector.reset(seed=0)
        calls[name] = (lanes, _stepping(vector.step, actions))
    sb3 = LearnedVecEnv(world, lanes)
    sb3.reset()
    calls["LearnedVecEnv (SB3)"] = (lanes, _stepping(sb3.step, actions))
    return calls


def bare_world(world: World, lanes: int) -> Contestant:
    rng = generator(0)
    start = world.start(world.initial(lanes, rng), rng)
    action = torch.rand(lanes, world.spaces.action_dim, generator=rng) * 2 - 1
    steps = cycle(range(50))
    state = start

    @torch.no_grad()
    def step() -> None:
        nonlocal state
        state, _ = world.step(start if next(steps) == 0 else state, action, rng)

    return lanes, step


def gym_env(env_id: str) -> Contestant:
    env = gym.make(env_id)
    env.action_space.seed(0)
    actions = cycle([env.action_space.sample() for _ in range(64)])
    env.reset(seed=0)

    def step() -> None:
        *_, terminated, truncated, _ = env.step(next(actions))
        if terminated or truncated:
            env.reset()

    return 1, step


def sync_vector_env(env_id: str, lanes: int) -> Contestant:
    env = gym.make_vec(env_id, num_envs=lanes, vectorization_mode="sync")
    env.action_space.seed(0)
    env.reset(seed=0)
    return lanes, _stepping(env.step, [env.action_space.sample() for _ in range(64)])


def mujoco_rollout(env_id: str, lanes: int, horizon: int) -> Contestant:
    """Open-loop physics only: no observation, reward or termination, on one thread."""
    env = gym.make(env_id).unwrapped
    env.reset(seed=0)
    size = mujoco.mj_stateSize(env.model, mujoco.mjtState.mjSTATE_FULLPHYSICS)
    state = np.empty(size)
    mujoco.mj_getState(env.model, env.data, state, mujoco.mjtState.mjSTATE_FULLPHYSICS)
    shape = (lanes, horizon * env.frame_skip, env.model.nu)
    control = np.random.default_rng(0).uniform(-1, 1, shape)
    model, scratch = env.model, mujoco.MjData(env.model)
    return lanes * horizon, lambda: rollout.rollout(model, scratch, state, control)


def _stepping(step: Callable[[Any], Any], actions: list[Any]) -> Callable[[], Any]:
    turns = cycle(actions)
    return lambda: step(next(turns))


def measure(contestants: dict[str, Contestant], seconds: float, rounds: int) -> dict[str, float]:
    """Median CPU seconds per call of every contestant, from turns of about ``seconds``."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    calls = {name: max(1, round(seconds / _timed(call, 3))) for name, (_, call) in contestants.items()}
    for turn in range(rounds + 1):
        for name, (_, call) in contestants.items():
            each = _timed(call, calls[name])
            if turn:
                times[name].append(each)
            else:  # the first turn warms up and corrects the number of calls
                calls[name] = max(1, round(seconds / each))
    return {name: statistics.median(values) for name, values in times.items()}


def _timed(call: Callable[[], Any], calls: int) -> float:
    start = time.process_time()
    for _ in range(calls):
        call()
    return (time.process_time() - start) / calls


def fitted_world(env_id: str) -> World:
    task = tasks.get(env_id)
    model = ProbabilisticEnsemble(
        learn_reward=task.reward is None,
        learn_termination=task.terminated is None,
        angles=task.angles,
        max_epochs=1,
    )
    logs = data.collect(env_id, None, steps=5000, lanes=4, progress=False)
    model.fit(logs, rng=generator(0))
    return World(model, task)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="HalfCheetah-v5", help="a MuJoCo environment with a task")
    parser.add_argument("--lanes", type=int, nargs="+", default=[1, 256, 4096])
    parser.add_argument("--seconds", type=float, default=0.3, help="CPU time of a turn")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)
    torch.set_num_threads(1)
    world = fitted_world(args.env)

    rated: dict[str, Contestant] = {
        "gym.make, 1 lane": gym_env(args.env),
        "SyncVectorEnv, 8 lanes": sync_vector_env(args.env, 8),
        "mujoco.rollout, 256 lanes": mujoco_rollout(args.env, 256, 4),
    }
    for lanes in args.lanes:
        rated[f"World.step, {lanes}"] = bare_world(world, lanes)
        rated |= {f"{name}, {lanes}": call for name, call in interfaces(world, lanes).items()}
    spent = measure(rated, args.seconds, args.rounds)
    rates = {name: rated[name][0] / seconds for name, seconds in spent.items()}
    real = rates["gym.make, 1 lane"]
    print(f"{args.env}, {torch.get_num_threads()} thread, torch {torch.__version__}, mujoco {mujoco.__version__}\n")
    print(f"{'interface, lanes':34} {'steps/s':>10} {'us/call':>10} {'x gym.make':>11}")
    for name, rate in rates.items():
        print(f"{name:34} {rate:10,.0f} {spent[name] * 1e6:10,.1f} {rate / real:11.2f}")

    print(f"\n{'interface alone, lanes':34} {'us/call':>10}")
    for lanes in args.lanes:
        for name, seconds in measure(interfaces(NullWorld(world.spaces, lanes), lanes), 0.1, args.rounds).items():
            print(f"{f'{name}, {lanes}':34} {seconds * 1e6:10,.1f}")


if __name__ == "__main__":
    main()
