"""Collect transitions from real environments, single or vectorised, at nearly the speed of the bare vector env.

Rows are written straight into preallocated columns, random actions are drawn many steps ahead in one call, and no
Python runs per lane beside the environments' own. The next observation of a row is always the one its step returned:
a reset never becomes a transition, whatever autoreset mode the vector env has.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.vector.utils import batch_space, concatenate, create_empty_array, iterate
from tqdm import tqdm

from learneddyn.core import Policy, Transitions
from learneddyn.data.minari import check_free, save
from learneddyn.spaces import Spaces, decode, encode

EnvSource = str | EnvSpec | Callable[[], gym.Env[Any, Any]] | gym.Env[Any, Any] | VectorEnv[Any, Any, Any]
Behaviour = str | Policy
Mixture = Sequence[tuple[float, Behaviour]]

_AHEAD = 4096
"""Random actions, and reset seeds, drawn in one call."""


def collect(
    env: EnvSource,
    dataset_id: str | None = None,
    *,
    steps: int,
    behaviour: Behaviour | Mixture = "random",
    deterministic: bool = False,
    epsilon: float = 0.0,
    noise: float = 0.0,
    lanes: int = 8,
    seed: int = 0,
    progress: bool = True,
    env_kwargs: dict[str, Any] | None = None,
    eval_env: str | EnvSpec | None = None,
    algorithm: str | None = None,
    description: str | None = None,
    overwrite: bool = False,
) -> Transitions:
    """Take exactly ``steps`` real steps and return them, and write them as a Minari data set if it is given an id.

    Episodes are numbered in the order in which they start (lanes of one step from left to right); the last one of each
    lane is cut off, not terminated. The same arguments give the same rows. With an id, a function or a single env, each
    episode has its own reset seed, stored in the Minari data set, so that any of them can be replayed alone. Actions
    are rounded to float32 before they are executed, so that the stored action is the executed one. Minari's
    ``recover_environment`` makes one env of the kind stepped here, if the env or vector env has a spec.

    Memory: ``8 (2 o + a + 1) + 18`` bytes a step at the end (o, a: flat columns of observation and action).

    Args:
        env: Gymnasium id or spec, a function that makes one env, an env, or a vector env of any autoreset mode. An env
            or vector env handed in stays open.
        dataset_id: ``(namespace/)name-v0``, or None to write nothing.
        steps: transitions in all.
        behaviour: ``"random"`` (uniform over the action space), a policy with Stable-Baselines3's ``predict``, or a
            mixture of them, ``[(weight, behaviour), ...]``, drawn anew for each episode.
        deterministic: ask policies for their mode instead of a sample.
        epsilon: probability that a policy's action is replaced by a uniform one, drawn for each step.
        noise: standard deviation of Gaussian noise on a policy's action, as a fraction of half the action range; the
            sum is clipped to the range. Bounded Box actions only.
        lanes: environments stepped side by side, at most ``steps``; a single env has one, a vector env has its own.
        seed: seeds the environments, the random actions and the sampling of PyTorch policies.
        progress: show a progress bar.
        env_kwargs: arguments for ``gym.make`` when ``env`` is an id or a spec.
        eval_env: environment for Minari's ``recover_environment(eval_env=True)``.
        algorithm: name of what acted, for the Minari data set.
        description: one sentence for the reader of the Minari data set.
        overwrite: replace a data set of the same id.

    Raises:
        DatasetExists: the id is taken and ``overwrite`` is False; nothing is collected.
        ValueError: a number out of its range, an action outside the action space, or an unknown behaviour.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if lanes < 1:
        raise ValueError(f"lanes must be at least 1, got {lanes}")
    if dataset_id is not None:
        check_free(dataset_id, overwrite=overwrite)
    vector = _vector(env, min(lanes, steps), env_kwargs or {})
    try:
        actor = _Actor(vector, behaviour, deterministic, epsilon, noise, seed)
        # Policies sample from PyTorch's global generator; the caller's stream must not notice.
        with (
            torch.random.fork_rng(),
            tqdm(total=steps, desc="collect", unit="step", disable=None if progress else True) as bar,
        ):
            torch.manual_seed(seed)
            data, seeds = _roll(vector, actor, steps, seed, bar)
        if dataset_id is not None:
            named = {"algorithm": algorithm, "description": description, "eval_env": eval_env, "overwrite": overwrite}
            save(data, dataset_id, env_id=_single_spec(vector), seeds=seeds, **named)  # type: ignore[arg-type]
            data = Transitions(**data.tensors(), spaces=data.spaces, source=dataset_id)
        return data
    finally:
        if not isinstance(env, gym.Env | VectorEnv):
            vector.close()


