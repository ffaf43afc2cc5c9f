"""What a policy earns: in the real environment, inside a world, and how far the two lie apart."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from learneddyn.core import Json, Policy, State, Transitions
from learneddyn.evaluation.stats import (
    Estimate,
    Statistic,
    bootstrap_difference,
    bootstrap_interval,
    correlation,
)
from learneddyn.spaces import Spaces, decode, encode
from learneddyn.world import World, all_trusted


@dataclass(frozen=True)
class Returns:
    """Finished episodes of one policy in the real environment, in the order of their seeds.

    ``starts`` holds the flat first observations (to imagine from the same states), ``transitions`` the logged rows when
    they were asked for.
    """

    returns: Float[np.ndarray, " n"]
    lengths: Int[np.ndarray, " n"]
    terminated: Bool[np.ndarray, " n"]
    seeds: Int[np.ndarray, " n"]
    starts: Float[Tensor, "n o"]
    transitions: Transitions | None = None

    @property
    def mean(self) -> float:
        """Mean return."""
        return float(self.returns.mean())

    @property
    def steps(self) -> int:
        """Real environment steps that these episodes cost."""
        return int(self.lengths.sum())

    def interval(self, level: float = 0.95) -> Estimate:
        """Return the mean and its BCa bootstrap interval over episodes."""
        return bootstrap_interval(self.returns, level=level)

    def to_json(self) -> Json:
        """Return a plain dictionary, without the observations."""
        columns = ("returns", "lengths", "terminated", "seeds")
        return {name: getattr(self, name).tolist() for name in columns} | {"mean": self.interval().to_json()}


@dataclass(frozen=True)
class Imagined:
    """Episodes of one policy inside a world, without any penalty in the reward.

    ``untrusted`` marks episodes that ended because the world did not trust a step; that step's reward is not counted.
    """

    returns: Float[np.ndarray, " n"]
    lengths: Int[np.ndarray, " n"]
    terminated: Bool[np.ndarray, " n"]
    untrusted: Bool[np.ndarray, " n"]

    @property
    def mean(self) -> float:
        """Mean return."""
        return float(self.returns.mean())

    @property
    def untrusted_share(self) -> float:
        """Share of all imagined steps that the world did not trust (at most one an episode, which it ends)."""
        rejected = int(self.untrusted.sum())
        return rejected / max(1, int(self.lengths.sum()) + rejected)

    def interval(self, level: float = 0.95) -> Estimate:
        """Return the mean and its BCa bootstrap interval over episodes."""
        return bootstrap_interval(self.returns, level=level)

    def to_json(self) -> Json:
        """Return a plain dictionary."""
        columns = ("returns", "lengths", "terminated", "untrusted")
        plain = {name: getattr(self, name).tolist() for name in columns}
        return plain | {"mean": self.interval().to_json(), "untrusted_share": self.untrusted_share}


def evaluate(
    policy: Policy,
    real_id: str,
    *,
    episodes: int = 20,
    seed: int = 0,
    lanes: int = 8,
    deterministic: bool = True,
    env_kwargs: dict[str, Any] | None = None,
    record: bool = False,
    device: torch.device | str = "cpu",
) -> Returns:
    """Return the true returns of a policy over full episodes of the real environment.

    The number of episodes is fixed beforehand, every episode has its own seed, and each one that begins is finished:
    many lanes do not favour short episodes. The reset seeds are the first numbers of ``np.random.SeedSequence(seed)``,
    so more episodes add to the same list, and ``lanes`` only changes how many actions one call of the policy computes.
    With ``deterministic=False`` torch's and NumPy's global generators, which SB3 samples actions from, are seeded
    inside and restored afterwards (then the result does depend on ``lanes``).

    Args:
        policy: anything with SB3's ``predict``; recurrent policies get their states and episode starts.
        real_id: Gymnasium id; ``module:Id-v0`` imports the module first.
        episodes: number of episodes.
        seed: of the whole evaluation.
        lanes: environments stepped side by side in this process.
        deterministic: passed to ``predict``.
        env_kwargs: passed to ``gymnasium.make``; needs ``max_episode_steps`` where the id has no time limit.
        record: also return the rows, for a refit on the agent's own experience.
        device: of ``starts`` and ``transitions``.

    Raises:
        ValueError: episodes or lanes below 1, an environment without a time limit, or a NaN or infinite reward.
    """
    if episodes < 1 or lanes < 1:
        raise ValueError(f"episodes and lanes must be at least 1, got episodes={episodes}, lanes={lanes}")
    lanes = min(lanes, episodes)
    seeds = np.random.SeedSequence(seed).generate_state(episodes).astype(np.int64)
    envs = [gym.make(real_id, **(env_kwargs or {})) for _ in range(lanes)]
    try:
        with seeded(seed):
            return _play(policy, envs, seeds, deterministic, record, device)
    finally:
        for env in envs:
            env.close()


def imagined(
    policy: Policy,
    world: World,
    *,
    rng: torch.Generator,
    episodes: int = 20,
    horizon: int | None = None,
    start: Float[Tensor, "n o"] | None = None,
    deterministic: bool = True,
) -> Imagined:
    """Return the returns of a policy inside a world, all episodes side by side, without any reward penalty.

    An episode ends at a termination, at the first step the world does not trust, or at the horizon.

    Args:
        policy: anything with SB3's ``predict``.
        world: the world; its penalty is left out of the reported figures.
        rng: of the world, on its device; it also seeds the policy's sampling when ``deterministic`` is False.
        episodes: number of episodes.
        horizon: steps an episode may take; the task's time limit by default.
        start: start observations, used in turn; drawn from the task by default.
        deterministic: passed to ``predict``.

    Raises:
        ValueError: no horizon known, horizon or episodes below 1, or non-finite start observations.
    """
    horizon = world.task.max_episode_steps if horizon is None else horizon
    if horizon is None:
        raise ValueError(f"the task of {world.task.real_id} has no time limit: pass horizon=")
    if horizon < 1 or episodes < 1:
        raise ValueError(f"horizon and episodes must be at least 1, got horizon={horizon}, episodes={episodes}")
    if start is None:
        obs = world.initial(episodes, rng)
    elif len(start) == 0 or not bool(start.isfinite().all()):
        raise ValueError(f"start must hold at least one row and only finite numbers, got {len(start)} rows")
    else:
        obs = start[torch.arange(episodes, device=start.device) % len(start)]
    bare = unpenalised(world)
    with torch.no_grad(), seeded(int(torch.randint(2**31, (), generator=rng, device=rng.device))):
        return _imagine(policy, bare, bare.start(obs, rng), horizon, rng, deterministic)


def unpenalised(world: World, *, trust_all: bool = False) -> World:
    """Return the same world without its reward penalty and halt reward and, if asked, trusting every finite step."""
    bare = copy.copy(world)
    bare.penalty, bare.penalty_weight, bare.halt_reward = None, 0.0, None
    if trust_all:
        bare.trust = all_trusted
    return bare


@dataclass(frozen=True)
class Gap:
    """Imagined against real return. ``gap`` is imagined minus real: positive where the model promises too much."""

    imagined: Estimate
    real: Estimate
    gap: Estimate

    def to_json(self) -> Json:
        """Return a plain dictionary."""
        return {name: estimate.to_json() for name, estimate in vars(self).items()}


def real_vs_imagined(
    real: Returns | Sequence[Returns],
    imagined: Imagined | Sequence[Imagined],
    *,
    statistic: Statistic = np.mean,
    paired_episodes: bool = False,
    level: float = 0.95,
) -> list[Gap]:
    """Compare what a world promised with what the real environment paid.

    Args:
        real: the returns of one agent, or of one agent per seed.
        imagined: the same agents inside their worlds, in the same order.
        statistic: over the episodes of one seed, and over the seeds' figures in the last row.
        paired_episodes: episode i of both began in the same state (``imagined(start=real.starts)``).
        level: nominal coverage of the intervals.

    Returns:
        One `Gap` per seed with intervals over episodes; with more than one seed, a last one over the seeds, paired by
        seed, whose samples are the seeds' own figures.

    Raises:
        ValueError: different numbers of seeds, or paired episodes of different number.
    """
    truths = [real] if isinstance(real, Returns) else list(real)
    dreams = [imagined] if isinstance(imagined, Imagined) else list(imagined)
    if len(truths) != len(dreams) or not truths:
        raise ValueError(f"real and imagined need the same seeds, got {len(truths)} and {len(dreams)}")
    rows = [
        _gap(dream.returns, truth.returns, statistic, paired_episodes, level)
        for truth, dream in zip(truths, dreams, strict=True)
    ]
    if len(rows) > 1:
        promised, paid = (np.array([getattr(row, name).value for row in rows]) for name in ("imagined", "real"))
        rows.append(_gap(promised, paid, statistic, True, level))
    return rows


@dataclass(frozen=True)
class Mismatch:
    """Does a better one-step likelihood mean a better return? Correlations of the negative log-likelihood with return.

    Negative is what model training hopes for; an interval around zero means that likelihood says nothing here.
    ``spearman_top`` uses the better half of the returns only: failed models alone can make a correlation.
    Source: Lambert et al., "Objective Mismatch in Model-based Reinforcement Learning", 2020.
    """

    models: int
    pearson: Estimate
    spearman: Estimate
    spearman_top: Estimate | None

    def to_json(self) -> Json:
        """Return a plain dictionary."""
        estimates = {name: value.to_json() if value else None for name, value in vars(self).items() if name != "models"}
        return {"models": self.models} | estimates


def objective_mismatch(nll: Any, returns: Any, *, level: float = 0.95, seed: int = 0) -> Mismatch:
    """Correlate the models' held-out negative log-likelihood with the return of agents that used them.

    Args:
        nll: ``[n]`` negative log-likelihood per model, all on the same held-out data.
        returns: ``[n]`` mean real return of the agent of each model.
        level: nominal coverage of the bootstrap intervals over models.
        seed: of the bootstrap.

    Raises:
        ValueError: fewer than three models, or non-finite or constant figures.
    """
    x, y = np.asarray(nll, dtype=np.float64), np.asarray(returns, dtype=np.float64)
    pearson = correlation(x, y, method="pearson", level=level, seed=seed)
    spearman = correlation(x, y, level=level, seed=seed)
    best = np.argsort(-y, kind="stable")[: (len(y) + 1) // 2]
    varied = len(best) >= 3 and np.ptp(x[best]) > 0 and np.ptp(y[best]) > 0
    top = correlation(x[best], y[best], level=level, seed=seed) if varied else None
    return Mismatch(len(x), pearson, spearman, top)


def _gap(dreamt: np.ndarray, true: np.ndarray, statistic: Statistic, paired: bool, level: float) -> Gap:
    return Gap(
        bootstrap_interval(dreamt, statistic, level=level),
        bootstrap_interval(true, statistic, level=level),
        bootstrap_difference(dreamt, true, statistic, paired=paired, level=level),
    )


def _play(
    policy: Policy,
    envs: list[gym.Env[Any, Any]],
    seeds: Int[np.ndarray, " n"],
    deterministic: bool,
    record: bool,
    device: torch.device | str,
) -> Returns:
    """Play one episode per seed; a lane that finishes takes the next seed of the list."""
    spec = envs[0].spec
    if spec is None or spec.max_episode_steps is None:
        name = spec.id if spec else envs[0]
        raise ValueError(f"{name} has no time limit: pass env_kwargs={{'max_episode_steps': ...}}")
    spaces = Spaces(envs[0].observation_space, envs[0].action_space)
    lanes, episodes = len(envs), len(seeds)
    playing = list(range(lanes))
    fresh = np.ones(lanes, dtype=bool)
    observations = [env.reset(seed=int(seeds[lane]))[0] for lane, env in enumerate(envs)]
    starts: list[Any] = list(observations) + [None] * (episodes - lanes)
    returns, lengths, terminated = np.zeros(episodes), np.zeros(episodes, np.int64), np.zeros(episodes, bool)
    rows: list[list[tuple[Any, ...]]] = [[] for _ in range(episodes)]
    waiting = iter(range(lanes, episodes))
    memory: tuple[np.ndarray, ...] | None = None
    active = set(range(lanes))
    while active:
        # Lanes without an episode keep their last observation: the policy always sees one batch size.
        batch = batch_of(spaces.observation, observations)
        actions, memory = policy.predict(batch, memory, fresh.copy(), deterministic)
        for lane in sorted(active):
            episode, action = playing[lane], actions[lane]
            after, paid, ended, cut, _ = envs[lane].step(action)
            reward = float(paid)
            if not np.isfinite(reward):
                step = f"step {lengths[episode]} of seed {seeds[episode]}"
                raise ValueError(f"{spec.id} paid the reward {reward} in {step}")
            if record:
                rows[episode].append((observations[lane], action, reward, after, ended))
            returns[episode] += reward
            lengths[episode] += 1
            observations[lane], fresh[lane] = after, ended or cut
            if ended or cut:
                terminated[episode] = ended
                following = next(waiting, None)
                if following is None:
                    active.remove(lane)
                    continue
                playing[lane] = following
                observations[lane] = starts[following] = envs[lane].reset(seed=int(seeds[following]))[0]
    first = torch.as_tensor(encode(spaces.observation, batch_of(spaces.observation, starts)), device=device)
    logged = _transitions(rows, spaces, spec.id, device) if record else None
    return Returns(returns, lengths, terminated, seeds, first, logged)


def _transitions(
    rows: list[list[tuple[Any, ...]]], spaces: Spaces, real_id: str, device: torch.device | str
) -> Transitions:
    obs, action, reward, after, ended = zip(*(row for episode in rows for row in episode), strict=True)
    return Transitions.from_numpy(
        encode(spaces.observation, batch_of(spaces.observation, obs)),
        encode(spaces.action, batch_of(spaces.action, action)),
        np.array(reward),
        encode(spaces.observation, batch_of(spaces.observation, after)),
        np.array(ended),
        np.repeat(np.arange(len(rows)), [len(episode) for episode in rows]),
        spaces=spaces,
        source=f"evaluate({real_id})",
        device=device,
    )


def _imagine(
    policy: Policy, world: World, state: State, horizon: int, rng: torch.Generator, deterministic: bool
) -> Imagined:
    lanes, device = len(state.obs), state.obs.device
    total = torch.zeros(lanes, dtype=torch.float64, device=device)
    lengths = torch.zeros(lanes, dtype=torch.int64, device=device)
    terminated, untrusted = (torch.zeros(lanes, dtype=torch.bool, device=device) for _ in range(2))
    memory: tuple[np.ndarray, ...] | None = None
    for t in range(horizon):
        alive = ~(terminated | untrusted)
        if not bool(alive.any()):
            break
        observation = decode(world.spaces.observation, state.obs.cpu().numpy())
        chosen, memory = policy.predict(observation, memory, np.full(lanes, t == 0), deterministic)
        action = torch.as_tensor(encode(world.spaces.action, chosen), device=device)
        after, step = world.step(state, action, rng)
        # Finished lanes stand still: they must not drift to infinity while the others go on.
        state = after._replace(obs=torch.where(alive[:, None], after.obs, state.obs))
        untrusted |= alive & ~step.trusted
        counted = alive & step.trusted
        total += step.reward.double() * counted
        lengths += counted
        terminated |= counted & step.terminated
    columns = (total, lengths, terminated, untrusted)
    return Imagined(*(column.cpu().numpy() for column in columns))


def batch_of(space: gym.Space[Any], elements: Sequence[Any]) -> Any:
    """One batch of a space's elements: arrays, or the Dict and Tuple of arrays that `encode` and SB3 read."""
    match space:
        case gym.spaces.Dict():
            return {key: batch_of(part, [element[key] for element in elements]) for key, part in space.spaces.items()}
        case gym.spaces.Tuple():
            parts = enumerate(space.spaces)
            return tuple(batch_of(part, [element[i] for element in elements]) for i, part in parts)
    return np.stack([np.asarray(element) for element in elements])


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global generators that SB3 policies sample from, and give them back as they were."""
    before = np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        try:
            yield
        finally:
            np.random.set_state(before)  # noqa: NPY002
