"""Data grades as offline reinforcement learning names them, regenerated from the real environment by one call.

random: the uniform policy. medium: a policy stopped at a fraction of the expert return. expert: a policy trained to the
end of its budget. replay: everything the medium agent saw until it was medium. The names are those of D4RL (Fu et al.,
"D4RL: Datasets for Deep Data-Driven Reinforcement Learning", 2020); the data are not the same.
"""

import inspect
from collections.abc import Collection
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args
from zipfile import BadZipFile

import gymnasium as gym
import numpy as np
from gymnasium.vector.utils import concatenate, create_empty_array

from learneddyn.core import DataError, Transitions
from learneddyn.data.collect import collect
from learneddyn.data.minari import check_free, save
from learneddyn.data.scores import reference
from learneddyn.spaces import Spaces, encode

Grade = Literal["random", "medium", "expert", "replay"]

_EVALUATIONS, _EPISODES = 50, 10
"""How often a training run is measured, and over how many episodes each time."""


class GradeNotReached(RuntimeError):
    """The budget ended before the agent was good enough for the grade; the message says how good it was."""


class Trained(NamedTuple):
    """An agent that was trained to a grade."""

    policy: Any
    """The Stable-Baselines3 algorithm."""
    record: Transitions
    """All real steps of its training, in order."""
    mean_return: float
    """Mean undiscounted return of the last measurement, 10 episodes, actions sampled."""


def collect_grade(
    env_id: str,
    dataset_id: str | None = None,
    *,
    steps: int,
    grade: Grade = "random",
    algorithm: str = "SAC",
    algorithm_kwargs: dict[str, Any] | None = None,
    train_steps: int = 1_000_000,
    fraction: float = 1 / 3,
    target_return: float | None = None,
    lanes: int = 8,
    seed: int = 0,
    progress: bool = True,
    env_kwargs: dict[str, Any] | None = None,
    overwrite: bool = False,
) -> Transitions:
    """Build data of one grade for an environment, training the behaviour policy first where the grade needs one.

    Args:
        env_id: Gymnasium id of the real environment.
        dataset_id: ``(namespace/)name-v0``, or None to write nothing. What the policy scored goes into its description.
        steps: transitions to collect with the policy, its actions sampled. For ``replay``: the last so many steps of
            the training, or all if there are fewer.
        grade: ``random``, ``medium``, ``expert`` or ``replay``.
        algorithm: name of a Stable-Baselines3 or sb3-contrib algorithm that suits the action space.
        algorithm_kwargs: arguments for its constructor.
        train_steps: budget of real training steps; medium and replay stop as soon as they are good enough.
        fraction: medium means ``random + fraction * (expert - random)`` of `learneddyn.data.scores`.
        target_return: medium means this mean return, for tasks without reference returns.
        lanes: environments stepped side by side while collecting.
        seed: seeds training and collecting.
        progress: show progress bars.
        env_kwargs: arguments for ``gym.make``.
        overwrite: replace a data set of the same id.

    Raises:
        GradeNotReached: medium or replay were not reached within ``train_steps``; nothing is written.
        UnknownReference: medium or replay of a task without reference returns, and no ``target_return``.
        DatasetExists: the id is taken and ``overwrite`` is False; nothing is trained.
        ValueError: an unknown grade or algorithm.
    """
    if grade not in get_args(Grade):
        raise ValueError(f"grade must be one of {', '.join(get_args(Grade))}, got '{grade}'")
    if dataset_id is not None:
        check_free(dataset_id, overwrite=overwrite)
    common: dict[str, Any] = {"steps": steps, "lanes": lanes, "seed": seed, "progress": progress}
    common |= {"env_kwargs": env_kwargs, "overwrite": overwrite}
    if grade == "random":
        return collect(env_id, dataset_id, algorithm="random", description=f"random grade of {env_id}", **common)

    goal = None
    if grade != "expert":
        goal = target_return if target_return is not None else _medium_return(env_id, fraction)
    trained = train(
        env_id,
        algorithm,
        train_steps=train_steps,
        goal=goal,
        algorithm_kwargs=algorithm_kwargs,
        seed=seed,
        progress=progress,
        env_kwargs=env_kwargs,
    )
    told = f"{grade} grade of {env_id}: {algorithm}, {len(trained.record)} training steps, seed {seed}"
    told += f", mean return {trained.mean_return:.1f}" + ("" if goal is None else f" (stopped at {goal:.1f})")
    if grade != "replay":
        return collect(env_id, dataset_id, behaviour=trained.policy, algorithm=algorithm, description=told, **common)
    data = trained.record[-steps:]
    if dataset_id is not None:
        spec = deepcopy(gym.spec(env_id))
        spec.kwargs.update(env_kwargs or {})
        save(data, dataset_id, env_id=spec, algorithm=algorithm, description=told, overwrite=overwrite)
    return data