class _Lanes(VectorEnv[Any, Any, Any]):
    """Environments stepped in turn, without what SyncVectorEnv adds and nobody needs here: infos, copies, autoreset."""

    def __init__(self, makers: Sequence[Callable[[], gym.Env[Any, Any]]]) -> None:
        self.metadata = {"autoreset_mode": AutoresetMode.DISABLED}
        self.envs = [make() for make in makers]
        first, self.num_envs = self.envs[0], len(self.envs)
        self.spec = first.spec
        self.single_observation_space, self.single_action_space = first.observation_space, first.action_space
        for env in self.envs:
            if (env.observation_space, env.action_space) != (first.observation_space, first.action_space):
                raise ValueError(f"all lanes must have the same spaces, got {first} and {env}")
        self.action_space = batch_space(first.action_space, self.num_envs)
        self.items: list[Any] = [None] * self.num_envs
        self.batch: Any = create_empty_array(first.observation_space, self.num_envs)
        # Rows of one array are written in place; a Dict or Tuple is put together anew.
        self.rows = self.batch if isinstance(self.batch, np.ndarray) else self.items
        self.reward, self.ends = np.zeros(self.num_envs), np.zeros((2, self.num_envs), bool)

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Reset the lanes of ``options["reset_mask"]``, or all, with one seed for each lane."""
        for lane, lane_seed in enumerate(seed):
            if options is None or options["reset_mask"][lane]:
                self.rows[lane], _ = self.envs[lane].reset(seed=lane_seed)
        return self._observations(), {}

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Step every lane; the arrays returned are overwritten by the next call."""
        rows, reward, (terminated, truncated) = self.rows, self.reward, self.ends
        for lane, action in enumerate(iterate(self.action_space, actions)):
            rows[lane], reward[lane], terminated[lane], truncated[lane], _ = self.envs[lane].step(action)
        return self._observations(), reward, terminated, truncated, {}

    def _observations(self) -> Any:
        if self.rows is self.items:
            self.batch = concatenate(self.single_observation_space, self.items, self.batch)
        return self.batch

    def close_extras(self, **kwargs: Any) -> None:
        """Close the environments."""
        for env in self.envs:
            env.close()


def _vector(env: EnvSource, lanes: int, kwargs: dict[str, Any]) -> VectorEnv[Any, Any, Any]:
    if isinstance(env, VectorEnv):
        if not isinstance(env.metadata.get("autoreset_mode"), AutoresetMode):
            raise ValueError(f"{env} must state its autoreset mode in metadata['autoreset_mode'] (an AutoresetMode)")
        return env
    if isinstance(env, gym.Env):
        makers: list[Callable[[], gym.Env[Any, Any]]] = [lambda: env]
    elif isinstance(env, str | EnvSpec):
        makers = [lambda: gym.make(env, **kwargs)] * lanes
    else:
        makers = [env] * lanes
    return _Lanes(makers)


def _single_spec(vector: VectorEnv[Any, Any, Any]) -> EnvSpec | None:
    """Return the spec of one environment of the vector, or None if it was not made from a spec."""
    if isinstance(vector, _Lanes | SyncVectorEnv):
        return _writable(vector.envs[0].spec)
    spec = deepcopy(vector.spec)
    if spec is None or "wrappers" in spec.kwargs:
        return None
    for name in ("num_envs", "vectorization_mode", "vector_kwargs"):
        spec.kwargs.pop(name, None)
    spec.max_episode_steps = spec.kwargs.pop("max_episode_steps", spec.max_episode_steps)
    return _writable(spec)


def _writable(spec: EnvSpec | None) -> EnvSpec | None:
    """Return the spec, or None with a warning where Gymnasium cannot write it: the steps taken are worth more."""
    if spec is None:
        return None
    try:
        spec.to_json()
    except (ValueError, TypeError) as error:
        warnings.warn(
            f"Minari's recover_environment will not know {spec.id}, whose spec cannot be written ({error}); register "
            "it with entry_point='module:Class' and plain keyword arguments",
            stacklevel=4,
        )
        return None
    return spec


