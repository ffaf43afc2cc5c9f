"""How a rollout draws the next state from an ensemble: which member answers, and with or without its noise.

A Sampler chooses the member of every row; the model then pays for one member per row.

    mean    average of the elites, no noise (deterministic)
    ts1     every row draws a new member at every step (Chua et al., "Deep Reinforcement Learning in a Handful of
            Trials using Probabilistic Dynamics Models", 2018)
    tsinf   a row keeps the member it started with (same source; a World starts rows with elites, the source knows no
            elites: fit with num_elites = num_members for its version)
    elite   every row draws a new elite at every step (Janner et al., "When to Trust Your Model", 2019)
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from learneddyn.core import Dynamics, Outcome, Prediction, State

Sampler = Callable[[State, Float[Tensor, "b a"], Dynamics, torch.Generator], tuple[State, Outcome]]


def draw_members(choices: Int[Tensor, " k"], lanes: int, rng: torch.Generator) -> Int[Tensor, " b"]:
    """Draw one of ``choices`` per lane, uniformly, in equal shares (up to one lane) by a random permutation.

    Equal shares keep each row's marginal uniform and let a model group its rows into blocks of one static size; rows
    of one call are therefore not exactly independent (the counts per member do not fluctuate).
    """
    if lanes == 1:
        return choices.index_select(0, torch.randint(len(choices), (1,), generator=rng, device=choices.device))
    shuffled, order = (_permutation(count, rng, choices.device) for count in (len(choices), lanes))
    return choices[shuffled[order % len(choices)]]


def ts1(state: State, action: Tensor, dynamics: Dynamics, rng: torch.Generator) -> tuple[State, Outcome]:
    """Draw a new member per row at every step, from all members."""
    members = torch.arange(dynamics.num_members, device=state.obs.device)
    return _dealt(state, action, dynamics, members, rng)


def elite(state: State, action: Tensor, dynamics: Dynamics, rng: torch.Generator) -> tuple[State, Outcome]:
    """Draw a new elite per row at every step."""
    return _dealt(state, action, dynamics, dynamics.elites, rng)


def tsinf(state: State, action: Tensor, dynamics: Dynamics, rng: torch.Generator) -> tuple[State, Outcome]:
    """Keep the member that the row started with."""
    return _ask(state, action, dynamics, rng)


def mean(state: State, action: Tensor, dynamics: Dynamics, rng: torch.Generator) -> tuple[State, Outcome]:
    """Average the elites' means, without noise; a learned termination is the elites' mean probability above 1/2."""
    prediction = dynamics.predict(state.obs, action, state.memory)
    chosen = prediction.elites
    reward = None if prediction.reward_mean is None else prediction.reward_mean[chosen].mean(dim=0)
    ended = None if prediction.terminated is None else prediction.terminated[chosen].mean(dim=0) > 0.5
    outcome = Outcome(prediction.mean[chosen].mean(dim=0), reward, ended, prediction.memory)
    return state._replace(obs=outcome.next_obs, memory=outcome.memory), outcome


SAMPLERS: dict[str, Sampler] = {"mean": mean, "ts1": ts1, "tsinf": tsinf, "elite": elite}


def _permutation(count: int, rng: torch.Generator, device: torch.device) -> Int[Tensor, " n"]:
    if device.type == "cpu":
        return torch.randperm(count, generator=rng)
    # CUDA's own permutation of few numbers goes by way of the CPU.
    return torch.rand(count, generator=rng, device=device).argsort()


def _dealt(
    state: State, action: Tensor, dynamics: Dynamics, choices: Int[Tensor, " k"], rng: torch.Generator
) -> tuple[State, Outcome]:
    """Deal the rows to ``choices`` anew and ask; a GPU is not waited for if the model has ``sample_evenly``."""
    state = state._replace(member=draw_members(choices, len(state.obs), rng))
    evenly = None if state.obs.is_cpu else getattr(dynamics, "sample_evenly", None)
    if evenly is None:
        return _ask(state, action, dynamics, rng)
    outcome = evenly(state.obs, action, state.member, choices, rng, state.memory)
    return State(outcome.next_obs, state.member, outcome.memory), outcome


def _ask(state: State, action: Tensor, dynamics: Dynamics, rng: torch.Generator) -> tuple[State, Outcome]:
    outcome = dynamics.sample(state.obs, action, state.member, rng, state.memory)
    return State(outcome.next_obs, state.member, outcome.memory), outcome


class Heard:
    """A model that a sampler asks, and that keeps what every member said: a penalty then need not ask again.

    A model with ``sample_and_predict`` (see `learneddyn.models.ensemble`) answers both by one pass. Of a model without,
    and of a sampler that asks about other rows than ``obs`` and ``action`` themselves, nothing is kept.
    """

    def __init__(self, dynamics: Dynamics, obs: Float[Tensor, "b o"], action: Float[Tensor, "b a"]) -> None:
        self.prediction: Prediction | None = None
        self._dynamics, self._obs, self._action = dynamics, obs, action

    def __getattr__(self, name: str) -> Any:
        return getattr(self._dynamics, name)

    def predict(self, obs: Tensor, action: Tensor, memory: Tensor | None = None) -> Prediction:
        """Ask every member."""
        prediction = self._dynamics.predict(obs, action, memory)
        return self._kept(prediction, obs, action)

    def sample(
        self,
        obs: Tensor,
        action: Tensor,
        member: Tensor,
        rng: torch.Generator,
        memory: Tensor | None = None,
        *,
        noise: bool = True,
    ) -> Outcome:
        """Ask one member per row."""
        both = getattr(self._dynamics, "sample_and_predict", None)
        if both is None or obs is not self._obs or action is not self._action:
            return self._dynamics.sample(obs, action, member, rng, memory, noise=noise)
        outcome, prediction = both(obs, action, member, rng, memory, noise=noise)
        self._kept(prediction, obs, action)
        return outcome

    def sample_evenly(
        self,
        obs: Tensor,
        action: Tensor,
        member: Tensor,
        among: Tensor,
        rng: torch.Generator,
        memory: Tensor | None = None,
    ) -> Outcome:
        """Ask one member per row: where all are asked for the penalty, how rows are dealt plays no part."""
        return self.sample(obs, action, member, rng, memory)

    def _kept(self, prediction: Prediction, obs: Tensor, action: Tensor) -> Prediction:
        if obs is self._obs and action is self._action:
            self.prediction = prediction
        return prediction
