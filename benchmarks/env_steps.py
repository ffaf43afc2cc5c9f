"""Steps per second inside a learned world, through every interface, beside MuJoCo's own rate.

    python benchmarks/env_steps.py [--threads 1] [--seconds 0.2] [--rounds 5]

The model is the default ensemble (7 networks of 4 x 200, 5 elites; one answers per lane and step) of HalfCheetah-v5. It
is fitted for one epoch: its quality plays no part. A row is an environment step (lanes x steps). Actions are random and
drawn beforehand; episodes end and restart as they do in training. `mujoco.rollout` is open-loop physics only: no
observation, reward or termination.

The second table is the time per call that an interface adds: the same step calls on a world that computes nothing,
beside the NumPy calls that no vector environment can leave out.
"""

import warnings
from collections.abc import Callable
from itertools import cycle
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import mujoco
import numpy as np
import torch
from contest import Contestant, Row, Turns, lanes_of, main, missing
from mujoco import rollout
from torch import Tensor

from learneddyn import data, tasks
from learneddyn.core import State, Step, generator
from learneddyn.envs import LearnedEnv, LearnedVecEnv, LearnedVectorEnv
from learneddyn.models.ensemble import ProbabilisticEnsemble
from learneddyn.spaces import Spaces
from learneddyn.world import World

ENV, LANES = "HalfCheetah-v5", (1, 256, 4096)
STEPS, INTERFACE = "Environment steps", "An interface alone, on a world that computes nothing"


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


def interfaces(world: Any, lanes: int) -> list[Contestant]:
    """The step calls of every view of ``world``; a null world, which ends no episode, serves them as well."""
    rng = np.random.default_rng(0)
    space = world.spaces.action
    actions = [rng.uniform(space.low, space.high, (lanes, *space.shape)).astype(space.dtype) for _ in range(64)]
    field = []
    if lanes == 1:
        single, single_actions = LearnedEnv(world), cycle([action[0] for action in actions])
        single.reset(seed=0)

        def step_single() -> None:
            *_, terminated, truncated, _ = single.step(next(single_actions))
            if terminated or truncated:
                single.reset()

        field.append(Contestant("LearnedEnv", lanes_of(1), 1, step_single))
    for name, output in (("LearnedVectorEnv", "numpy"), ("LearnedVectorEnv, torch out", "torch")):
        vector = LearnedVectorEnv(world, lanes, output=output)
        vector.reset(seed=0)
        field.append(Contestant(name, lanes_of(lanes), lanes, _stepping(vector.step, actions)))
    sb3 = LearnedVecEnv(world, lanes)
    sb3.reset()
    field.append(Contestant("LearnedVecEnv (SB3)", lanes_of(lanes), lanes, _stepping(sb3.step, actions)))
    return field


def copies(spaces: Spaces, lanes: int) -> Contestant:
    """What no vector environment can leave out: is every action within bounds? Then results in fresh NumPy memory."""
    rng = np.random.default_rng(0)
    low, high = spaces.action.low.min(), spaces.action.high.max()
    actions = [rng.uniform(low, high, (lanes, spaces.action_dim)).astype(np.float32) for _ in range(64)]
    obs, reward = torch.zeros(lanes, spaces.obs_dim), torch.zeros(lanes)

    def step(action: np.ndarray) -> tuple[Any, ...]:
        assert np.minimum.reduce(action, axis=None) >= low
        assert np.maximum.reduce(action, axis=None) <= high
        flags = np.zeros(lanes, np.bool_)
        return np.array(obs.numpy(), spaces.observation.dtype), reward.numpy().astype(np.float64), flags

    return Contestant("check and copies alone fp32", lanes_of(lanes), lanes, _stepping(step, actions))


def bare_world(name: str, world: World, lanes: int) -> Contestant:
    rng = generator(0)
    start = world.start(world.initial(lanes, rng), rng)
    action = torch.rand(lanes, world.spaces.action_dim, generator=rng) * 2 - 1
    steps = cycle(range(50))
    state = start

    @torch.no_grad()
    def step() -> None:
        nonlocal state
        state, _ = world.step(start if next(steps) == 0 else state, action, rng)

    return Contestant(name, lanes_of(lanes), lanes, step)


