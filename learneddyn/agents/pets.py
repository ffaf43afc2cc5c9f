"""PETS: plan with an ensemble of probabilistic networks, act, fit on everything seen, plan again.

    trial 1             random actions
    every later trial   fit the model on all real transitions, from the weights at hand
                        at each step: plan with particles in the model, execute the first action, shift the plan

Source: Chua, Calandra, McAllister, Levine, "Deep Reinforcement Learning in a Handful of Trials using Probabilistic
Dynamics Models" (2018). A trial is an episode. Deviations: the ensemble holds rows out and keeps the best weights of a
fit; a plan that meets NaN is never chosen, where the source gives it a finite cost.

Everything random in a trial follows from (seed, number of the trial), so that a run that was killed between two trials
and loaded goes on as if nothing had happened.
"""

import copy
import importlib
import inspect
import json
import time
from pathlib import Path
from typing import Any, TypeVar

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import MaybeCallback
from stable_baselines3.common.utils import is_vectorized_observation, safe_mean

import learneddyn
from learneddyn import tasks
from learneddyn.agents.diagnostics import Alarm, Stopwatch, change_scale, depth_error, imagination_figures, model_error
from learneddyn.agents.foresight import relive
from learneddyn.agents.mpc import MPC
from learneddyn.core import Json, Task, Transitions, generator
from learneddyn.data.store import load_transitions, save_transitions
from learneddyn.files import replaced_folder, surviving_folder, write_file
from learneddyn.models import AbstractDynamics, ProbabilisticEnsemble
from learneddyn.planners import CEM, AbstractPlanner, CategoricalCEM
from learneddyn.spaces import Spaces, encode
from learneddyn.world import Sentinel, World

FORMAT = 1
Agent = TypeVar("Agent", bound="PETS")
_FEWEST = 5
"""Rows of the first fit, at least: four to learn from and one to hold out."""


class AgentFileError(ValueError):
    """An agent's folder that cannot be read: missing, damaged, of another format, or not of this class."""


