"""The truth as a world: the real simulator behind the interface of a model, for every question that needs error-free
dynamics (what a policy earns in a perfect model, how far a learned model is off, what planning alone can do).

    truth = TruthDynamics("Hopper-v5")
    world = World(truth, tasks.get("Hopper-v5"))              # the task's functions judge, as they do for a model
    world = World(truth, Task("Hopper-v5"))                   # the environment's own reward and termination judge

A step equals ``env.step`` of the bare environment (no time limit), given the same state. The state lives in
``State.memory``, one float64 row per lane. Without memory a row starts from its observation through the task's codec,
and then `TruthDynamics.lost` says what the observation does not hold. Three ways to start exactly:
`TruthDynamics.reset` (seeded resets), `TruthDynamics.snapshot` (a running environment), or float64 observations that
hold everything.

A float32 observation moves the start by its rounding, up to 6e-8 of each entry. Smooth tasks hardly feel that; chaotic
ones amplify it exponentially: HalfCheetah under random actions is somewhere else altogether within 50 steps.
Observations and rewards come out in the dtype of the observations handed in, so that a float64 start gives a float64
trajectory.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from gymnasium.envs.classic_control import CartPoleEnv, Continuous_MountainCarEnv, PendulumEnv
from jaxtyping import Bool, Float, Int
from torch import Tensor

from learneddyn import tasks
from learneddyn.core import Outcome, Prediction, Task
from learneddyn.spaces import Spaces, decode

ROLLOUT_BYTES = 2**28
"""`TruthDynamics.open_loop` hands as many rows to one ``mujoco.rollout`` as keep its output below this."""


class OpenLoop(NamedTuple):
    """Where fixed actions lead. ``reward`` and ``terminated`` are None when only observations were asked for.

    The simulator goes on after a termination; what follows one is for the caller to ignore.
    """

    next_obs: Float[Tensor, "b h o"]
    reward: Float[Tensor, "b h"] | None = None
    terminated: Bool[Tensor, "b h"] | None = None


class TruthDynamics:
    """The real environment of a task as error-free `learneddyn.core.Dynamics`, one member, no noise.

    Rows are stepped one after the other in NumPy, on ``threads`` threads with one environment each; tensors may live on
    any device, but every step goes through the CPU. Answers come on the device of the observations asked about.

    Args:
        task: a task, or the id of one (`learneddyn.tasks.get`). Its ``real_id`` names the environment; its codec is
            needed only to start from observations.
        device: of `elites`, and so of the worlds and environments made of it.
        threads: environments that step side by side; by default one per CPU, made when rows need them.

    Raises:
        TypeError: an environment whose state cannot be set: not MuJoCo, CartPole, Pendulum or MountainCarContinuous.
        learneddyn.tasks.UnknownTask: no task has this id.
        ValueError: fewer than one thread.
    """

    num_members = 1

    def __init__(self, task: Task | str, *, device: torch.device | str = "cpu", threads: int | None = None) -> None:
        self.task = tasks.get(task) if isinstance(task, str) else task
        self.device = torch.device(device)
        self.threads = (os.cpu_count() or 1) if threads is None else threads
        if self.threads < 1:
            raise ValueError(f"threads must be at least 1, got {threads}")
        self._simulators = [_simulator(self.task.real_id)]
        self._pool = ThreadPoolExecutor(self.threads)
        env = self._simulators[0].env
        self.spaces: Spaces | None = Spaces(env.observation_space, env.action_space)

    @property
    def elites(self) -> Int[Tensor, " k"]:
        """The one member."""
        return torch.zeros(1, dtype=torch.long, device=self.device)

    @property
    def lost(self) -> str:
        """What a start from an observation does not restore, in words."""
        return "the whole state" if self.task.codec is None else self.task.codec.lost

    def reset(self, seeds: Sequence[int]) -> tuple[Float[Tensor, "b o"], Float[Tensor, "b m"]]:
        """Reset the environment with each of the seeds; return exact start observations (float64) and memory."""
        simulator = self._simulators[0]
        obs, memory = [], []
        for seed in seeds:
            obs.append(simulator.env.reset(seed=seed)[0])
            memory.append(simulator.state())
        return torch.as_tensor(np.asarray(obs, np.float64)), torch.as_tensor(np.stack(memory))

    def snapshot(self, env: gym.Env[Any, Any]) -> Float[Tensor, "1 m"]:
        """Return the memory of one row: the state that a running environment of the same id, wrapped or not, is in.

        Raises:
            ValueError: an environment of another kind.
        """
        own = self._simulators[0]
        if type(env.unwrapped) is not type(own.env):
            raise ValueError(
                f"snapshot needs an environment of {self.task.real_id} ({type(own.env).__name__}), got {env.unwrapped}"
            )
        return torch.as_tensor(type(own)(env.unwrapped).state())[None]

    def begin(self, obs: Float[Tensor, "b o"]) -> Float[Tensor, "b m"]:
        """Return the memory of rows that start from observations, as a fresh reset to that state would.

        Raises:
            ValueError: the task has no codec, so that observations do not determine a state.
        """
        if self.task.codec is None:
            raise ValueError(
                f"the task of {self.task.real_id} has no codec, so the truth cannot start from an observation; give "
                "the state instead: state._replace(memory=truth.snapshot(env)), or start from truth.reset(seeds)"
            )
        qpos, qvel = self.task.codec.to_simulator(obs)
        simulator = self._simulators[0]
        rows = []
        for position, velocity in zip(qpos, qvel, strict=True):
            simulator.place(position, velocity)
            rows.append(simulator.state())
        return torch.as_tensor(np.stack(rows), device=obs.device)

    def sample(
        self,
        obs: Float[Tensor, "b o"],
        action: Float[Tensor, "b a"],
        member: Int[Tensor, " b"],
        rng: torch.Generator,
        memory: Float[Tensor, "b m"] | None = None,
        *,
        noise: bool = True,
    ) -> Outcome:
        """Step every row as the environment does; ``member``, ``rng`` and ``noise`` change nothing.

        Raises:
            ValueError: no memory and no codec.
        """
        start = self.begin(obs) if memory is None else memory
        next_obs, reward, terminated, after = self._judged(start, action[:, None], obs)
        return Outcome(next_obs[:, 0], reward[:, 0], terminated[:, 0], after)

    def predict(
        self, obs: Float[Tensor, "b o"], action: Float[Tensor, "b a"], memory: Float[Tensor, "b m"] | None = None
    ) -> Prediction:
        """Return the step of `sample` as the prediction of one member with zero noise."""
        member = torch.zeros(len(obs), dtype=torch.long, device=obs.device)
        step = self.sample(obs, action, member, torch.Generator(), memory)
        assert step.reward is not None
        assert step.terminated is not None
        return Prediction(
            mean=step.next_obs[None],
            std=torch.zeros_like(step.next_obs)[None],
            elites=self.elites.to(obs.device),
            reward_mean=step.reward[None],
            reward_std=torch.zeros_like(step.reward)[None],
            terminated=step.terminated.to(obs.dtype)[None],
            memory=step.memory,
        )

    def open_loop(
        self,
        obs: Float[Tensor, "b o"],
        actions: Float[Tensor, "b h a"],
        memory: Float[Tensor, "b m"] | None = None,
        *,
        judged: bool = True,
    ) -> OpenLoop:
        """Follow fixed actions from every row.

        With ``judged=False`` only observations are returned; where all their columns are functions of positions and
        velocities (``codec.exact``) they come from ``mujoco.rollout``, which is faster and gives the same numbers.

        Raises:
            ValueError: no memory and no codec.
        """
        start = self.begin(obs) if memory is None else memory
        codec = self.task.codec
        exact = codec is not None and len(codec.exact) == obs.shape[1]
        if not judged and exact and isinstance(self._simulators[0], _Mujoco):
            return OpenLoop(self._rolled_out(start, actions, obs))
        next_obs, reward, terminated, _ = self._judged(start, actions, obs)
        return OpenLoop(next_obs, reward, terminated) if judged else OpenLoop(next_obs)

    def close(self) -> None:
        """Close the environments and the threads."""
        self._pool.shutdown()
        for simulator in self._simulators:
            simulator.env.close()

    def _judged(self, memory: Tensor, actions: Tensor, like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Step every row through the environment itself, rows shared out among the threads."""
        assert self.spaces is not None
        (rows, horizon, width), states = actions.shape, memory.detach().cpu().numpy()
        flat = actions.detach().cpu().numpy().reshape(rows * horizon, width)
        moves = decode(self.spaces.action, flat)
        moves = moves.reshape(rows, horizon, *moves.shape[1:])
        while len(self._simulators) < min(rows, self.threads):
            self._simulators.append(_simulator(self.task.real_id))
        workers = self._simulators[:rows]
        shares = np.array_split(np.arange(rows), len(workers))
        parts = self._pool.map(_follow, workers, [states[i] for i in shares], [moves[i] for i in shares])
        next_obs, reward, terminated, after = (np.concatenate(column) for column in zip(*parts, strict=True))
        return (
            torch.as_tensor(next_obs, dtype=like.dtype, device=like.device),
            torch.as_tensor(reward, dtype=like.dtype, device=like.device),
            torch.as_tensor(terminated, device=like.device),
            torch.as_tensor(after, device=like.device),
        )

    def _rolled_out(self, memory: Tensor, actions: Tensor, like: Tensor) -> Float[Tensor, "b h o"]:
        """Step every row with ``mujoco.rollout`` and rebuild observations from positions and velocities."""
        from mujoco import MjData, rollout

        simulator, codec = self._simulators[0], self.task.codec
        assert isinstance(simulator, _Mujoco)
        assert codec is not None
        model, skip = simulator.env.model, simulator.env.frame_skip
        physics, warmstart = simulator.split(memory.detach().cpu().numpy())
        control = actions.detach().cpu().numpy().astype(np.float64)
        rows, horizon = actions.shape[:2]
        datas = [MjData(model) for _ in range(min(rows, self.threads))]
        share = max(1, ROLLOUT_BYTES // (8 * horizon * skip * physics.shape[1]))
        parts = []
        for first in range(0, rows, share):
            i = slice(first, first + share)
            states, _ = rollout.rollout(
                model, datas, physics[i], control[i].repeat(skip, axis=1), initial_warmstart=warmstart[i]
            )
            ends = states[:, skip - 1 :: skip].reshape(-1, physics.shape[1])
            next_obs = codec.from_simulator(*simulator.joints(ends), dtype=like.dtype)
            assert next_obs is not None
            parts.append(next_obs.reshape(len(states), horizon, -1))
        return torch.cat(parts).to(like.device)


class _Mujoco:
    """One MuJoCo environment whose state can be read, written, and stepped.

    The state is all of MuJoCo's physics, the solver's warm start, and the positions of bodies and of their centres of
    mass: ``env.step`` takes displacement rewards from those, and they lag one substep behind the joints.
    """

    def __init__(self, env: Any) -> None:
        import mujoco

        self.env, self._mujoco = env, mujoco
        self._physics = int(mujoco.mjtState.mjSTATE_FULLPHYSICS)
        self._size = mujoco.mj_stateSize(env.model, self._physics)

    def state(self) -> np.ndarray:
        physics = np.empty(self._size)
        self._mujoco.mj_getState(self.env.model, self.env.data, physics, self._physics)
        data = self.env.data
        return np.concatenate([physics, data.qacc_warmstart, data.xpos.ravel(), data.xipos.ravel()])

    def restore(self, state: np.ndarray) -> None:
        data, bodies = self.env.data, self.env.data.xpos.size
        physics, warmstart = self.split(state[None])
        self._mujoco.mj_setState(self.env.model, data, physics[0], self._physics)
        data.qacc_warmstart[:] = warmstart[0]
        data.xpos.flat = state[-2 * bodies : -bodies]
        data.xipos.flat = state[-bodies:]

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        return self.env.step(action)

    def place(self, qpos: np.ndarray, qvel: np.ndarray) -> None:
        self._mujoco.mj_resetData(self.env.model, self.env.data)
        self.env.set_state(qpos, qvel)

    def split(self, states: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return physics and warm start of rows of states."""
        return states[:, : self._size], states[:, self._size : self._size + self.env.model.nv]

    def joints(self, states: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return qpos and qvel of rows of states or of physics; the time comes first."""
        model = self.env.model
        return states[:, 1 : 1 + model.nq], states[:, 1 + model.nq : 1 + model.nq + model.nv]


class _Classic:
    """One classic-control environment. The state carries its own precision: a reset may make float64, a step float32.

    CartPole pays nothing after its first terminal step; a row here has no such past, so every step pays.
    """

    def __init__(self, env: Any) -> None:
        self.env = env

    def state(self) -> np.ndarray:
        state = np.asarray(self.env.state)
        return np.concatenate([[state.itemsize], state]).astype(np.float64)

    def restore(self, state: np.ndarray) -> None:
        self.env.state = state[1:].astype(f"f{int(state[0])}")

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        if isinstance(self.env, CartPoleEnv):
            self.env.steps_beyond_terminated = None
        return self.env.step(action)

    def place(self, qpos: np.ndarray, qvel: np.ndarray) -> None:
        self.env.state = np.stack([qpos, qvel], axis=1).ravel()


def _simulator(real_id: str) -> _Mujoco | _Classic:
    from gymnasium.envs.mujoco.mujoco_env import MujocoEnv

    env = gym.make(real_id, disable_env_checker=True)
    env.reset(seed=0)
    bare = env.unwrapped
    if isinstance(bare, MujocoEnv):
        return _Mujoco(bare)
    if isinstance(bare, CartPoleEnv | PendulumEnv | Continuous_MountainCarEnv):
        return _Classic(bare)
    raise TypeError(
        f"the truth needs an environment whose state can be set: one of MuJoCo, or CartPole, Pendulum, "
        f"MountainCarContinuous of classic control; {real_id} is {type(bare).__module__}.{type(bare).__qualname__}"
    )


def _follow(
    simulator: _Mujoco | _Classic, states: np.ndarray, moves: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Restore every row's state and step it through its moves ``[b, h, ...]``."""
    rows, horizon = moves.shape[:2]
    env, after = simulator.env, np.empty_like(states)
    next_obs = np.empty((rows, horizon, *env.observation_space.shape))
    reward, terminated = np.empty((rows, horizon)), np.empty((rows, horizon), bool)
    for row in range(rows):
        simulator.restore(states[row])
        for t in range(horizon):
            next_obs[row, t], reward[row, t], terminated[row, t], _, _ = simulator.step(moves[row, t])
        after[row] = simulator.state()
    return next_obs, reward, terminated, after