def gym_env() -> Contestant:
    env = gym.make(ENV)
    env.action_space.seed(0)
    actions = cycle([env.action_space.sample() for _ in range(64)])
    env.reset(seed=0)

    def step() -> None:
        *_, terminated, truncated, _ = env.step(next(actions))
        if terminated or truncated:
            env.reset()

    return Contestant("gym.make", "", 1, step, peer=True)


def sync_vector_env(lanes: int) -> Contestant:
    env = gym.make_vec(ENV, num_envs=lanes, vectorization_mode="sync")
    env.action_space.seed(0)
    env.reset(seed=0)
    steps = _stepping(env.step, [env.action_space.sample() for _ in range(64)])
    return Contestant("SyncVectorEnv", lanes_of(lanes), lanes, steps)


def mujoco_rollout(lanes: int, horizon: int, threads: int) -> Contestant:
    env = gym.make(ENV).unwrapped
    env.reset(seed=0)
    size = mujoco.mj_stateSize(env.model, mujoco.mjtState.mjSTATE_FULLPHYSICS)
    state = np.empty(size)
    mujoco.mj_getState(env.model, env.data, state, mujoco.mjtState.mjSTATE_FULLPHYSICS)
    shape = (lanes, horizon * env.frame_skip, env.model.nu)
    control = np.random.default_rng(0).uniform(-1, 1, shape)
    model, scratch = env.model, [mujoco.MjData(env.model) for _ in range(threads)]
    pool = rollout.Rollout(nthread=threads if threads > 1 else 0)
    call = lambda: pool.rollout(model, scratch, state, control)  # noqa: E731
    return Contestant("mujoco.rollout", "", lanes * horizon, call, peer=True)


def envpool_env(lanes: int, threads: int) -> Contestant:
    import envpool

    env = envpool.make(ENV, env_type="gymnasium", num_envs=lanes, num_threads=threads)
    env.reset()
    rng = np.random.default_rng(0)
    actions = [rng.uniform(-1, 1, (lanes, *env.action_space.shape)) for _ in range(64)]
    return Contestant("envpool", "", lanes, _stepping(env.step, actions), peer=True)


def _stepping(step: Callable[[Any], Any], actions: list[Any]) -> Callable[[], Any]:
    turns = cycle(actions)
    return lambda: step(next(turns))


def fitted_worlds() -> list[World]:
    """One in fp32, one in bf16."""
    task, worlds = tasks.get(ENV), []
    rows = data.collect(ENV, None, steps=5000, lanes=4, progress=False)
    for precision in ("fp32", "bf16"):
        model = ProbabilisticEnsemble(
            learn_reward=task.reward is None, angles=task.angles, max_epochs=1, precision=precision
        )
        model.fit(rows, rng=generator(0))
        worlds.append(World(model, task))
    return worlds


def measure(turns: Turns) -> list[Row]:
    warnings.filterwarnings("ignore", category=UserWarning)
    world, half = fitted_worlds()
    field = [gym_env(), sync_vector_env(8), mujoco_rollout(256, 4, turns.threads)]
    absent = []
    try:
        field.append(envpool_env(256, turns.threads))
    except ImportError as error:
        absent = [missing(STEPS, "envpool", error)]
    for lanes in LANES:
        field += [bare_world("World.step", world, lanes), bare_world("World.step bf16", half, lanes)]
        field += interfaces(world, lanes)
    rows = turns.contest(STEPS, field)
    empty = [one for lanes in LANES for one in interfaces(NullWorld(world.spaces, lanes), lanes)]
    empty += [copies(world.spaces, lanes) for lanes in LANES[1:]]
    return rows + absent + turns._replace(seconds=min(turns.seconds, 0.1)).contest(INTERFACE, empty)


if __name__ == "__main__":
    main(measure, __doc__)
