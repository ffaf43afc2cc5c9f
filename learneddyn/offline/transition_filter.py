"""The transition filter: of many next states that a model can imagine, take the one that looks most like a real step.

A `TransitionFilter` is a sampler of `learneddyn.world.World`, its `TransitionFilter.above` a trust: with
``halt_reward="kept"`` a step of too low a dynamics reward r^D pays what it pays and ends the rollout, terminated. Any
function of (obs, action, next_obs) can be r^D; `learneddyn.offline.dynamics_reward.DynamicsReward` learns one.

    temperature κ   choice among the candidates
    0               the largest r^D, ties at random
    0.1             softmax: probability ∝ exp(r^D / κ)
    inf             uniform: a random elite's draw, as the sampler "elite" gives

A constant r^D is a random elite at any κ. r^D spans 1 in all, so at κ = 0.1 a candidate is at most e^10 times as likely
as another, and candidates that look alike are drawn almost uniformly: watch the entropy in `TransitionFilter.figures`.

Source: Luo, Xu, Cao, Yu, "Reward-Consistent Dynamics Models are Strongly Generalizable for Offline Reinforcement
Learning", 2024.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from learneddyn.core import Dynamics, Outcome, RewardFn, State, Transitions
from learneddyn.world import Trust

PREFIX = "quantile:"
LOOKED_AT = 10_000
"""Logged rows, evenly spread, whose r^D a threshold is measured on."""


class TransitionFilter:
    """Draw several steps from every elite, all in one call of the model, and choose one per row by r^D.

    The reward and the termination of a step stay with it. A candidate that is not finite is chosen only where all are
    not.

    Args:
        dynamics_reward: r^D(obs, action, next_obs).
        temperature: κ.
        draws: steps drawn per elite.
        limit: candidates are clipped to plus and minus this, in units of the observation; 25 in the published code for
            D4RL.

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
                raise ValueError(f"filter_{name} must be {allowed}, got {value!r}")
        self.dynamics_reward, self.temperature, self.draws, self.limit = dynamics_reward, temperature, draws, limit
        self._last: tuple[Tensor, Tensor] | None = None  # member and r^D of the steps chosen last
        self._sums: Tensor | None = None  # of r^D, of rows with a finite one, of entropies, of rows

    def __call__(
        self, state: State, action: Float[Tensor, "b a"], dynamics: Dynamics, rng: torch.Generator
    ) -> tuple[State, Outcome]:
        """Return the chosen step of every row, and as its member the elite that drew it."""
        rows, row = len(state.obs), torch.arange(len(state.obs), device=state.obs.device)
        member, outcome = self._candidates(state, action, dynamics, rng)
        reward = self._rewards(state.obs, action, outcome.next_obs)
        logits = self._logits(reward, outcome.next_obs)
        if len(logits) > 1:
            # The largest of logits + Gumbel noise is a draw from their softmax.
            noise = -torch.empty_like(logits).exponential_(generator=rng).log()
            picked = (logits + noise).argmax(0) * rows + row
            member, reward = member[picked], reward.flatten()[picked]
            parts = {name: part[picked] for name, part in outcome._asdict().items() if part is not None}
            outcome = Outcome(**parts)
        reward = reward.flatten()
        self._last = member, reward
        known, entropy = reward.isfinite(), torch.special.entr(logits.softmax(0)).sum(0)
        sums = torch.stack((torch.where(known, reward, 0.0).sum(), known.sum(), entropy.sum(), reward.new_tensor(rows)))
        self._sums = sums if self._sums is None else self._sums + sums
        return State(outcome.next_obs, member, outcome.memory), outcome

    def above(self, least: float) -> Trust:
        """Trust steps whose r^D is at least ``least``; of steps that this filter has just chosen it is known."""

        def trust(state: State, action: Tensor, after: State) -> Tensor:
            if self._last is not None and after.member is self._last[0]:
                return self._last[1] >= least
            return self.dynamics_reward(state.obs, action, after.obs) >= least

        return trust

    def figures(self) -> dict[str, float]:
        """Describe the choices since the last call: mean r^D of the chosen, mean entropy of the choice in nats.

        The number of candidates is the most that the exponential of the entropy can be. Nothing is told of no choice.
        """
        if self._sums is None:
            return {}
        reward, known, entropy, rows = self._sums.tolist()
        self._sums = None
        return {"imagined/dynamics_reward": reward / max(known, 1), "imagined/choice_entropy": entropy / rows}

    def _candidates(
        self, state: State, action: Tensor, dynamics: Dynamics, rng: torch.Generator
    ) -> tuple[Int[Tensor, " c"], Outcome]:
        """Draw every candidate of every row; candidate k of row i is row ``k * rows + i``."""
        count = len(dynamics.elites) * self.draws
        member = dynamics.elites.repeat_interleave(self.draws * len(state.obs))
        memory = None if state.memory is None else state.memory.repeat(count, 1)
        outcome = dynamics.sample(state.obs.repeat(count, 1), action.repeat(count, 1), member, rng, memory)
        return member, outcome._replace(next_obs=outcome.next_obs.clamp(-self.limit, self.limit))

    def _rewards(self, obs: Tensor, action: Tensor, next_obs: Float[Tensor, "c o"]) -> Float[Tensor, "k b"]:
        count = len(next_obs) // len(obs)
        return self.dynamics_reward(obs.repeat(count, 1), action.repeat(count, 1), next_obs).view(count, -1)

    def _logits(self, reward: Float[Tensor, "k b"], next_obs: Float[Tensor, "c o"]) -> Float[Tensor, "k b"]:
        """Return the unnormalised log probability of every candidate; -inf for one that is not finite."""
        finite = next_obs.isfinite().all(1).view(len(reward), -1) & reward.isfinite()
        finite |= ~finite.any(0)  # where none is, any will do: the world stops there
        reward = torch.where(finite, reward.nan_to_num(posinf=0.0, neginf=0.0), -torch.inf)
        if self.temperature == 0:
            return torch.where(reward == reward.amax(0), 0.0, -torch.inf)
        return torch.where(finite, reward / self.temperature, -torch.inf)