class _Actor:
    """Flat actions for all lanes; which behaviour a lane follows is drawn when its episode starts."""

    def __init__(
        self,
        vector: VectorEnv[Any, Any, Any],
        behaviour: Behaviour | Mixture,
        deterministic: bool,
        epsilon: float,
        noise: float,
        seed: int,
    ) -> None:
        single = isinstance(behaviour, str) or not isinstance(behaviour, Sequence)
        mixture: Mixture = [(1.0, behaviour)] if single else behaviour  # type: ignore[assignment, list-item]
        for entry in mixture:
            if not (isinstance(entry, tuple) and len(entry) == 2 and entry[0] > 0):
                raise ValueError(f"a mixture is a list of (weight > 0, behaviour), got the entry {entry!r}")
            if entry[1] != "random" and not hasattr(entry[1], "predict"):
                raise ValueError(f"a behaviour is 'random' or a policy with a predict method, got {entry[1]!r}")
        if not mixture:
            raise ValueError("a mixture needs at least one (weight, behaviour)")
        if not 0.0 <= epsilon <= 1.0:
            raise ValueError(f"epsilon must be between 0 and 1, got {epsilon}")
        if noise < 0.0:
            raise ValueError(f"noise must not be negative, got {noise}")
        self.space, self.lanes = vector.single_action_space, vector.num_envs
        self.bounds = _bounds(self.space)
        if noise and self.bounds is None:
            raise ValueError(f"noise needs a bounded Box action space, got {self.space}; use epsilon instead")
        self.deterministic, self.epsilon, self.noise = deterministic, epsilon, noise
        self.policies = [None if isinstance(entry[1], str) else entry[1] for entry in mixture]
        weights = np.array([weight for weight, _ in mixture], float)
        self.share = weights / weights.sum()
        self.memory: list[Any] = [None] * len(self.policies)
        self.which = np.zeros(self.lanes, int)
        self.rng = np.random.default_rng(seed)
        self.ahead = max(1, _AHEAD // self.lanes)
        self.source = batch_space(self.space, self.ahead * self.lanes)
        self.source.seed(seed)
        self.drawn, self.next = np.empty((0, 0, 0), np.float32), self.ahead

    def act(self, obs: Any, started: np.ndarray) -> np.ndarray:
        """Return actions ``[lanes, flat]`` for observations in the env's own form; ``started`` marks first steps."""
        if len(self.policies) > 1 and np.count_nonzero(started):
            self.which[started] = self.rng.choice(len(self.policies), started.sum(), p=self.share)
        uniform = self._uniform()
        if self.policies == [None]:
            return uniform
        action = uniform.copy()
        for index, policy in enumerate(self.policies):
            mine = self.which == index
            if policy is not None and mine.any():
                chosen, self.memory[index] = policy.predict(obs, self.memory[index], started, self.deterministic)
                action[mine] = self._disturb(self._checked(chosen, policy), uniform)[mine]
        return action

    def _uniform(self) -> np.ndarray:
        if self.next == self.ahead:
            flat = encode(self.space, self.source.sample())
            self.drawn, self.next = flat.reshape(self.ahead, self.lanes, -1), 0
        self.next += 1
        return self.drawn[self.next - 1]

    def _checked(self, chosen: Any, policy: Policy) -> np.ndarray:
        action = encode(self.space, chosen)
        if self.bounds is not None and not ((action >= self.bounds[0]) & (action <= self.bounds[1])).all():
            raise ValueError(
                f"{type(policy).__name__} returned actions from {action.min()} to {action.max()}, outside {self.space}"
                "; clip them in its predict"
            )
        return action

    def _disturb(self, action: np.ndarray, uniform: np.ndarray) -> np.ndarray:
        if self.noise and self.bounds is not None:
            low, high = self.bounds
            scale = np.float32(self.noise) * (high - low) / 2
            action = np.clip(action + scale * self.rng.standard_normal(action.shape, np.float32), low, high)
        if self.epsilon:
            action = np.where(self.rng.random((self.lanes, 1)) < self.epsilon, uniform, action)
        return action


def _bounds(space: gym.Space[Any]) -> tuple[np.ndarray, np.ndarray] | None:
    if isinstance(space, gym.spaces.Box) and space.is_bounded():
        return space.low.reshape(-1).astype(np.float32), space.high.reshape(-1).astype(np.float32)
    return None


def _roll(
    vector: VectorEnv[Any, Any, Any], actor: _Actor, steps: int, seed: int, bar: Any
) -> tuple[Transitions, list[int | None]]:
    """Step until ``steps`` rows are there; return them episode by episode, and the reset seed of each episode."""
    spaces = Spaces(vector.single_observation_space, vector.single_action_space)
    mode, lanes = vector.metadata["autoreset_mode"], vector.num_envs
    obs_rows = np.empty((steps, spaces.obs_dim), np.float32)
    next_rows = np.empty_like(obs_rows)
    action_rows = np.empty((steps, spaces.action_dim), np.float32)
    reward_rows = np.empty(steps, np.float32)
    end_rows = np.empty(steps, bool)
    episode_rows = np.empty(steps, np.int64)

    seeded = mode is AutoresetMode.DISABLED
    stream = _seeds(seed)
    seeds = [next(stream) for _ in range(lanes)]
    reset: Any = vector.reset  # SyncVectorEnv takes a list of seeds, VectorEnv's annotation does not say so
    obs, _ = reset(seed=list(seeds) if seeded else seed)
    episode, episodes = np.zeros(lanes, np.int64), 0
    started, resting = np.ones(lanes, bool), np.zeros(lanes, bool)
    filled, step, count_true = 0, vector.step, np.count_nonzero
    while filled < steps:
        if fresh := int(count_true(started)):
            episode[started] = np.arange(episodes, episodes + fresh)
            episodes += fresh
        # A resting lane (NEXT_STEP mode) is only reset by this step: it yields no row.
        rest = int(count_true(resting))
        count = min(steps - filled, lanes - rest)
        pick: Any = np.flatnonzero(~resting)[:count] if rest else slice(count)
        rows = slice(filled, filled + count)
        action = actor.act(obs, started)
        obs_rows[rows] = encode(spaces.observation, obs)[pick]
        action_rows[rows], episode_rows[rows] = action[pick], episode[pick]

        obs, reward, terminated, truncated, info = step(decode(spaces.action, action))
        after, done = encode(spaces.observation, obs), (terminated | truncated) & ~resting
        ended = int(count_true(done))
        if ended and mode is AutoresetMode.SAME_STEP:
            after = after.copy()
            after[done] = _final(spaces.observation, info["final_obs"], done)
        next_rows[rows], reward_rows[rows], end_rows[rows] = after[pick], reward[pick], terminated[pick]
        filled += count
        bar.update(count)

        if ended and seeded:
            lane_seeds = [next(stream) if over else None for over in done.tolist()]
            seeds += [lane_seed for lane_seed in lane_seeds if lane_seed is not None]
            obs, _ = reset(seed=lane_seeds, options={"reset_mask": done})
        started, resting = (resting, done) if mode is AutoresetMode.NEXT_STEP else (done, resting)

    order = np.argsort(episode_rows, kind="stable")
    kept, number = np.unique(episode_rows[order], return_inverse=True)
    obs_rows, action_rows, next_rows = obs_rows[order], action_rows[order], next_rows[order]
    reward_rows, end_rows = reward_rows[order], end_rows[order]
    data = Transitions.from_numpy(obs_rows, action_rows, reward_rows, next_rows, end_rows, number, spaces=spaces)
    return data, [seeds[index] if seeded else None for index in kept]


def _seeds(seed: int) -> Iterator[int]:
    """Reset seeds, drawn many at a time."""
    rng = np.random.default_rng([seed, 1])
    while True:
        yield from rng.integers(2**31, size=_AHEAD).tolist()


def _final(space: gym.Space[Any], final: Any, done: np.ndarray) -> np.ndarray:
    """Return the last observations ``[ended lanes, flat]`` of the episodes that ended in this step."""
    if isinstance(final, np.ndarray) and final.dtype == object:
        items = [final[lane] for lane in np.flatnonzero(done)]
        batch: Any = create_empty_array(space, len(items))
        return encode(space, concatenate(space, items, batch))
    return encode(space, final)[done]
