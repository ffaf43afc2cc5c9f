"""IWOCS with learned policies: an agent per worst case, and a filter that recognises which case one is in.

Source: Zouitine, Geist, Rachelson, "Solving robust MDPs as a sequence of static RL problems" (2024). A default agent is
trained on random models (domain randomisation), and one agent on every worst case, found by search for the policy at
hand (`learneddyn.agents.worst_case`). Each case also gets

    a critic       its target has no entropy term: with one, the smallest value would be the one with least entropy
    a forecast     of the next observation, trained by the L1 error
    a radius       the case is valid in a step where its forecast of the observation was that close (L1)

The policy acts as the agent of the valid case with the smallest value, and as the default agent where no case is valid
and in the first step of an episode: values of models that one is not in mean nothing.

Deviations: critics start from the agent's own and are fitted after its training, to the finished policy, on its replay
memory (published: beside it); radii are chosen by the worst return over ``probes``, not over the whole set.
"""

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import gymnasium as gym
import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.policies import ContinuousCritic
from stable_baselines3.common.type_aliases import MaybeCallback, ReplayBufferSamples
from stable_baselines3.common.utils import is_vectorized_observation
from torch import Tensor, nn

from learneddyn.agents.sac import FastSAC
from learneddyn.agents.worst_case import Round, Search, incremental
from learneddyn.files import replaced_folder, surviving_folder, write_file

M = TypeVar("M")
RADII = tuple(round(0.1 * step, 1) for step in range(1, 11))


@dataclass
class Case(Generic[M]):
    """A solved model: its agent, its critic without entropy, its forecast and the radius of the forecast's validity.

    The critic maps observations and scaled actions to several values ``[b, 1]``, the forecast to the next observations.
    """

    model: M
    agent: OffPolicyAlgorithm
    critic: nn.Module
    forecast: nn.Module
    radius: float


class Forecast(nn.Module):
    """Next observation from observation and scaled action, trained by the L1 error.

    Args:
        obs_dim: columns of the observation.
        action_dim: columns of the action.
        width: of the two hidden layers.
    """

    def __init__(self, obs_dim: int, action_dim: int, width: int = 64) -> None:
        super().__init__()
        inputs = obs_dim + action_dim
        self.net = nn.Sequential(
            nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, obs_dim)
        )
        for name, columns in (("input", inputs), ("change", obs_dim)):
            self.register_buffer(f"{name}_mean", torch.zeros(columns))
            self.register_buffer(f"{name}_std", torch.ones(columns))

    def forward(self, obs: Float[Tensor, "b o"], action: Float[Tensor, "b a"]) -> Float[Tensor, "b o"]:
        """Return the next observation; actions in [-1, 1]."""
        x = (torch.cat([obs, action], dim=1) - self.input_mean) / self.input_std
        return obs + self.change_mean + self.net(x) * self.change_std

    def standardise(self, batch: ReplayBufferSamples) -> None:
        """Take the scale of inputs and changes from a large batch."""
        inputs = torch.cat([batch.observations, batch.actions], dim=1)
        change = batch.next_observations - batch.observations
        for name, columns in (("input", inputs), ("change", change)):
            std = columns.std(dim=0)
            getattr(self, f"{name}_mean").copy_(columns.mean(dim=0))
            getattr(self, f"{name}_std").copy_(torch.where(std < 1e-8, 1.0, std))

    input_mean: Tensor
    input_std: Tensor
    change_mean: Tensor
    change_std: Tensor


