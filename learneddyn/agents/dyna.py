"""Dyna: any off-policy algorithm of Stable-Baselines3, trained mostly on transitions that a learned model imagines.

    every real step          act, store                                      (Stable-Baselines3's own loop)
    every refit_every steps  fit the dynamics model on all real transitions
                             imagine k steps from each of rollout_batch real states, into the pool of imagined rows
    every real step          gradient_steps updates, real_ratio of each batch real rows, the others imagined

Sources: Sutton, "Dyna, an Integrated Architecture for Learning, Planning, and Reacting" (1991); schedule, pools and
defaults are those of Janner, Fu, Zhang, Levine, "When to Trust Your Model: Model-Based Policy Optimization" (2019).
Deviations: reward and termination come from the task wherever the observation determines them (there: the reward is
always learned, the termination always given); epochs count all real steps, the random ones included.

Hooks for methods built on top; overrides call ``super()`` where they extend and do not replace:

    imagination_policy(world)   the actions inside the model, by default drawn from the policy
    _sample_action(...)         the actions in the real environment (SB3's own method: environment and [-1, 1] units);
                                ``self.world`` is the world that imagines, None before the first fit
    make_world()                sampler, penalty, trust of that world
    on_refit(report)            after every fit
    on_imagined(rows)           after every imagination, with its rows in environment units, already in the pool
    self.rng                    the generator (on ``self.device``) that fits and imagination draw from
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import gymnasium as gym
import numpy as np
import torch
from jaxtyping import Float
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.type_aliases import MaybeCallback, RolloutReturn
from torch import Tensor

from learneddyn import tasks
from learneddyn.agents.buffer import DeviceReplayBuffer
from learneddyn.agents.diagnostics import Alarm, Stopwatch, imagination_figures, model_error, window_figures
from learneddyn.agents.episodes import Episodes
from learneddyn.core import ActionFn, Task, Transitions, generator
from learneddyn.models import AbstractDynamics, FitReport, ProbabilisticEnsemble, blueprint, from_blueprint
from learneddyn.spaces import Spaces
from learneddyn.world import Sampler, Sentinel, World

Agent = TypeVar("Agent", bound="Dyna")
EPOCH = 1000
"""Real steps of an epoch: the unit of the schedule of rollout lengths and of the pool's capacity."""


def rollout_length(schedule: Sequence[int], epoch: int) -> int:
    """Return k at an epoch: from k0 at e0 linearly to k1 at e1, rounded down; ``schedule`` is (e0, e1, k0, k1)."""
    e0, e1, k0, k1 = schedule
    share = 1.0 if e1 <= e0 else min(max((epoch - e0) / (e1 - e0), 0.0), 1.0)
    return math.floor(k0 + share * (k1 - k0) + 1e-9)


def pool_capacity(length: int, rollout_batch: int, refit_every: int, retain: int) -> int:
    """Return the imagined rows to keep: those of ``retain`` epochs, and of one imagination at least."""
    return length * rollout_batch * max(1, math.ceil(retain * EPOCH / refit_every))


