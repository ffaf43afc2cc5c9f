"""The transition filter: of many next states that a model can imagine, take the one that looks most like a real step.

A `TransitionFilter` is a sampler of `learneddyn.world.World`, `reward_above` a trust: with ``halt_reward="kept"`` a
step of too low a dynamics reward r^D pays what it pays and ends the rollout, terminated. Any function of (obs, action,
next_obs) can be r^D; `learneddyn.offline.dynamics_reward.DynamicsReward` learns one.

    temperature κ   choice among the candidates
    0               the largest r^D, ties at random
    0.1             softmax: probability ∝ exp(r^D / κ)
    inf             uniform: a random elite's draw, as the sampler "elite" gives

A constant r^D is a random elite at any κ. r^D spans 1 in all, so at κ = 0.1 a candidate is at most e^10 times as likely
as another, and candidates that look alike are drawn almost uniformly: watch `TransitionFilter.entropy`.

Source: Luo, Xu, Cao, Yu, "Reward-Consistent Dynamics Models are Strongly Generalizable for Offline Reinforcement
Learning", 2024.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from learneddyn.core import Dynamics, Outcome, RewardFn, State, Transitions, generator
from learneddyn.world import Trust, World

SOME = 2000
"""Rows that `filter_figures` looks at."""


class TransitionFilter:
    """Draw several steps from every elite, all in one call of the model, and choose one per row by r^D.

    The reward and the termination of a step stay with it. A candidate that is not finite is chosen only where all are
    not.

    Args:
        dynamics_reward: r^D(obs, action, next_obs).
        temperature: κ.
        draws: steps drawn per elite.
        limit: candidates are clipped to plus and minus this; 25 in the published code for D4RL.

    Raises:
        ValueError: a negative temperature, no draw, or a limit that is not positive.
    """

    def __init__(
        self, dynamics_reward: RewardFn, *, temperature: float = 0.1, draws: int = 2, limit: float = math.inf
    ) -> None:
        for name, ok, value, allowed in (
            ("temperature", temperature >= 0, temperature, "at least 0"),
            ("draws", draws >= 1, draws, "at least 1"),
            ("limit", limit > 0, limit, "positive"),
        ):
            if not ok:
                raise ValueError(f"{name} must be {allowed}, got {value!r}")
        self.dynamics_reward, self.temperature, self.draws, self.limit = dynamics_reward, temperature, draws, limit

    def __call__(
        self, state: State, action: Float[Tensor, "b a"], dynamics: Dynamics, rng: torch.Generator
    ) -> tuple[State, Outcome]:
        """Return the chosen step of every row, and as its member the elite that drew it."""
        rows, row = len(state.obs), torch.arange(len(state.obs), device=state.obs.device)
        member, outcome = self._candidates(state, action, dynamics, rng)
        count = len(member) // rows
        if count > 1:
            logits = self._logits(state.obs, action, outcome.next_obs)
            # The largest of logits + Gumbel noise is a draw from their softmax.
            noise = -torch.empty_like(logits).exponential_(generator=rng).log()
            picked = (logits + noise).argmax(0) * rows + row
            member = member[picked]
            parts = {name: part[picked] for name, part in outcome._asdict().items() if part is not None}
            outcome = Outcome(**parts)
        return State(outcome.next_obs, member, outcome.memory), outcome

    def entropy(
        self, state: State, action: Float[Tensor, "b a"], dynamics: Dynamics, rng: torch.Generator
    ) -> Float[Tensor, " b"]:
        """Return the entropy of the choice in every row, in nats, over candidates drawn for the purpose.

        The number of candidates is the most that its exponential can be.
        """
        outcome = self._candidates(state, action, dynamics, rng)[1]
        return torch.distributions.Categorical(logits=self._logits(state.obs, action, outcome.next_obs).T).entropy()

    def _candidates(
        self, state: State, action: Tensor, dynamics: Dynamics, rng: torch.Generator
    ) -> tuple[Int[Tensor, " c"], Outcome]:
        """Draw every candidate of every row; candidate k of row i is row ``k * rows + i``."""
        count = len(dynamics.elites) * self.draws
        member = dynamics.elites.repeat_interleave(self.draws * len(state.obs))
        memory = None if state.memory is None else state.memory.repeat(count, 1)
        outcome = dynamics.sample(state.obs.repeat(count, 1), action.repeat(count, 1), member, rng, memory)
        return member, outcome._replace(next_obs=outcome.next_obs.clamp(-self.limit, self.limit))

    def _logits(self, obs: Tensor, action: Tensor, next_obs: Float[Tensor, "c o"]) -> Float[Tensor, "k b"]:
        """Return the unnormalised log probability of every candidate; -inf for one that is not finite."""
        count = len(next_obs) // len(obs)
        reward = self.dynamics_reward(obs.repeat(count, 1), action.repeat(count, 1), next_obs)
        finite = (next_obs.isfinite().all(1) & reward.isfinite()).view(count, -1)
        finite |= ~finite.any(0)  # where none is, any will do: the world stops there
        reward = torch.where(finite, reward.view(count, -1).nan_to_num(posinf=0.0, neginf=0.0), -torch.inf)
        if self.temperature == 0:
            return torch.where(reward == reward.amax(0), 0.0, -torch.inf)
        return torch.where(finite, reward / self.temperature, -torch.inf)


def reward_above(dynamics_reward: RewardFn, least: float) -> Trust:
    """Trust steps whose dynamics reward is at least ``least``."""

    def trust(state: State, action: Tensor, after: State) -> Tensor:
        return dynamics_reward(state.obs, action, after.obs) >= least

    return trust


@torch.no_grad()
def filter_figures(world: World, imagined: Transitions, log: Transitions, least: float) -> dict[str, float]:
    """Describe what a world's filter chose, next to the log that it has to resemble.

    Args:
        world: whose sampler is a `TransitionFilter`.
        imagined: rows that it chose.
        log: real rows.
        least: r^D below which a step ends the rollout.
    """
    choose = world.sampler
    assert isinstance(choose, TransitionFilter)
    chosen, real = (rows[_spread(len(rows), rows.device)] for rows in (imagined, log))
    rewards, real_rewards = (choose.dynamics_reward(rows.obs, rows.action, rows.next_obs) for rows in (chosen, real))
    state = State(chosen.obs, world.dynamics.elites[:1].expand(len(chosen)))
    entropy = choose.entropy(state, chosen.action, world.dynamics, generator(0, chosen.device))
    return {
        "imagined/dynamics_reward": float(rewards.mean()),
        "log/dynamics_reward": float(real_rewards.mean()),
        "imagined/halted": float((rewards < least).float().mean()),
        "log/below_least": float((real_rewards < least).float().mean()),
        "imagined/choice_entropy": float(entropy.mean()),
    }


def _spread(rows: int, device: torch.device) -> Int[Tensor, " m"]:
    return torch.linspace(0, rows - 1, min(rows, SOME), device=device).long()