class IWOCS(Generic[M]):
    """Learn a policy for the worst model of a set, as a sequence of ordinary problems.

    ``make`` turns a model into an environment: the parameters of a plant into that plant, or the number of a World into
    its `LearnedEnv`; learning, search and validity treat both alike.

    Args:
        policy: of the agents, for example ``"MlpPolicy"``.
        make: a model to a fresh environment with a time limit, a flat Box as observation and a bounded Box as action.
        nominal: the model of the first case. Models must survive JSON (lists come back as tuples) to be saved.
        search: for the worst model: `worst_case.every` or `worst_case.cma_es`.
        draw: a random model, for domain randomisation.
        default_timesteps: environment steps of the default agent.
        case_timesteps: environment steps of every case's agent.
        agent: class of the agents, with SB3's continuous critics.
        agent_kwargs: of its constructor.
        lanes: environments that every agent trains on side by side.
        fit_steps: gradient steps of every critic and every forecast, with 256 rows each.
        radii: radii to choose from, in units of the observation's columns summed.
        probes: random models, besides those solved and found, over which radii are compared; 0 and one radius: no play.
        episodes: per model, with the same seeds for all models, to value a policy.
        tolerance: of the stop rule, in discounted return.
        seed: of everything; agents get seed, seed + 100 ...
        verbose: 1 prints a line per case.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        policy: str,
        make: Callable[[M], gym.Env[Any, Any]],
        *,
        nominal: M,
        search: Search[M],
        draw: Callable[[np.random.Generator], M],
        default_timesteps: int,
        case_timesteps: int,
        agent: type[OffPolicyAlgorithm] = FastSAC,
        agent_kwargs: dict[str, Any] | None = None,
        lanes: int = 1,
        fit_steps: int = 2000,
        radii: Sequence[float] = RADII,
        probes: int = 4,
        episodes: int = 3,
        tolerance: float = 0.0,
        seed: int = 0,
        verbose: int = 0,
    ) -> None:
        for name, value, least in (
            ("default_timesteps", default_timesteps, 1),
            ("case_timesteps", case_timesteps, 1),
            ("lanes", lanes, 1),
            ("fit_steps", fit_steps, 1),
            ("radii", len(radii), 1),
            ("probes", probes, 0),
            ("episodes", episodes, 1),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if (agent_kwargs or {}).get("n_steps", 1) != 1:
            raise ValueError(f"n_steps must be 1: forecasts are of the next step, got {agent_kwargs}")
        self.make, self.nominal, self.search, self.draw = make, nominal, search, draw
        self.default_timesteps, self.case_timesteps = default_timesteps, case_timesteps
        self.agent, self.agent_kwargs, self._policy_name = agent, dict(agent_kwargs or {}), policy
        self.lanes = lanes
        self.fit_steps, self.radii, self.probes, self.episodes = fit_steps, tuple(radii), probes, episodes
        self.tolerance, self.seed, self.verbose = tolerance, seed, verbose
        self.rounds: list[Round[M]] = []
        self.policy: RobustPolicy[M] | None = None

    def learn(self, total_timesteps: int, callback: MaybeCallback = None, progress_bar: bool = False) -> "IWOCS[M]":
        """Train the default agent, then one case after the other while ``total_timesteps`` last.

        The loop ends early where the worst case keeps what was promised, or is one that has been solved. A second call
        goes on with more cases.

        Args:
            total_timesteps: environment steps of all agents of this call; steps of search and probing are not counted.
            callback: of every agent's ``learn``.
            progress_bar: of every agent's ``learn``.

        Raises:
            ValueError: too few steps for the default agent (where there is none yet) and one case.
        """
        wanted = self.case_timesteps + (self.default_timesteps if self.policy is None else 0)
        if total_timesteps < wanted:
            raise ValueError(
                f"total_timesteps must be at least {wanted} (default agent and one case), got {total_timesteps}"
            )
        if self.policy is None:
            env = partial(Randomised, self.make, self.draw, self.nominal)
            default = self._trained(env, self.default_timesteps, 0, callback, progress_bar)
            self.policy = RobustPolicy(default, [])
            total_timesteps -= self.default_timesteps
        robust = self.policy
        starts = self._starts()

        def solve(model: M) -> Case[M]:
            robust.cases.append(self._solved(model, callback, progress_bar))
            self._choose_radius()
            return robust.cases[-1]

        def combine(_: list[Case[M]]) -> tuple[RobustPolicy[M], float]:
            return robust, robust.promised(starts)

        def value(policy: RobustPolicy[M], models: Sequence[M]) -> list[float]:
            return self._values(policy, models).mean(axis=1).tolist()

        if self.rounds and not self._open():
            return self
        first = self.rounds[-1].worst if self.rounds else self.nominal
        _, rounds = incremental(
            first,
            solve,
            combine,
            self.search,
            value,
            tolerance=self.tolerance,
            rounds=total_timesteps // self.case_timesteps,
            known=[turn.solved for turn in self.rounds],
        )
        self.rounds += rounds
        if self.verbose:
            for turn in rounds:
                print(
                    f"IWOCS: solved {turn.solved}, worst {turn.worst}: {turn.value:.4g}, promised {turn.promised:.4g}"
                )
        return self

    def predict(
        self,
        observation: np.ndarray,
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """Act by the policy learned so far, see `RobustPolicy.predict`.

        Raises:
            ValueError: nothing has been learned.
        """
        if self.policy is None:
            raise ValueError("this IWOCS has not learned yet: call learn(total_timesteps)")
        return self.policy.predict(observation, state, episode_start, deterministic)

    def save(self, folder: str | Path) -> None:
        """Write policy and rounds into ``folder``: the agents as SB3's zip files, the rest as JSON and safetensors.

        A kill at any moment leaves the old folder or the new one. Replay memories are not kept.

        Raises:
            ValueError: nothing has been learned.
        """
        if self.policy is None:
            raise ValueError("this IWOCS has not learned yet: there is nothing to save")
        with replaced_folder(Path(folder)) as fresh:
            self.policy.write(fresh)
            rounds = json.dumps([asdict(turn) for turn in self.rounds], indent=2)
            write_file(fresh / "rounds.json", rounds.encode())

    def restore(self, folder: str | Path, device: torch.device | str = "cpu") -> "IWOCS[M]":
        """Take policy and rounds from a folder that `save` wrote; a later `learn` adds cases.

        Raises:
            ValueError: ``folder`` holds no policy, or no rounds; what was learned before stays.
        """
        policy = RobustPolicy.load(folder, self.agent, device)
        try:
            rounds = json.loads((surviving_folder(Path(folder)) / "rounds.json").read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"{folder} holds no rounds of IWOCS: {error}") from error
        names = ("solved", "worst")
        self.rounds = [Round(**turn | {name: _model(turn[name]) for name in names}) for turn in rounds]
        self.policy = policy
        return self

    def _open(self) -> bool:
        """Tell whether the last round leaves something to solve."""
        last = self.rounds[-1]
        known = any(last.worst == turn.solved for turn in self.rounds)
        return abs(last.value - last.promised) > self.tolerance and not known

    def _trained(
        self, make: Callable[[], gym.Env[Any, Any]], steps: int, number: int, callback: MaybeCallback, bar: bool
    ) -> OffPolicyAlgorithm:
        seed = self.seed + 100 * number
        env = make_vec_env(make, self.lanes, seed)
        agent = self.agent(self._policy_name, env, seed=seed, **self.agent_kwargs)
        agent.learn(steps, callback=callback, progress_bar=bar)
        return agent

    def _solved(self, model: M, callback: MaybeCallback, progress_bar: bool) -> Case[M]:
        assert self.policy is not None
        number = len(self.policy.cases) + 1
        agent = self._trained(partial(self.make, model), self.case_timesteps, number, callback, progress_bar)
        with torch.random.fork_rng():
            torch.manual_seed(self.seed + number)
            critic = unregularised_critic(agent, self.fit_steps)
            forecast = fitted_forecast(agent, self.fit_steps)
        return Case(model, agent, critic, forecast, max(self.radii))

    def _choose_radius(self) -> None:
        """Give the newest case the radius whose worst value over models found and drawn is largest; ties: smallest."""
        assert self.policy is not None
        rng = np.random.default_rng((self.seed, len(self.policy.cases)))
        models = [case.model for case in self.policy.cases] + [self.draw(rng) for _ in range(self.probes)]
        case, worths = self.policy.cases[-1], []
        for radius in self.radii if len(self.radii) > 1 else ():
            case.radius = radius
            worths.append(self._values(self.policy, models).mean(axis=1).min())
        case.radius = self.radii[int(np.argmax(worths))] if worths else self.radii[0]

    def _values(self, policy: "RobustPolicy[M]", models: Sequence[M]) -> Float[np.ndarray, "m e"]:
        """Return the discounted returns of ``episodes`` episodes per model."""
        envs = [self.make(model) for model in models for _ in range(self.episodes)]
        seeds = [self.seed + episode for _ in models for episode in range(self.episodes)]
        return play(policy, envs, seeds, policy.default.gamma).reshape(len(models), self.episodes)

    def _starts(self) -> np.ndarray:
        env = self.make(self.nominal)
        starts = np.stack([env.reset(seed=self.seed + episode)[0] for episode in range(self.episodes)])
        env.close()
        return starts


class RobustPolicy(Generic[M]):
    """What IWOCS acts by: a default agent, and the cases of which the valid one with the least value acts.

    ``chosen`` says, for every lane of the last `predict`, who acted: 0 the default agent, j the j-th case.

    Args:
        default: acts where no case is valid.
        cases: solved models.
    """

    def __init__(self, default: OffPolicyAlgorithm, cases: list[Case[M]]) -> None:
        self.default, self.cases = default, cases
        self.chosen: Int[np.ndarray, " b"] = np.zeros(0, dtype=np.int64)

    @torch.no_grad()
    def predict(
        self,
        observation: np.ndarray,
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """Return actions and what the next step needs: these observations and the scaled actions."""
        many = is_vectorized_observation(observation, self.default.observation_space)
        batch = observation if many else observation[None]
        agents = [self.default, *(case.agent for case in self.cases)]
        proposed = np.stack([agent.predict(batch, deterministic=deterministic)[0] for agent in agents])
        scaled = np.stack([self.default.policy.scale_action(action) for action in proposed])
        valid = self.valid(batch, state, episode_start)
        values = torch.where(valid, self._values(batch, scaled[1:]), torch.inf)
        first = values.argmin(dim=0) + 1 if self.cases else torch.zeros(len(batch), dtype=torch.long)
        self.chosen = torch.where(valid.any(dim=0), first, 0).numpy()
        lanes = np.arange(len(batch))
        action = proposed[self.chosen, lanes]
        return action if many else action[0], (batch, scaled[self.chosen, lanes])

    @torch.no_grad()
    def valid(
        self, batch: np.ndarray, state: tuple[np.ndarray, ...] | None, episode_start: np.ndarray | None
    ) -> Tensor:
        """Return ``[case, lane]``: whether a case's forecast from the step before came close; never in a first step."""
        fresh = np.zeros(len(batch), dtype=bool) if episode_start is None else np.asarray(episode_start, dtype=bool)
        if state is None or not self.cases:
            return torch.zeros(len(self.cases), len(batch), dtype=torch.bool)
        before, scaled, now = (self._tensor(part) for part in (*state, batch))
        wrong = torch.stack([(case.forecast(before, scaled) - now).abs().sum(dim=1) for case in self.cases])
        radii = torch.tensor([[case.radius] for case in self.cases], device=wrong.device)
        return (wrong <= radii).cpu() & ~torch.from_numpy(fresh)

    def promised(self, starts: np.ndarray) -> float:
        """Return the mean over ``starts`` of the least value any case gives its own agent there."""
        proposed = [case.agent.predict(starts, deterministic=True)[0] for case in self.cases]
        scaled = np.stack([self.default.policy.scale_action(action) for action in proposed])
        return float(self._values(starts, scaled).amin(dim=0).mean())

    @torch.no_grad()
    def _values(self, batch: np.ndarray, scaled: np.ndarray) -> Tensor:
        """Return ``[case, lane]``: what every case's critic says of its own agent's action."""
        if not self.cases:
            return torch.zeros(0, len(batch))
        obs = self._tensor(batch)
        pairs = zip(self.cases, scaled, strict=True)
        return torch.stack([least(case.critic, obs, self._tensor(action)) for case, action in pairs]).cpu()

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.as_tensor(np.reshape(values, (len(values), -1)), dtype=torch.float32, device=self.default.device)

    def write(self, folder: Path) -> None:
        """Write all parts into an existing folder."""
        self.default.save(folder / "default.zip")
        for number, case in enumerate(self.cases):
            case.agent.save(folder / f"case-{number}.zip")
            parts = {"critic": case.critic, "forecast": case.forecast}
            tensors = {
                f"{name}.{key}": value.contiguous()
                for name, part in parts.items()
                for key, value in part.state_dict().items()
            }
            write_file(folder / f"case-{number}.safetensors", save_tensors(tensors))
        cards = [{"model": case.model, "radius": case.radius} for case in self.cases]
        write_file(folder / "robust.json", json.dumps(cards, indent=2).encode())

    @classmethod
    def load(
        cls, folder: str | Path, agent: type[OffPolicyAlgorithm] = FastSAC, device: torch.device | str = "cpu"
    ) -> "RobustPolicy[Any]":
        """Read what `IWOCS.save` wrote; acting needs no environment.

        Raises:
            ValueError: ``folder`` holds no policy.
        """
        source = surviving_folder(Path(folder))
        try:
            cards = json.loads((source / "robust.json").read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"{folder} holds no robust policy: {error}") from error
        cases: list[Case[Any]] = []
        for number, card in enumerate(cards):
            actor = agent.load(source / f"case-{number}.zip", device=device)
            tensors = load_tensors((source / f"case-{number}.safetensors").read_bytes())
            critic, forecast = _critic_of(actor), _forecast_of(actor)
            for name, part in (("critic", critic), ("forecast", forecast)):
                part.load_state_dict(
                    {
                        key.removeprefix(f"{name}."): tensor
                        for key, tensor in tensors.items()
                        if key.startswith(f"{name}.")
                    }
                )
            cases.append(Case(_model(card["model"]), actor, critic, forecast, card["radius"]))
        return cls(agent.load(source / "default.zip", device=device), cases)