class PETS(BaseAlgorithm):
    """Probabilistic ensembles with trajectory sampling, with Stable-Baselines3's surface.

    ``PETS(env).learn(3000)``; predict, callbacks, loggers and `evaluate_policy` work as with any algorithm of
    Stable-Baselines3. `save` writes a folder that nothing has to unpickle. Before the first fit `predict` answers
    random actions, as the loop does.

    Args:
        env: one environment (or its id), not wrapped in VecNormalize: the model standardises by itself.
        model: dynamics model to learn, by default five networks of 3 x 200 that train for five epochs a trial, with
            the heads that the task needs. It is fitted in place.
        planner: by default the source's CEM, or `CategoricalCEM` where actions are discrete.
        particles: imagined futures per plan.
        sampler: ``"tsinf"`` (a particle keeps its network) or ``"ts1"`` (it draws another at every step), or any
            other of `learneddyn.world.SAMPLERS`.
        task: reward and termination; by default looked up under the environment's id.
        random_trials: trials of random actions before the first fit; more where they give fewer than five rows.
        sentinel: told when the model diverges inside a plan; by default a warning, once a trial, that names the member
            and the step. `learneddyn.world.strict` raises.
        diagnose: log what `learneddyn.agents.foresight` and `learneddyn.agents.diagnostics` measure at the end of every
            trial; it changes nothing of what is learned.
        seed: of everything random; None draws one.
        device: of model and planning.
        verbose: see Stable-Baselines3.
        tensorboard_log: see Stable-Baselines3.
        stats_window_size: see Stable-Baselines3.

    Raises:
        ValueError: particles or random_trials below 1, several environments, a VecNormalize, or a planner that does
            not suit the actions.
        UnknownTask: no task is given or known for the environment.
    """

    def __init__(
        self,
        env: Any,
        model: AbstractDynamics | None = None,
        planner: AbstractPlanner | None = None,
        *,
        particles: int = 20,
        sampler: str = "tsinf",
        task: Task | None = None,
        random_trials: int = 1,
        sentinel: Sentinel | None = None,
        diagnose: bool = True,
        seed: int | None = None,
        device: torch.device | str = "auto",
        verbose: int = 0,
        tensorboard_log: str | None = None,
        stats_window_size: int = 100,
    ) -> None:
        for name, value in (("particles", particles), ("random_trials", random_trials)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        super().__init__(
            BasePolicy,
            env,
            learning_rate=0.0,
            seed=seed,
            device=device,
            verbose=verbose,
            tensorboard_log=tensorboard_log,
            stats_window_size=stats_window_size,
        )
        if self._vec_normalize_env is not None:
            raise ValueError("the model standardises its inputs itself: give the environment without VecNormalize")
        self.spaces = Spaces(self.observation_space, self.action_space)
        self.task = tasks.of_env(self.env) if task is None else task
        discrete = isinstance(self.action_space, gym.spaces.Discrete)
        self.planner = planner or (CategoricalCEM(horizon=25) if discrete else CEM())
        if self.planner.discrete != discrete:
            raise ValueError(f"{type(self.planner).__name__} does not plan actions of {self.action_space}")
        self.dynamics = model or published_ensemble(self.task)
        self.particles, self.sampler, self.random_trials = particles, sampler, random_trials
        self.sentinel, self.diagnose = sentinel, diagnose
        self.data: Transitions | None = None
        """All real transitions of finished trials."""
        self.returns: list[float] = []
        """Real return of every finished trial."""
        self.figures: dict[str, float] = {}
        """Latest diagnostics, under their logger keys."""
        self.history: list[dict[str, float]] = []
        """`figures` at the end of every finished trial."""
        self.watch = Stopwatch()
        self.mpc: MPC | None = None
        self._rows: list[tuple[np.ndarray, ...]] = []
        self._alarm = Alarm("plans that lead there are not chosen")
        self._setup_model()

    @property
    def trials(self) -> int:
        """Finished trials."""
        return len(self.returns)

    def _setup_model(self) -> None:
        self.set_random_seed(self.seed)
        self.dynamics.to(self.device)
        if self.dynamics.spaces is not None:
            self.mpc = self._make_mpc(self._stream("plan"))

    def set_random_seed(self, seed: int | None = None) -> None:
        """Set what all later trials are drawn from; no global generator is touched."""
        self.entropy = int(np.random.SeedSequence().generate_state(1)[0]) if seed is None else seed
        self.action_space.seed(self.entropy)

    def make_world(self) -> World:
        """Return the world to plan in, around the fitted model."""
        return World(self.dynamics, self.task, sampler=self.sampler, sentinel=self.sentinel or self._alarm)

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """Return the first action of the best plan and the planning state, see `learneddyn.agents.MPC.predict`."""
        if self.mpc is not None:
            return self.mpc.predict(observation, state, episode_start, deterministic)
        seen: Any = observation
        if not is_vectorized_observation(seen, self.observation_space):
            return np.asarray(self.action_space.sample()), None
        lanes = len(next(iter(seen.values())) if isinstance(seen, dict) else seen)
        return np.stack([self.action_space.sample() for _ in range(lanes)]), None

    def learn(
        self: Agent,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str = "PETS",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
        checkpoint: str | Path | None = None,
    ) -> Agent:
        """Take real steps, in whole trials except for the last one.

        Every call begins a new trial; a trial that was cut counts with the rows it has.

        Args:
            total_timesteps: real steps.
            callback: see Stable-Baselines3.
            log_interval: trials between two writes of the logger.
            tb_log_name: see Stable-Baselines3.
            reset_num_timesteps: count steps from zero; what was learned stays.
            progress_bar: see Stable-Baselines3.
            checkpoint: folder to `save` to after every trial.

        Raises:
            ValueError: the agent was loaded without an environment.
            DataError: the real data cannot be learned from.
            FloatingPointError: a fit diverged (the weights before it are kept), or a strict sentinel.
        """
        if self.env is None:
            raise ValueError("this agent has no environment to learn in: load it with one, or call set_env(env)")
        if self.verbose:
            asked = ", ".join(f"{number:.3g} {name}" for name, number in self.work(total_timesteps).items())
            print(f"{total_timesteps} real steps ask for {asked} at most")
        self._last_obs = np.empty(0)  # `_trial` resets the environment itself
        total, callbacks = self._setup_learn(total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar)
        callbacks.on_training_start(locals(), globals())
        going = True
        while going and self.num_timesteps < total:
            if self.trials >= self.random_trials and self.data is not None and len(self.data) >= _FEWEST:
                self.refit()
            going = self._trial(total, callbacks)
            if checkpoint is not None:
                self.save(checkpoint)
            if log_interval and self.trials % log_interval == 0:
                self.dump_logs()
        callbacks.on_training_end()
        return self

    def work(self, total_timesteps: int) -> dict[str, int]:
        """Return what learning for so many real steps asks for, at most: steps of one network inside plans."""
        each = self.planner.sequences * self.planner.horizon * self.particles
        return {"planned_steps": each * total_timesteps}

    def refit(self) -> None:
        """Fit the model on all real transitions, and plan in it from now on.

        Raises:
            DataError: the data cannot be learned from.
            FloatingPointError: the fit diverged; the weights before it are kept.
        """
        if self.data is None:
            raise ValueError("there are no real transitions to fit on yet: call learn first")
        with self.watch("fit"):
            report = self.dynamics.fit(self.data.to(self.device), rng=self._rng("fit"))
        self.mpc = self._make_mpc(self._stream("plan"))
        self._log({"model/fit_epochs": report.epochs} | {f"model/{name}": v for name, v in report.metrics.items()})

    def _trial(self, total: int, callback: BaseCallback) -> bool:
        """Play one episode, or as much of it as ``total`` allows; False where a callback wants to stop."""
        env = self.env
        assert env is not None
        self._rows = []
        self._alarm.begin(f"trial {self.trials + 1}: ")
        chance = copy.deepcopy(self.action_space)
        chance.seed(self._stream("act"))
        env.seed(self._stream("reset"))
        obs: Any = env.reset()
        state, done, going = None, False, True
        callback.on_rollout_start()
        while going and not done and self.num_timesteps < total:
            with self.watch("plan"):
                if self.mpc is None:
                    action = np.asarray(chance.sample())[None]
                else:
                    action, state = self.mpc.predict(obs, state, deterministic=True)
            with self.watch("real"):
                next_obs, reward, dones, infos = env.step(action)
            self.num_timesteps += 1
            done = bool(dones[0])
            self._store(obs, action, reward, next_obs, done, infos[0])
            if done:
                self._finish_trial()
            self._update_info_buffer(infos, dones)
            self._update_current_progress_remaining(self.num_timesteps, total)
            obs = next_obs
            callback.update_locals(locals())
            going = callback.on_step()
        if not done:
            self._finish_trial()
        callback.on_rollout_end()
        return going

    def _store(
        self, obs: Any, action: np.ndarray, reward: np.ndarray, next_obs: Any, done: bool, info: dict[str, Any]
    ) -> None:
        """Keep one transition; the observation after the last step is the one that the step returned."""
        space = self.observation_space
        if done:
            final = info["terminal_observation"]
            next_obs = {k: v[None] for k, v in final.items()} if isinstance(final, dict) else np.asarray(final)[None]
        terminated = np.array([done and not info.get("TimeLimit.truncated", False)])
        flat = encode(space, obs), encode(self.action_space, action), reward, encode(space, next_obs), terminated
        self._rows.append(flat)

    def _finish_trial(self) -> None:
        """Judge the model on the trial, and add the trial to the data."""
        trial = self._running()
        seen = trial if self.data is None else Transitions.cat([self.data, trial])
        if self.mpc is not None and self.diagnose:
            with self.watch("judge"):
                self._judge(trial.to(self.device), seen.to(self.device))
        self.data = seen
        self.returns.append(float(trial.reward.sum()))
        self.history.append(dict(self.figures))
        self._rows = []

    def _judge(self, fresh: Transitions, seen: Transitions) -> None:
        """Log what the model, which has not seen ``fresh``, says about it."""
        assert self.mpc is not None
        world, horizon = self.mpc.world, self.planner.horizon
        relived = relive(world, fresh, horizon, self._rng("judge"))
        self._log(model_error(self.dynamics, fresh, seen))
        self._log(depth_error(world, fresh, change_scale(seen), horizon)[0])
        self._log(relived.figures | imagination_figures(world, relived.rows) | self.watch.shares())

    def _running(self) -> Transitions:
        """Return the rows of the running trial."""
        episode = np.zeros(len(self._rows), np.int64)
        obs, action, reward, next_obs, terminated = map(np.concatenate, zip(*self._rows, strict=True))
        return Transitions.from_numpy(
            obs, action, reward, next_obs, terminated, episode, spaces=self.spaces, source="real"
        )

    def _make_mpc(self, seed: int) -> MPC:
        return MPC(self.make_world(), self.planner, particles=self.particles, seed=seed)

    def _stream(self, purpose: str) -> int:
        """Return the seed of one purpose in the trial to come."""
        number = ("act", "reset", "plan", "fit", "judge").index(purpose)
        return int(np.random.SeedSequence((self.entropy, self.trials, number)).generate_state(1)[0])

    def _rng(self, purpose: str) -> torch.Generator:
        return generator(self._stream(purpose), self.device)

    def _log(self, figures: dict[str, Any]) -> None:
        for name, value in figures.items():
            self.figures[name] = float(value)

    def dump_logs(self) -> None:
        """Write the figures of the last trial to the logger."""
        seconds = max((time.time_ns() - self.start_time) / 1e9, 1e-9)
        for name, value in self.figures.items():
            self.logger.record(name, value)
        if self.ep_info_buffer:
            self.logger.record("rollout/ep_rew_mean", safe_mean([info["r"] for info in self.ep_info_buffer]))
            self.logger.record("rollout/ep_len_mean", safe_mean([info["l"] for info in self.ep_info_buffer]))
        if self.returns:
            self.logger.record("rollout/ep_rew", self.returns[-1])
        self.logger.record("time/episodes", self.trials, exclude="tensorboard")
        self.logger.record("time/fps", int((self.num_timesteps - self._num_timesteps_at_start) / seconds))
        self.logger.record("time/total_timesteps", self.num_timesteps, exclude="tensorboard")
        self.logger.dump(step=self.num_timesteps)

    def save(self, path: Any, exclude: Any = None, include: Any = None) -> None:
        """Write a folder: ``pets.json``, ``data.safetensors`` and ``model/``; a kill leaves the old or the new one.

        Saved within a trial, the rows of that trial are data, and the loaded agent begins the next one.

        Raises:
            ValueError: ``exclude`` or ``include`` (they choose what Stable-Baselines3 pickles; nothing is pickled).
        """
        if exclude is not None or include is not None:
            raise ValueError("PETS.save pickles nothing, so there is nothing to exclude or include")
        data, returns, history = self.data, self.returns, self.history
        if self._rows:
            running = self._running()
            data = running if data is None else Transitions.cat([data, running])
            returns, history = [*returns, float(running.reward.sum())], [*history, self.figures]
        card = {
            "format": FORMAT,
            "class": _name(type(self)),
            "version": learneddyn.__version__,
            "task": self.task.real_id,
            "spaces": self.spaces.to_json(),
            "model": described(self.dynamics),
            "planner": described(self.planner),
            "arguments": {name: getattr(self, name) for name in _ARGUMENTS},
            "entropy": self.entropy,
            "planning_seed": None if self.mpc is None else self.mpc.seed,
            "num_timesteps": self.num_timesteps,
            "returns": returns,
            "history": history,
            "seconds": self.watch.seconds,
        }
        with replaced_folder(Path(path)) as fresh:
            if data is not None:
                save_transitions(fresh / "data.safetensors", data)
            if self.dynamics.spaces is not None:
                self.dynamics.save(fresh / "model")
            write_file(fresh / "pets.json", json.dumps(card, indent=2).encode())

    @classmethod
    def load(  # type: ignore[override]  # Stable-Baselines3's further arguments are about pickles
        cls: type[Agent],
        path: str | Path,
        env: Any = None,
        device: torch.device | str = "auto",
        *,
        task: Task | None = None,
        **changes: Any,
    ) -> Agent:
        """Read a folder written by `save`; with an environment, ``learn`` goes on where the saved agent stood.

        Args:
            path: the folder.
            env: to learn on in; None for `predict` alone.
            device: of model and planning.
            task: where the saved one is not known by its id.
            **changes: arguments of the constructor to replace: sentinel, verbose, tensorboard_log ...

        Raises:
            AgentFileError: missing, damaged, of another format, or the environment has other spaces.
            ModelFileError: the model inside is damaged.
            DataError: the data inside is damaged.
        """
        folder = surviving_folder(Path(path))
        card = _read(folder)
        spaces = Spaces.from_json(card["spaces"])
        if (folder / "model").exists():
            model = AbstractDynamics.load(folder / "model")
        else:
            model = _made(card["model"], AbstractDynamics)
        agent = cls(
            _Nowhere(spaces) if env is None else env,
            model,
            _made(card["planner"], AbstractPlanner),
            task=tasks.get(card["task"]) if task is None else task,
            device=device,
            **card["arguments"] | {"seed": card["entropy"]} | changes,
        )
        if agent.spaces != spaces:
            raise AgentFileError(f"{folder} was learned in the spaces {tuple(spaces)}, got {tuple(agent.spaces)}")
        if env is None:
            agent.env = None
        agent.returns, agent.num_timesteps = card["returns"], card["num_timesteps"]
        agent.history, agent.watch.seconds = card["history"], card["seconds"]
        agent.figures = dict(agent.history[-1]) if agent.history else {}
        if agent.mpc is not None:
            agent.mpc = agent._make_mpc(card["planning_seed"])
        if (folder / "data.safetensors").exists():
            agent.data = load_transitions(folder / "data.safetensors")
        return agent


_ARGUMENTS = ("particles", "sampler", "random_trials", "diagnose")
"""Arguments of the constructor that a saved agent keeps."""


def published_ensemble(task: Task) -> ProbabilisticEnsemble:
    """Return the ensemble that the source pushes objects with, for states of any kind: five networks of 3 x 200.

    All five are used, and train for five epochs of batches of 32 a trial.
    """
    return ProbabilisticEnsemble(
        5,
        5,
        hidden=(200, 200, 200),
        learn_reward=task.reward is None,
        learn_termination=task.terminated is None,
        angles=task.angles,
        weight_decay=(2.5e-4, 5e-4, 5e-4, 7.5e-4),
        batch_size=32,
        max_epochs=5,
    )


class _Nowhere(gym.Env[Any, Any]):
    """Spaces without an environment, for an agent that only predicts."""

    def __init__(self, spaces: Spaces) -> None:
        self.observation_space, self.action_space = spaces


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def described(part: AbstractDynamics | AbstractPlanner) -> Json:
    """Return the class of a model or planner and its constructor's arguments, read from attributes of their names."""
    names = list(inspect.signature(type(part).__init__).parameters)[1:]
    return {"class": _name(type(part)), "config": {name: getattr(part, name) for name in names}}


def _made(card: Json, base: type[Any]) -> Any:
    """Return the object that a card describes.

    Raises:
        AgentFileError: its class cannot be imported, is no ``base``, or does not take the arguments.
    """
    module, _, name = card["class"].rpartition(".")
    try:
        kind = getattr(importlib.import_module(module), name)
        if not (isinstance(kind, type) and issubclass(kind, base)):
            raise TypeError(f"it is no {base.__name__}")
        return kind(**card["config"])
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise AgentFileError(f"cannot make a {card['class']}: {error}") from error


def _read(folder: Path) -> Json:
    try:
        card = json.loads((folder / "pets.json").read_text())
    except (OSError, ValueError) as error:
        raise AgentFileError(f"{folder} is not a readable PETS folder: {error}") from error
    if not isinstance(card, dict) or card.get("format") != FORMAT:
        raise AgentFileError(f"{folder}/pets.json is not of format {FORMAT}, which this version reads")
    return card
