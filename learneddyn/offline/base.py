"""What every offline learner shares: data in, Stable-Baselines3's surface out."""

import math
import time
from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from stable_baselines3.common import utils
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from torch import Tensor
from tqdm import tqdm

from learneddyn import tasks
from learneddyn.core import DataError, Task, Transitions, generator
from learneddyn.data.replay import Batch, Replay
from learneddyn.offline.dataset import Data, read, return_range, scaled
from learneddyn.offline.policy import FlatPolicy, OfflinePolicy

Learner = TypeVar("Learner", bound="OfflineAlgorithm")

EVALUATIONS_KEPT = 10
"""The reported return is the mean of the last so many evaluations."""


class Diverged(ArithmeticError):
    """A loss became NaN or infinite. The files written before are untouched."""


@dataclass(frozen=True)
class Cosine:
    """Learning rate that falls from ``initial`` to 0 along half a cosine."""

    initial: float

    def __call__(self, progress_remaining: float) -> float:
        """Return the rate at a share of training left, 1 to 0."""
        return self.initial * 0.5 * (1 + math.cos(math.pi * (1 - progress_remaining)))


class OfflineAlgorithm(BaseAlgorithm):
    """Learn a policy from logged transitions, with the methods of a Stable-Baselines3 algorithm.

    One timestep is one gradient update. `learn`, `predict`, `save`, `load`, callbacks and loggers are SB3's. An
    environment is never learned from: ``env`` is only evaluated in. The policy at hand after `learn` is that of the
    last update, never the best one seen, and `final_return` is the mean of the last ten evaluations.

    All randomness comes from ``seed``; torch's and NumPy's global generators are left alone (evaluation and
    non-deterministic `predict` excepted). `save` keeps nets, optimisers and the state of the generator, not the data:
    ``load(path, data=...)`` goes on as if nothing had happened.

    Args:
        policy: "MlpPolicy", or a subclass of `OfflinePolicy`.
        data: transitions, or one or several Minari ids.
        env: to evaluate in; an environment, a vector environment or an id.
        task: the real environment's task or its id. None takes what a Minari data set names, if it is known.
        learning_rate: of Adam, a number or a schedule.
        actor_learning_rate: the actor's, if another.
        batch_size: rows per update.
        gamma: discount.
        tau: share by which target nets move towards the nets at each update.
        reward_shift: is added to every reward.
        reward_scale: multiplies every (shifted) reward; "return_range" is 1000 / (best - worst return of an episode).
        normalize_obs: standardise observations with the data's mean and deviation + 0.001.
        policy_kwargs: arguments of `OfflinePolicy`.
        eval_freq: updates between evaluations in ``env``; 0 evaluates once, after the last update.
        n_eval_episodes: deterministic episodes per evaluation.
        tensorboard_log: folder of TensorBoard events.
        verbose: 1 prints the log.
        seed: of weights, batches and evaluation episodes; None draws one from torch's global generator.
        device: of nets and data.

    Raises:
        DataError: data that cannot be learned from (`learneddyn.offline.dataset.read` lists the cases).
        ValueError: an argument outside its range, or an ``env`` of other spaces than the data's.
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {"MlpPolicy": OfflinePolicy}
    policy: OfflinePolicy
    replay: Replay | None
    nets: ClassVar[dict[str, Any]] = {}
    """The method's arguments of `OfflinePolicy`; ``policy_kwargs`` go before them."""
    from_rewards: ClassVar[bool] = True
    """Whether the method learns from rewards, and so from what follows a step."""

    def __init__(
        self,
        policy: str | type[FlatPolicy] = "MlpPolicy",
        data: Data | None = None,
        *,
        env: GymEnv | str | None = None,
        task: Task | str | None = None,
        learning_rate: float | Schedule = 3e-4,
        actor_learning_rate: float | Schedule | None = None,
        batch_size: int = 256,
        gamma: float = 0.99,
        tau: float = 0.005,
        reward_shift: float = 0.0,
        reward_scale: float | str = 1.0,
        normalize_obs: bool = False,
        policy_kwargs: dict[str, Any] | None = None,
        eval_freq: int = 0,
        n_eval_episodes: int = 10,
        tensorboard_log: str | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: torch.device | str = "auto",
        _init_setup_model: bool = True,
    ) -> None:
        for name, ok, value, allowed in (
            ("batch_size", batch_size >= 1, batch_size, "at least 1"),
            ("gamma", 0 <= gamma <= 1, gamma, "in [0, 1]"),
            ("tau", 0 < tau <= 1, tau, "in (0, 1]"),
            ("reward_scale", reward_scale == "return_range" or isinstance(reward_scale, float | int), reward_scale,
             "a number or 'return_range'"),
            ("eval_freq", eval_freq >= 0, eval_freq, "at least 0"),
            ("n_eval_episodes", n_eval_episodes >= 1, n_eval_episodes, "at least 1"),
        ):  # fmt: skip
            if not ok:
                raise ValueError(f"{name} must be {allowed}, got {value!r}")
        super().__init__(
            policy,
            env,
            learning_rate,
            policy_kwargs=policy_kwargs,
            tensorboard_log=tensorboard_log,
            verbose=verbose,
            device=device,
            support_multi_env=True,
            seed=seed,
        )
        self.n_envs = 1 if self.env is None else self.n_envs  # what `set_env` compares with
        self.actor_learning_rate, self.batch_size, self.gamma, self.tau = actor_learning_rate, batch_size, gamma, tau
        self.reward_shift, self.reward_scale, self.normalize_obs = reward_shift, reward_scale, normalize_obs
        self.eval_freq, self.n_eval_episodes = eval_freq, n_eval_episodes
        self.evaluations: list[tuple[int, float]] = []
        self.data, self.task, self.replay = data, tasks.get(task) if isinstance(task, str) else task, None
        self._rng_state: Tensor | None = None
        if _init_setup_model:
            if data is None:
                raise DataError(f"{type(self).__name__} learns from data: pass Transitions or a Minari id")
            self._setup_model()

    def _setup_model(self) -> None:
        seed = int(torch.randint(2**31, ())) if self.seed is None else self.seed
        self._rng, self._eval_seed = generator(seed, self.device), seed
        if self._rng_state is not None:
            self._rng.set_state(self._rng_state)
        self._setup_lr_schedule()
        self._actor_schedule = (
            self.lr_schedule if self.actor_learning_rate is None else utils.FloatSchedule(self.actor_learning_rate)
        )
        rows = None if self.data is None else self._take(self.data)
        self.policy = self.policy_class(  # type: ignore[assignment]
            self.observation_space,
            self.action_space,
            self.lr_schedule,
            rng=generator(seed),
            **(self.nets | self._nets() | self.policy_kwargs),
        ).to(self.device)
        self.policy.set_training_mode(False)
        if rows is not None:
            if self.normalize_obs:
                self.policy.normaliser.fit(rows.obs)
            self._fill(rows)

    def _take(self, data: Data) -> Transitions:
        """Read and check the data, and take from it the spaces and the scale of rewards."""
        rows, self.task = read(data, self.task, rewards=self.from_rewards, bootstraps=self.from_rewards)
        rows = rows.to(self.device)
        assert rows.spaces is not None
        spaces = {"observation_space": rows.spaces.observation, "action_space": rows.spaces.action}
        for name, space in spaces.items():
            if getattr(self, name, space) != space:
                raise ValueError(f"the data has the {name} {space}, but {getattr(self, name)} is asked for")
            setattr(self, name, space)
        scale, shifted = self.reward_scale, replace(rows, reward=rows.reward + self.reward_shift)
        self.reward_factor = 1000 / return_range(shifted) if isinstance(scale, str) else float(scale)
        return rows

    def _prepared(self, rows: Transitions) -> Transitions:
        """Return rows as updates see them: rewards shifted and scaled, actions in [-1, 1]."""
        return scaled(replace(rows, reward=(rows.reward + self.reward_shift) * self.reward_factor))

    def _nets(self) -> dict[str, Any]:
        """Return arguments of `OfflinePolicy` that depend on the learner's own."""
        return {}

    def _fill(self, rows: Transitions) -> None:
        """Pack the transitions for sampling."""
        self.replay = Replay(len(rows), rows.obs.shape[1], rows.action.shape[1], device=self.device)
        self.replay.add(self._prepared(rows))

    def _batch(self) -> Batch:
        """Return rows for one update, actions in [-1, 1]."""
        assert self.replay is not None
        return self.replay.sample(self.batch_size, self._rng)

    @abstractmethod
    def _update(self) -> dict[str, Float[Tensor, ""]]:
        """Do one update and return its figures, by name."""

    def learn(
        self: Learner,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1000,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> Learner:
        """Do ``total_timesteps`` updates.

        Args:
            total_timesteps: updates, in addition to those done if ``reset_num_timesteps`` is False.
            callback: of SB3; ``on_step`` is called after every update.
            log_interval: updates between lines of the log; a line holds means over them.
            tb_log_name: of the TensorBoard run, by default the name of the method.
            reset_num_timesteps: count from zero (the weights stay).
            progress_bar: show a progress bar.

        Raises:
            DataError: the learner was loaded without data.
            Diverged: a loss is NaN or infinite; checked at every line of the log.
        """
        if self.data is None:
            raise DataError(f"this {type(self).__name__} has no data to learn from: use load(path, data=...)")
        total, calls = self._setup_learn(
            total_timesteps, callback, reset_num_timesteps, tb_log_name or type(self).__name__, progress_bar
        )
        calls.on_training_start(locals(), globals())
        # SB3's own bar asks for an environment.
        bar = tqdm(total=total - self.num_timesteps, unit="update", disable=not progress_bar)
        sums: dict[str, tuple[Tensor, int]] = {}
        while self.num_timesteps < total:
            self._set_rates()
            for name, figure in self._update().items():
                value, count = sums.get(name, (torch.zeros((), device=self.device), 0))
                sums[name] = value + figure.detach(), count + 1
            self.num_timesteps += 1
            self._n_updates += 1
            bar.update()
            if self.num_timesteps % log_interval == 0 or self.num_timesteps == total:
                self._log({name: float(value) / count for name, (value, count) in sums.items()})
                sums = {}
            if self.env is not None and (
                self.num_timesteps == total or (self.eval_freq and self.num_timesteps % self.eval_freq == 0)
            ):
                self._evaluate()
            if not calls.on_step():
                break
        bar.close()
        calls.on_training_end()
        return self

    def _setup_learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        reset_num_timesteps: bool = True,
        tb_log_name: str = "run",
        progress_bar: bool = False,
    ) -> tuple[int, BaseCallback]:
        """Do what SB3's does, without an environment to reset."""
        self.start_time = time.time_ns()
        if reset_num_timesteps:
            self.num_timesteps, self.evaluations = 0, []
        self._total_timesteps = total_timesteps + self.num_timesteps
        self._num_timesteps_at_start = self.num_timesteps
        if not self._custom_logger:
            self._logger = utils.configure_logger(self.verbose, self.tensorboard_log, tb_log_name, reset_num_timesteps)
        return self._total_timesteps, self._init_callback(callback)

    def _set_rates(self) -> None:
        self._update_current_progress_remaining(self.num_timesteps, self._total_timesteps)
        for name in self.policy.learners:
            schedule = self._actor_schedule if name == "actor" else self.lr_schedule
            utils.update_learning_rate(getattr(self.policy, name).optimizer, schedule(self._current_progress_remaining))

    def _log(self, means: dict[str, float]) -> None:
        wrong = [name for name, value in means.items() if not math.isfinite(value)]
        if wrong:
            raise Diverged(
                f"{type(self).__name__} diverged before update {self.num_timesteps}: {', '.join(wrong)} is not finite; "
                "lower learning_rate, scale the rewards, or choose a more conservative method"
            )
        for name, value in means.items():
            self.logger.record(f"train/{name}", value)
        self.dump_logs()

    def dump_logs(self) -> None:
        """Write one line of the log."""
        seconds = max((time.time_ns() - self.start_time) / 1e9, 1e-9)
        self.logger.record("time/fps", int((self.num_timesteps - self._num_timesteps_at_start) / seconds))
        self.logger.record("time/total_timesteps", self.num_timesteps, exclude="tensorboard")
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        self.logger.dump(step=self.num_timesteps)

    def _evaluate(self) -> None:
        assert self.env is not None
        self.env.seed(self._eval_seed)
        returns, lengths = evaluate_policy(
            self, self.env, self.n_eval_episodes, return_episode_rewards=True, warn=False
        )
        self.evaluations.append((self.num_timesteps, float(np.mean(returns))))
        self.logger.record("eval/mean_reward", self.evaluations[-1][1])
        self.logger.record("eval/mean_ep_length", float(np.mean(lengths)))
        self.logger.dump(step=self.num_timesteps)

    @property
    def final_return(self) -> float:
        """Mean of the last ten evaluations of this run (last-checkpoint protocol).

        Raises:
            ValueError: nothing has been evaluated: there is no ``env``.
        """
        if not self.evaluations:
            raise ValueError("nothing has been evaluated: pass env= and learn")
        return float(np.mean([value for _, value in self.evaluations[-EVALUATIONS_KEPT:]]))

    def save(self, path: Any, exclude: Any = None, include: Any = None) -> None:
        """Write an SB3 zip file with nets, optimisers and the generator's state; the data is left out."""
        self._rng_state = self._rng.get_state()
        super().save(path, exclude, include)

    def _excluded_save_params(self) -> list[str]:
        own = ["data", "task", "replay", "_rng", "lr_schedule", "_actor_schedule"]
        return [*super()._excluded_save_params(), *own]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", *(f"policy.{name}.optimizer" for name in self.policy.learners)], []


def descend(loss: Float[Tensor, ""], optimizer: torch.optim.Optimizer, max_norm: float = math.inf) -> None:
    """Step ``optimizer`` down the gradient of ``loss`` in its own parameters only, its norm at most ``max_norm``."""
    parameters = optimizer.param_groups[0]["params"]
    for parameter, grad in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        parameter.grad = grad
    if max_norm < math.inf:
        torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    optimizer.step()