class Randomised(gym.Env[Any, Any]):
    """Another model in every episode: domain randomisation.

    Args:
        make: a model to an environment.
        draw: a random model.
        first: a model whose spaces are those of all.
    """

    def __init__(
        self, make: Callable[[M], gym.Env[Any, Any]], draw: Callable[[np.random.Generator], M], first: M
    ) -> None:
        self._make, self._draw, self._env = make, draw, make(first)
        self.observation_space, self.action_space = self._env.observation_space, self._env.action_space

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode in a model drawn for it."""
        super().reset(seed=seed)
        self._env.close()
        self._env = self._make(self._draw(self.np_random))
        return self._env.reset(seed=int(self.np_random.integers(2**31)), options=options)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Step the model of this episode."""
        return self._env.step(action)

    def close(self) -> None:
        """Close the environment at hand."""
        self._env.close()


def play(
    policy: RobustPolicy[Any], envs: Sequence[gym.Env[Any, Any]], seeds: Sequence[int], discount: float = 1.0
) -> Float[np.ndarray, " n"]:
    """Return the return of one deterministic episode per environment, all side by side; closes them."""
    batch = np.stack([env.reset(seed=seed)[0] for env, seed in zip(envs, seeds, strict=True)])
    total, alive, weight, state = np.zeros(len(envs)), np.ones(len(envs), dtype=bool), 1.0, None
    while alive.any():
        action, state = policy.predict(batch, state, np.zeros(len(envs), dtype=bool), deterministic=True)
        batch = batch.copy()
        for lane in np.flatnonzero(alive).tolist():
            batch[lane], reward, ended, cut, _ = envs[lane].step(action[lane])
            total[lane] += weight * float(reward)
            alive[lane] = not (ended or cut)
        weight *= discount
    for env in envs:
        env.close()
    return total