def train(
    env_id: str,
    algorithm: str = "SAC",
    *,
    train_steps: int,
    goal: float | None = None,
    algorithm_kwargs: dict[str, Any] | None = None,
    seed: int = 0,
    progress: bool = True,
    env_kwargs: dict[str, Any] | None = None,
) -> Trained:
    """Train an agent in the real environment until its mean return reaches ``goal`` (None: to the end of the budget).

    The return is measured 50 times within the budget, over 10 episodes of a second environment.

    Raises:
        GradeNotReached: the budget ended below ``goal``.
        ValueError: no algorithm of that name.
    """
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.evaluation import evaluate_policy
    from stable_baselines3.common.monitor import Monitor

    recorder, judge = _Recorder(gym.make(env_id, **(env_kwargs or {}))), Monitor(gym.make(env_id, **(env_kwargs or {})))
    judge.reset(seed=seed + 1)
    model = new_agent(algorithm, recorder, algorithm_kwargs, seed=seed)
    every = max(1, train_steps // _EVALUATIONS)

    def measure() -> float:
        return float(np.mean(evaluate_policy(model, judge, _EPISODES, deterministic=False)[0]))

    class StopAtGoal(BaseCallback):
        best = -np.inf

        def _on_step(self) -> bool:
            if goal is None or self.num_timesteps % every:
                return True
            self.best = max(self.best, measure())
            return self.best < goal

    stop = StopAtGoal()
    model.learn(train_steps, callback=stop, progress_bar=progress)
    if goal is not None and stop.best < goal:
        raise GradeNotReached(
            f"{algorithm} reached a mean return of {stop.best:.1f} in {train_steps} steps of {env_id}, the grade asks "
            f"for {goal:.1f}; raise train_steps, or lower fraction or target_return"
        )
    record = recorder.transitions(env_id)
    mean_return = measure() if goal is None else float(stop.best)
    recorder.close()
    judge.close()
    return Trained(model, record, mean_return)


def _medium_return(env_id: str, fraction: float) -> float:
    if not 0.0 < fraction <= 1.0:
        raise ValueError(f"fraction must be above 0 and at most 1, got {fraction}")
    entry = reference(env_id)
    if entry.expert is None:
        raise DataError(f"{env_id} has no expert reference return ({entry.source}); give target_return")
    return entry.random + fraction * (entry.expert - entry.random)


def algorithms() -> dict[str, Any]:
    """Return the algorithms of Stable-Baselines3 and sb3-contrib by name."""
    import sb3_contrib
    import stable_baselines3
    from stable_baselines3.common.base_class import BaseAlgorithm

    members = (vars(stable_baselines3) | vars(sb3_contrib)).items()
    return {key: kind for key, kind in members if isinstance(kind, type) and issubclass(kind, BaseAlgorithm)}


def algorithm_class(name: str) -> Any:
    """Return the Stable-Baselines3 or sb3-contrib algorithm of that name.

    Raises:
        ValueError: there is none; lists the names.
    """
    known = algorithms()
    if name not in known:
        raise ValueError(f"algorithm must be one of {', '.join(sorted(known))}, got '{name}'")
    return known[name]


def check_arguments(name: str, given: Collection[str]) -> None:
    """Make sure that an algorithm takes these constructor arguments, and that they are not the caller's to give.

    Raises:
        ValueError: no algorithm of that name, or an argument that it does not take; lists those it takes.
    """
    known = inspect.signature(algorithm_class(name).__init__).parameters.keys()
    allowed = sorted(known - {"self", "env", "seed", "device", "_init_setup_model"})
    if unknown := sorted(set(given) - set(allowed)):
        raise ValueError(f"{name} does not take {', '.join(unknown)}; algorithm_kwargs may hold {', '.join(allowed)}")


def new_agent(name: str, env: Any, kwargs: dict[str, Any] | None = None, *, seed: int, device: str = "auto") -> Any:
    """Return an untrained agent; ``policy`` defaults to the algorithm's own for the observation space.

    Raises:
        ValueError: no algorithm of that name, an argument it does not take, or spaces that it cannot handle.
    """
    check_arguments(name, kwargs or {})
    kind = algorithm_class(name)
    stem = "MultiInput" if isinstance(env.observation_space, gym.spaces.Dict) else "Mlp"
    policy = f"{stem}Policy" if f"{stem}Policy" in kind.policy_aliases else f"{stem}LstmPolicy"
    try:
        return kind(env=env, seed=seed, device=device, **{"policy": policy} | (kwargs or {}))
    except AssertionError as error:
        # Stable-Baselines3 refuses spaces by assertion.
        raise ValueError(f"{name} cannot act here: {error}") from error


def load_agent(name: str, path: str | Path, device: str = "auto") -> Any:
    """Return the agent that Stable-Baselines3 saved in a zip.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no algorithm of that name, or no readable agent of it in the file.
    """
    kind = algorithm_class(name)
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no agent {str(path)!r}: name a zip that Stable-Baselines3 saved")
    try:
        return kind.load(path, device=device)
    except (ValueError, LookupError, AttributeError, TypeError, RuntimeError, AssertionError, BadZipFile) as error:
        raise ValueError(f"{path} holds no readable {name} agent ({type(error).__name__}: {error})") from error


class _Recorder(gym.Wrapper[Any, Any, Any, Any]):
    """Keeps every step of an environment: the actions as it got them, unlike a replay buffer, which rescales them."""

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        super().__init__(env)
        self.rows: list[tuple[Any, Any, float, Any, bool, int]] = []
        self.number, self.obs = -1, None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Start the next episode."""
        obs, info = self.env.reset(seed=seed, options=options)
        self.obs, self.number = deepcopy(obs), self.number + 1
        return obs, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Step and keep the transition."""
        obs, reward, terminated, truncated, info = self.env.step(action)
        before, self.obs = self.obs, deepcopy(obs)
        self.rows.append((before, deepcopy(action), float(reward), self.obs, terminated, self.number))
        return obs, reward, terminated, truncated, info

    def transitions(self, source: str) -> Transitions:
        """Return all steps so far."""
        obs, action, reward, next_obs, terminated, episode = zip(*self.rows, strict=True)
        spaces = Spaces(self.observation_space, self.action_space)

        def flat(space: gym.Space[Any], items: tuple[Any, ...]) -> np.ndarray:
            batch: Any = create_empty_array(space, len(items))
            return encode(space, concatenate(space, items, batch))

        return Transitions.from_numpy(
            flat(spaces.observation, obs),
            flat(spaces.action, action),
            np.array(reward),
            flat(spaces.observation, next_obs),
            np.array(terminated),
            np.array(episode),
            spaces=spaces,
            source=source,
        )
