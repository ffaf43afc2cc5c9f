"""Models that answer with a mean: the Gaussian noise around it is what the held-out rows show.

What a regression (sparse, lifted, hybrid ...) has to say is a mean per member. This base splits the data, asks the
subclass to learn, measures the residuals on rows it has not seen, and answers `predict` and `sample` from both.
"""

import time
from abc import abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from learneddyn.core import Outcome, Prediction, Transitions
from learneddyn.models.angles import apart
from learneddyn.models.attempt import attempt, require_pair
from learneddyn.models.base import AbstractDynamics, FitReport
from learneddyn.models.scale import EXACT, gaussian_nll, spread
from learneddyn.spaces import Spaces


class Answer(NamedTuple):
    """What a regression says about the next step: ``next_obs``, then the reward if there is a head for it."""

    mean: Float[Tensor, "*e b q"]
    memory: Float[Tensor, "b m"] | None = None


class AbstractRegression(AbstractDynamics):
    """A dynamics model whose members give means; the standard deviation of a column is constant, one per member.

    Subclasses implement `_build_members`, `_learn` and `_every`, and may answer `_own` (one member per row) faster.
    The elites are all members. A fit holds ``holdout_ratio`` of the rows out to measure the noise.
    """

    learn_reward: bool
    holdout_ratio: float
    angles: Sequence[int] = ()
    """Observation columns in radians, whose errors are taken the short way round."""

    @property
    def elites(self) -> Int[Tensor, " k"]:
        """All members."""
        return self._elites

    @abstractmethod
    def _build_members(self, spaces: Spaces) -> None:
        """Create parameters and buffers for these spaces."""

    @abstractmethod
    def _learn(
        self, data: Transitions, rows: Bool[Tensor, " n"], rng: torch.Generator, progress: bool
    ) -> list[dict[str, float]]:
        """Learn from the ``rows`` of ``data`` that are marked, and return a history.

        All rows come along because a model with delays looks at what came before a row.
        """

    @abstractmethod
    def _every(self, obs: Float[Tensor, "b o"], action: Float[Tensor, "b a"], memory: Tensor | None) -> Answer:
        """Return every member's mean ``[e b q]``."""

    def _own(
        self, obs: Float[Tensor, "b o"], action: Float[Tensor, "b a"], member: Int[Tensor, " b"], memory: Tensor | None
    ) -> Answer:
        """Return the mean ``[b q]`` of each row's member."""
        answer = self._every(obs, action, memory)
        if self.num_members == 1:
            return answer._replace(mean=answer.mean[0])
        return answer._replace(mean=answer.mean[member, torch.arange(len(obs), device=obs.device)])

    def _held_out(self, rows: int, count: int, rng: torch.Generator) -> Int[Tensor, " h"]:
        """Return the rows that measure the noise."""
        return torch.randperm(rows, generator=rng, device=rng.device)[:count]

    def _build(self, spaces: Spaces) -> None:
        columns = spaces.obs_dim + self.learn_reward
        self.register_buffer("noise", torch.zeros(self.num_members, columns))
        self.register_buffer("_elites", torch.arange(self.num_members))
        self._build_members(spaces)

    def fit(self, data: Transitions, *, rng: torch.Generator, progress: bool = False) -> FitReport:
        """Learn from the data and measure the noise on the held-out rows; every call learns anew.

        Returns:
            ``holdout_mse`` (environment units, mean over members and columns), ``holdout_nll`` (nats per column),
            ``train_rows``, ``holdout_rows``.

        Raises:
            DataError: fewer than two rows, NaN or infinite rows, or data that the model cannot learn from.
            ValueError: the data has other spaces than the model.
            FloatingPointError: what was learned is not finite; the model is left as it was.
        """
        started = time.perf_counter()
        require_pair(data)
        with attempt(self, data):
            data = data.to(self._elites.device)
            held = max(1, int(self.holdout_ratio * len(data)))
            chosen = torch.ones(len(data), dtype=torch.bool, device=data.device)
            chosen[self._held_out(len(data), held, rng)] = False
            history = self._learn(data, chosen, rng, progress)
            metrics = self._measure(data, ~chosen)
        metrics |= {"train_rows": float(len(data) - held), "holdout_rows": float(held)}
        return FitReport(len(history), time.perf_counter() - started, metrics, history)

    @torch.no_grad()
    def _measure(self, data: Transitions, rows: Bool[Tensor, " n"]) -> dict[str, float]:
        """Measure every member's noise on the marked rows."""
        memory = self.remembered(data)
        answer = self._every(data.obs[rows], data.action[rows], None if memory is None else memory[rows])
        error = self._error(answer.mean, data[rows])
        self._take_noise(error.square().mean(dim=1).sqrt(), data[rows])
        return self._metrics(error, self.noise[:, None])

    def _error(self, said: Float[Tensor, "*e b q"], data: Transitions) -> Float[Tensor, "*e b q"]:
        """Return answers minus what happened, angles the short way round.

        Raises:
            FloatingPointError: an answer is not finite.
        """
        error = apart(said, self._truth(data).expand_as(said), self.angles)
        if not bool(error.isfinite().all()):
            raise FloatingPointError(f"{type(self).__name__} learned something that is not finite: scale the data")
        return error

    def _truth(self, data: Transitions) -> Float[Tensor, "n q"]:
        """Return what answers are compared with: next observations, and rewards if there is a head for them."""
        return torch.cat([data.next_obs, data.reward[:, None]], dim=1) if self.learn_reward else data.next_obs

    def _take_noise(self, noise: Float[Tensor, "e q"], data: Transitions) -> None:
        """Keep the noise of every member; errors below what float32 can show of a column are not believed."""
        self.noise.copy_(torch.maximum(noise, EXACT * spread(self._truth(data))))

    def _metrics(self, error: Tensor, std: Tensor) -> dict[str, float]:
        return {"holdout_mse": float(error.square().mean()), "holdout_nll": float(gaussian_nll(error, std))}

    def predict(
        self, obs: Float[Tensor, "b o"], action: Float[Tensor, "b a"], memory: Float[Tensor, "b m"] | None = None
    ) -> Prediction:
        """Ask every member.

        Raises:
            ValueError: the model has not been fitted.
        """
        self._require_fitted()
        answer, o = self._every(obs, action, memory), obs.shape[1]
        std = self.noise[:, None].expand_as(answer.mean)
        return Prediction(
            mean=answer.mean[..., :o],
            std=std[..., :o],
            elites=self.elites,
            reward_mean=answer.mean[..., o] if self.learn_reward else None,
            reward_std=std[..., o] if self.learn_reward else None,
            memory=answer.memory,
        )

    def sample(
        self,
        obs: Float[Tensor, "b o"],
        action: Float[Tensor, "b a"],
        member: Int[Tensor, " b"],
        rng: torch.Generator,
        memory: Float[Tensor, "b m"] | None = None,
        *,
        noise: bool = True,
    ) -> Outcome:
        """Ask one member per row. Noise is added to what comes out, not to the memory, which meets it a step later.

        Raises:
            ValueError: the model has not been fitted.
        """
        self._require_fitted()
        answer, o = self._own(obs, action, member, memory), obs.shape[1]
        mean = answer.mean
        if noise:
            mean = mean.addcmul(self.noise[member], torch.randn(mean.shape, generator=rng, device=mean.device))
        return Outcome(mean[:, :o], mean[:, o] if self.learn_reward else None, None, answer.memory)

    def _require_fitted(self) -> None:
        if self.spaces is None:
            raise ValueError(f"{type(self).__name__} has not been fitted: call fit(data) or load a model first")

    # Declared for type checkers; `_build` registers them.
    noise: Tensor
    _elites: Tensor