def least(critic: nn.Module, obs: Float[Tensor, "b o"], action: Float[Tensor, "b a"]) -> Float[Tensor, " b"]:
    """Return the smallest of a critic's values."""
    return torch.cat(critic(obs, action), dim=1).amin(dim=1)


def unregularised_critic(agent: OffPolicyAlgorithm, steps: int) -> ContinuousCritic:
    """Return a critic of the agent's finished, deterministic policy, fitted without entropy on its replay memory.

    It starts from the agent's critic; its target nets follow at the agent's rate. Random numbers come from torch's and
    NumPy's global generators, as SB3's replay does.

    Raises:
        ValueError: an agent without SB3's continuous critic, or without rows to learn from.
    """
    critic = _critic_of(agent)
    target = copy.deepcopy(critic)
    optimizer = torch.optim.Adam(critic.parameters(), lr=agent.lr_schedule(1.0))
    for _ in range(steps):
        batch = _sampled(agent)
        with torch.no_grad():
            action = agent.policy._predict(batch.next_observations, deterministic=True)
            value = least(target, batch.next_observations, action)[:, None]
            wanted = batch.rewards + agent.gamma * (1 - batch.dones) * value
        loss = torch.stack([(q - wanted).square().mean() for q in critic(batch.observations, batch.actions)]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for slow, fast in zip(target.parameters(), critic.parameters(), strict=True):
                slow.lerp_(fast, agent.tau)
    return critic.requires_grad_(False)


def fitted_forecast(agent: OffPolicyAlgorithm, steps: int, learning_rate: float = 1e-3) -> Forecast:
    """Return a forecast of the next observation, fitted by the L1 error on an agent's replay memory.

    Raises:
        ValueError: an agent without rows to learn from.
    """
    forecast = _forecast_of(agent)
    forecast.standardise(_sampled(agent, 10_000))
    optimizer = torch.optim.Adam(forecast.parameters(), lr=learning_rate)
    slower = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        batch = _sampled(agent)
        off = forecast(batch.observations, batch.actions) - batch.next_observations
        loss = off.abs().sum(dim=1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        slower.step()
    return forecast.requires_grad_(False)


def _critic_of(agent: OffPolicyAlgorithm) -> ContinuousCritic:
    critic = getattr(agent, "critic", None)
    if not isinstance(critic, ContinuousCritic):
        raise ValueError(
            f"IWOCS needs an agent with SB3's ContinuousCritic (SAC, TD3, DDPG), got {type(agent).__name__}"
        )
    return copy.deepcopy(critic).requires_grad_(True)


def _forecast_of(agent: OffPolicyAlgorithm) -> Forecast:
    spaces = agent.observation_space, agent.action_space
    return Forecast(*(int(np.prod(space.shape or ())) for space in spaces)).to(agent.device)


def _sampled(agent: OffPolicyAlgorithm, rows: int = 256) -> ReplayBufferSamples:
    if agent.replay_buffer is None or agent.replay_buffer.size() == 0:
        raise ValueError(f"{type(agent).__name__} has no replay memory: it has not learned, or was loaded from a file")
    return agent.replay_buffer.sample(rows)


def _model(read: Any) -> Any:
    """Return a model as it was before JSON: its lists were tuples."""
    return tuple(_model(part) for part in read) if isinstance(read, list) else read