class Threshold(NamedTuple):
    """r_min, and how it lies among the r^D of the log."""

    least: float
    below: float
    """Share of logged rows whose r^D is less."""
    mean: float
    """Mean r^D of logged rows."""


def quantile_of(rule: float | str) -> float | None:
    """Return q of a rule ``"quantile:q"``, None for an r_min that is a number.

    Raises:
        ValueError: neither a number nor a rule, or q outside [0, 1).
    """
    if not isinstance(rule, str):
        return None
    try:
        share = float(rule.removeprefix(PREFIX)) if rule.startswith(PREFIX) else -1.0
    except ValueError:
        share = -1.0
    if not 0 <= share < 1:
        raise ValueError(f"least_dynamics_reward must be a number or 'quantile:q' with q in [0, 1), got {rule!r}")
    return share


@torch.no_grad()
def threshold_of(rule: float | str, dynamics_reward: RewardFn, log: Transitions) -> Threshold:
    """Return r_min of a number or rule on a log; at most `LOOKED_AT` rows are judged.

    Args:
        rule: r_min itself, or ``"quantile:q"`` for the q-quantile of r^D over logged rows.
        dynamics_reward: r^D.
        log: real rows.

    Raises:
        ValueError: see `quantile_of`.
    """
    share = quantile_of(rule)
    some = log[torch.linspace(0, len(log) - 1, min(len(log), LOOKED_AT), device=log.device).long()]
    rewards = dynamics_reward(some.obs, some.action, some.next_obs)
    least = float(rule) if share is None else float(rewards.quantile(share))
    return Threshold(least, float((rewards < least).float().mean()), float(rewards.mean()))