class Dyna(OffPolicyAlgorithm):
    """Mix-in: ``class MBPO(Dyna, FastSAC)`` is SAC that learns in a model of its own, with all of SB3's surface.

    ``learn``, ``predict``, ``save``, ``load``, callbacks and loggers are SB3's; the zip holds the dynamics model too,
    but no experience: an agent loaded from it takes ``learning_starts`` real steps before it goes on learning. A
    checkpoint (`learneddyn.agents.checkpoint`) holds the whole run, which then goes on bit-equal.

    Args:
        policy: see the algorithm.
        env: one environment or a vector environment, flat Boxes only, not wrapped in VecNormalize (the model
            standardises by itself).
        *args: see the algorithm.
        model: dynamics model to learn, by default the paper's ensemble with the heads that the task needs. It is
            fitted in place.
        task: reward and termination of imagined steps; by default looked up under the environment's id.
        real_ratio: share of real rows in a batch.
        refit_every: real steps between two fits.
        rollout_batch: real states that imagination starts from after every fit.
        schedule: (e0, e1, k0, k1), see `rollout_length`.
        retain: epochs whose imagined rows are kept.
        sampler: of the world, see `learneddyn.world.sampling`.
        imagination_noise: standard deviation of Gaussian noise on imagined actions, in units of half their range; for
            algorithms whose policy is deterministic.
        learning_starts: random real steps before the first fit.
        gradient_steps: updates per real step.
        sentinel: told when the model diverges in imagination; by default a warning, once an imagination, that names
            the member and the step. `learneddyn.world.strict` raises.
        diagnose: log what `learneddyn.agents.diagnostics` measures; it changes nothing of what is learned.
        **kwargs: see the algorithm.

    Raises:
        ValueError: an argument outside its range, spaces that are not flat Boxes, a VecNormalize, n-step returns,
            another replay buffer, a model fitted in other spaces, or (at the first fit) a task that contradicts the
            environment's own rewards or terminations.
        UnknownTask: no task is given or known for the environment.
    """

    replay_buffer: DeviceReplayBuffer
    action_space: gym.spaces.Box
    observation_space: gym.spaces.Box

    def __init__(
        self,
        policy: Any,
        env: Any,
        *args: Any,
        model: AbstractDynamics | None = None,
        task: Task | None = None,
        real_ratio: float = 0.05,
        refit_every: int = 250,
        rollout_batch: int = 100_000,
        schedule: Sequence[int] = (0, 1, 1, 1),
        retain: int = 1,
        sampler: str | Sampler = "elite",
        imagination_noise: float = 0.0,
        learning_starts: int = 5000,
        gradient_steps: int = 20,
        sentinel: Sentinel | None = None,
        diagnose: bool = True,
        **kwargs: Any,
    ) -> None:
        for name, value, ok, allowed in (
            ("refit_every", refit_every, refit_every >= 1, "at least 1"),
            ("rollout_batch", rollout_batch, rollout_batch >= 1, "at least 1"),
            ("schedule", schedule, len(schedule) == 4 and min(schedule[2:]) >= 1, "(e0, e1, k0 >= 1, k1 >= 1)"),
            ("retain", retain, retain >= 1, "at least 1"),
            ("imagination_noise", imagination_noise, imagination_noise >= 0, "at least 0"),
            ("n_steps", kwargs.get("n_steps", 1), kwargs.get("n_steps", 1) == 1, "1: imagined rows are single steps"),
        ):
            if not ok:
                raise ValueError(f"{name} must be {allowed}, got {value!r}")
        if kwargs.get("replay_buffer_class") not in (None, DeviceReplayBuffer):
            raise ValueError(f"replay_buffer_class must be DeviceReplayBuffer, got {kwargs['replay_buffer_class']}")
        self.task, self.real_ratio, self.refit_every, self.rollout_batch = task, real_ratio, refit_every, rollout_batch
        self.schedule, self.retain, self.sampler = tuple(schedule), retain, sampler
        self.imagination_noise, self.sentinel, self.diagnose = imagination_noise, sentinel, diagnose
        self.world: World | None = None
        self.figures: dict[str, float] = {}
        """Latest diagnostics, under their logger keys."""
        self._dynamics = model
        self._dynamics_card: dict[str, Any] | None = None
        self._fitted_at = self._next_refit = 0
        self.watch = Stopwatch()
        self._alarm = Alarm("these rollouts stop before it")
        self.episodes: Episodes | None = None
        kwargs |= {"learning_starts": learning_starts, "gradient_steps": gradient_steps}
        super().__init__(policy, env, *args, **kwargs)

    @property
    def dynamics(self) -> AbstractDynamics:
        """The dynamics model."""
        assert self._dynamics is not None
        return self._dynamics

    @property
    def rollout_length(self) -> int:
        """Steps of an imagined rollout at this epoch."""
        return rollout_length(self.schedule, self.num_timesteps // EPOCH)

    def _setup_model(self) -> None:
        if self._vec_normalize_env is not None:
            raise ValueError("the model standardises its inputs itself: give the environment without VecNormalize")
        if self.task is None:
            self.task = tasks.of_env(self.env)
        self.replay_buffer_class = DeviceReplayBuffer
        capacity = pool_capacity(self.rollout_length, self.rollout_batch, self.refit_every, self.retain)
        self.replay_buffer_kwargs = self.replay_buffer_kwargs | {
            "imagined_size": capacity,
            "real_share": self.real_ratio,
        }
        super()._setup_model()
        stream = np.random.SeedSequence((torch.initial_seed() % 2**64, 1)).generate_state(1, np.uint64)[0]
        self.rng = generator(int(stream >> 1), self.device)
        self.spaces = Spaces(self.observation_space, self.action_space)
        if self._dynamics is None:
            card = self._dynamics_card
            self._dynamics = default_dynamics(self.task) if card is None else from_blueprint(card, self.spaces)
        self._dynamics.to(self.device)
        if self._dynamics.spaces is not None:
            if self._dynamics.spaces != self.spaces:
                raise ValueError(f"the model was fitted in {self._dynamics.spaces}, the environment has {self.spaces}")
            self.world = self.make_world()
        low, high = self.action_space.low.reshape(-1), self.action_space.high.reshape(-1)
        self._low = torch.as_tensor(low, device=self.device, dtype=torch.float32)
        self._range = torch.as_tensor(high, device=self.device, dtype=torch.float32) - self._low

    def make_world(self) -> World:
        """Return the world that imagines, around the fitted model."""
        assert self.task is not None
        return World(self.dynamics, self.task, sampler=self.sampler, sentinel=self.sentinel or self._alarm)

    def imagination_policy(self, world: World) -> ActionFn:
        """Return how imagined rows act: flat observations to flat actions, both in environment units."""
        shape = self.observation_space.shape

        def act(obs: Float[Tensor, "b o"]) -> Float[Tensor, "b a"]:
            squashed = self.policy._predict(obs.view(-1, *shape), deterministic=False)
            if self.imagination_noise:
                noise = torch.randn(squashed.shape, generator=self.rng, device=self.device)
                squashed = (squashed + self.imagination_noise * noise).clamp(-1, 1)
            return self._low + (0.5 * squashed + 0.5) * self._range

        return act

    def on_refit(self, report: FitReport) -> None:
        """Do something after a fit; nothing by default."""

    def on_imagined(self, rows: Transitions) -> None:
        """Do something with the rows just imagined; nothing by default."""

    def learn(
        self: Agent,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 4,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> Agent:
        """Learn as the algorithm does; without ``tb_log_name`` TensorBoard shows the run under the class's name."""
        name = tb_log_name or type(self).__name__
        return super().learn(total_timesteps, callback, log_interval, name, reset_num_timesteps, progress_bar)

    def collect_rollouts(self, *args: Any, **kwargs: Any) -> RolloutReturn:
        """Take real steps as SB3 does; then, when it is due, fit and imagine."""
        with self.watch("real"):
            rollout = super().collect_rollouts(*args, **kwargs)
        if self._warm and self.num_timesteps >= self._next_refit and rollout.continue_training:
            self._next_refit = (self.num_timesteps // self.refit_every + 1) * self.refit_every
            self.refit()
            self.imagine()
        return rollout

    def train(self, gradient_steps: int, batch_size: int = 256) -> None:
        """Update as the algorithm does, once there is as much experience as the random steps give."""
        if self._warm:
            with self.watch("update"):
                super().train(gradient_steps, batch_size)

    @property
    def _warm(self) -> bool:
        """Whether there is more experience than the random steps: a loaded agent must not refit on a few rows."""
        real = self.replay_buffer.real
        return len(real) > min(self.learning_starts, real.capacity - 1)

    def refit(self) -> FitReport:
        """Fit the model on all real rows, and renew the world."""
        data = self.real_data()
        if not self._fitted_at:
            self._check_task(data)
        if self.world is not None and self.diagnose:
            with self.watch("diagnose"):
                self._diagnose(self.world, data)
        with self.watch("fit"):
            report = self.dynamics.fit(data, rng=self.rng)
        self.world = self.make_world()
        self._fitted_at = self.num_timesteps
        self._log({"model/fit_epochs": report.epochs} | {f"model/{name}": v for name, v in report.metrics.items()})
        self.on_refit(report)
        return report

    @torch.no_grad()
    def imagine(self) -> Transitions:
        """Roll out the policy from real states, remembered as they came about, and put the rows into the pool.

        Rows that terminate, or whose model diverges, stop there.
        """
        assert self.world is not None
        length, pool = self.rollout_length, self.replay_buffer.imagined
        assert pool is not None
        capacity = pool_capacity(length, self.rollout_batch, self.refit_every, self.retain)
        if capacity != pool.capacity:
            pool.resize(capacity)
        self.policy.set_training_mode(False)
        self._alarm.begin(f"after {self.num_timesteps} real steps: ")
        with self.watch("imagine"):
            starts, memory = self._starts()
            policy = self.imagination_policy(self.world)
            rows = self.world.rollout(starts, policy, length, self.rng, memory)
            self.replay_buffer.add_imagined(rows)
        if self.diagnose:
            with self.watch("diagnose"), _untouched(self.rng):
                self._log(imagination_figures(self.world, rows))
        self._log({"imagined/length": length, "imagined/rows": len(pool)} | self.watch.shares())
        self.on_imagined(rows)
        return rows

    def _starts(self) -> tuple[Float[Tensor, "b o"], Float[Tensor, "b m"] | None]:
        """Return real states drawn for imagination, and what the model remembers there.

        A model with memory walks along all real rows for that: one more prediction per row.
        """
        replay = self.replay_buffer.real
        if self.dynamics.begin(torch.zeros(1, replay.obs_dim, device=self.device)) is None:
            return replay.sample(self.rollout_batch, self.rng).obs, None
        data = self.real_data()
        memory = self.dynamics.remembered(data)
        assert memory is not None
        drawn = torch.randint(len(data), (self.rollout_batch,), generator=self.rng, device=self.device)
        return data.obs[drawn], memory[drawn]

    def real_data(self, newest: int | None = None) -> Transitions:
        """Return the real transitions (or the newest ones only) in environment units, every lane's episodes whole."""
        replay = self.replay_buffer.real
        rows = replay.rows()
        rows = rows if newest is None else rows[max(0, len(rows) - newest) :]
        lane = torch.arange(len(rows), device=rows.device) % self.n_envs
        batch = replay.unpack(rows[lane.argsort(stable=True)])
        action = self._low + (0.5 * batch.action + 0.5) * self._range
        begins = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
        begins[1:] = (batch.obs[1:] != batch.next_obs[:-1]).any(dim=1) | (batch.terminated[:-1] > 0)
        return Transitions(
            batch.obs.contiguous(),
            action,
            batch.reward.contiguous(),
            batch.next_obs.contiguous(),
            batch.terminated > 0,
            begins.cumsum(0) - 1,
            self.spaces,
            "real",
        )

    def work(self, total_timesteps: int) -> dict[str, int]:
        """Return what learning for so many real steps asks for: updates, fits, and imagined steps at most."""
        first = self.learning_starts + 1
        fits = [
            first,
            *range((first // self.refit_every + 1) * self.refit_every, total_timesteps + 1, self.refit_every),
        ]
        lengths = [rollout_length(self.schedule, step // EPOCH) for step in fits if step <= total_timesteps]
        per_step = self.gradient_steps if self.gradient_steps >= 0 else 1  # SB3: -1 asks for one per real step
        return {
            "updates": max(0, total_timesteps - self.learning_starts) * per_step,
            "fits": len(lengths),
            "imagined_steps": sum(lengths) * self.rollout_batch,
        }

    def _check_task(self, data: Transitions) -> None:
        """Refuse a task whose functions are not those of the environment: another version, other arguments."""
        task = self.task
        assert task is not None
        for what, wrong in (
            (
                "reward",
                task.reward
                and (task.reward(data.obs, data.action, data.next_obs) - data.reward).abs()
                > 0.01 * (1 + data.reward.abs()),
            ),
            ("termination", task.terminated and task.terminated(data.next_obs) != data.terminated),
        ):
            if wrong is not None and int(wrong.sum()) > 0.01 * len(data):
                raise ValueError(
                    f"the {what} of the task {task.real_id} differs from what the environment gave in "
                    f"{int(wrong.sum())} of {len(data)} steps: give the task of this very environment, or "
                    f"task=Task({task.real_id!r}) with a model that learns it (learn_{what}=True)"
                )

    def _diagnose(self, world: World, data: Transitions) -> None:
        """Judge the model on the real steps since its fit."""
        fresh = self.real_data(newest=self.num_timesteps - self._fitted_at)
        self.policy.set_training_mode(False)
        with _untouched(self.rng):
            self._log(model_error(self.dynamics, fresh, data))
            self._log(window_figures(world, Dyna.imagination_policy(self, world), fresh, data, self.rng))

    def _log(self, figures: dict[str, Any]) -> None:
        for name, value in figures.items():
            self.figures[name] = float(value)
            self.logger.record(name, float(value))

    def _store_transition(
        self,
        replay_buffer: ReplayBuffer,
        buffer_action: np.ndarray,
        new_obs: np.ndarray | dict[str, np.ndarray],
        reward: np.ndarray,
        dones: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        super()._store_transition(replay_buffer, buffer_action, new_obs, reward, dones, infos)
        assert self.episodes is not None
        self.episodes.stepped(self.policy.unscale_action(buffer_action), dones)

    def _setup_learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        reset_num_timesteps: bool = True,
        tb_log_name: str = "run",
        progress_bar: bool = False,
    ) -> tuple[int, BaseCallback]:
        assert self.env is not None, "set an environment before calling learn()"
        if self.episodes is None or self.episodes.env is not self.env:
            self.episodes = Episodes(self.env)
        begins = reset_num_timesteps or self._last_obs is None
        if begins:
            self.episodes.resetting()
        found = super()._setup_learn(total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar)
        if begins:
            self.episodes.reset()
        if reset_num_timesteps:
            self._next_refit = self._fitted_at = 0
        if self.verbose:
            asked = ", ".join(f"{number:.3g} {name}" for name, number in self.work(self._total_timesteps).items())
            print(f"{self._total_timesteps} real steps ask for {asked} at most")
        return found

    def save(self, path: Any, *args: Any, **kwargs: Any) -> None:
        """Write SB3's zip: policy, optimisers, arguments and the dynamics model, without the replay."""
        self._dynamics_card = blueprint(self.dynamics)
        super().save(path, *args, **kwargs)

    def _excluded_save_params(self) -> list[str]:
        mine = ["world", "rng", "watch", "_alarm", "spaces", "episodes", "_dynamics", "_low", "_range"]
        return [*super()._excluded_save_params(), *mine]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        modules, tensors = super()._get_torch_save_params()
        return [*modules, "dynamics"], tensors


@contextmanager
def _untouched(rng: torch.Generator) -> Iterator[None]:
    """Leave the generators that learning draws from as they were: looking must not change what is learned."""
    before = rng.get_state()
    devices = [rng.device] if rng.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield
    rng.set_state(before)


def default_dynamics(task: Task) -> ProbabilisticEnsemble:
    """Return the published ensemble, with the heads that the task cannot answer itself."""
    return ProbabilisticEnsemble(
        learn_reward=task.reward is None, learn_termination=task.terminated is None, angles=task.angles
    )
