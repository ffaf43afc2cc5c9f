"""SINDy: dynamics as a sparse sum of candidate terms, fitted on bootstraps (E-SINDy), printable as equations.

Sources: Brunton, Proctor, Kutz, "Discovering governing equations from data by sparse identification of nonlinear
dynamical systems" (2016); ensembles as in Fasel, Kutz, Brunton, Brunton, "Ensemble-SINDy" (2022); the library with
inputs and its use inside a Dyna loop as in Zolman, Lagemann, Fasel, Kutz, Brunton, "SINDy-RL: Interpretable and
Efficient Model-Based Reinforcement Learning" (2024). The sparse regressions are pysindy's; the terms are evaluated here
in torch, because rollouts evaluate them millions of times.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from learneddyn.core import DataError, Transitions
from learneddyn.models.angles import apart
from learneddyn.models.base import FitReport
from learneddyn.models.library import Evaluator, PolynomialLibrary, sum_of_terms
from learneddyn.models.regression import AbstractRegression, Answer
from learneddyn.models.stlsq import draw_bootstraps, merged, require_options
from learneddyn.spaces import Spaces


class SINDy(AbstractRegression):
    """Sparse polynomials of the observation and the action, discrete in time.

    The library is [monomials of the coordinates up to ``degree``, action, and, with ``products``, every monomial times
    every action]; coordinates are the observation columns, those in ``angles`` as cosine and sine. Every bootstrap
    (rows drawn with replacement, ``dropped`` candidate terms left out at random) is fitted by sequentially thresholded
    least squares. With ``aggregate`` the coefficients are merged into one member, otherwise each bootstrap is a member.

    A reward head is the same kind of fit on the library of (next observation, action), as in SINDy-RL.

    pysindy's own ensemble optimiser is not used: it draws from the global random state.

    Args:
        degree: of the monomials.
        interactions: products of different coordinates, not only powers of one.
        products: monomials times actions.
        bias: a constant term.
        target: "next" fits the next observation, as the sources do; "change" fits its difference, so that the
            threshold does not have to lie below a time step while the identity has coefficients of one. Columns in
            ``angles`` are always fitted as changes, the short way round.
        bootstraps: regressions, each on its own draw of the rows.
        dropped: candidate terms that each bootstrap leaves out.
        aggregate: "median", "mean", or None for one member per bootstrap.
        threshold: coefficients below it are dropped.
        ridge: L2 factor inside the thresholding; what survives is fitted again without it.
        angles: observation columns in radians.
        unit_pairs: pairs of observation columns (cosine, sine), whose redundant terms are left out too.
        domain: (column, low, high): transitions that begin or end with that column outside are not learned from. A
            polynomial cannot know the end of a rail, and one that tries is wrong everywhere.
        learn_reward: add a reward head.
        holdout_ratio: share of the rows that measure the noise.

    Raises:
        ValueError: an argument outside its range (names it, the value, what is allowed).
    """

    def __init__(
        self,
        degree: int = 2,
        interactions: bool = True,
        products: bool = True,
        bias: bool = False,
        target: str = "next",
        bootstraps: int = 20,
        dropped: int = 1,
        aggregate: str | None = "median",
        threshold: float = 1e-3,
        ridge: float = 1e-5,
        angles: Sequence[int] = (),
        unit_pairs: Sequence[Sequence[int]] = (),
        domain: Sequence[Sequence[int | float]] = (),
        learn_reward: bool = False,
        holdout_ratio: float = 0.2,
    ) -> None:
        super().__init__()
        require_options(bootstraps, dropped, aggregate, holdout_ratio)
        for name, ok, value, allowed in (
            ("degree", degree >= 1, degree, "at least 1"),
            ("target", target in ("next", "change"), target, "'next' or 'change'"),
            ("threshold", threshold >= 0, threshold, "at least 0"),
            ("ridge", ridge >= 0, ridge, "at least 0"),
            ("domain", all(len(one) == 3 and one[1] < one[2] for one in domain), domain, "(column, low, high) each"),
        ):
            if not ok:
                raise ValueError(f"{name} must be {allowed}, got {value!r}")
        self.degree, self.interactions, self.products, self.bias = degree, interactions, products, bias
        self.target, self.bootstraps, self.dropped, self.aggregate = target, bootstraps, dropped, aggregate
        self.threshold, self.ridge, self.angles = threshold, ridge, list(angles)
        self.unit_pairs = [list(pair) for pair in unit_pairs]
        self.domain: list[tuple[int, float, float]] = [(int(i), float(low), float(high)) for i, low, high in domain]
        self.learn_reward, self.holdout_ratio = learn_reward, holdout_ratio
        self.num_members = bootstraps if aggregate is None else 1

    def _build_members(self, spaces: Spaces) -> None:
        o, a = spaces.obs_dim, spaces.action_dim
        self._library = PolynomialLibrary(
            o,
            a,
            degree=self.degree,
            interactions=self.interactions,
            products=self.products,
            bias=self.bias,
            angles=self.angles,
            unit_pairs=self.unit_pairs,
        )
        self._evaluators: dict[str, tuple[Tensor, int, Evaluator]] = {}
        self._relative = list(range(o)) if self.target == "change" else self.angles
        count = len(self._library)
        self.register_buffer("bootstrapped", torch.zeros(self.bootstraps, count, o))
        self.register_buffer("coefficients", torch.zeros(self.num_members, count, o))
        self.register_buffer("reward_coefficients", torch.zeros(self.num_members, count, int(self.learn_reward)))

    def fit(self, data: Transitions, *, rng: torch.Generator, progress: bool = False) -> FitReport:
        """Learn from the transitions inside the domain, see `AbstractRegression.fit`.

        Raises:
            DataError: fewer than two rows, or fewer inside the domain; NaN or infinite rows.
            ValueError: the data has other spaces than the model, or lacks a column of the domain.
            FloatingPointError: what was learned is not finite; the model is left as it was.
            ImportError: pysindy is not installed (names the extra).
        """
        inside = torch.ones(len(data), dtype=torch.bool, device=data.device)
        for column, low, high in self.domain:
            if not 0 <= column < data.obs.shape[1]:
                raise ValueError(f"domain must name observation columns below {data.obs.shape[1]}, got {self.domain}")
            for values in (data.obs[:, column], data.next_obs[:, column]):
                inside &= (values >= low) & (values <= high)
        if len(data) >= 2 and int(inside.sum()) < 2:
            raise DataError(f"fewer than 2 of {len(data)} transitions lie inside the domain {self.domain}")
        return super().fit(data[inside] if self.domain else data, rng=rng, progress=progress)

    def library(self, obs: Float[Tensor, "b o"], action: Float[Tensor, "b a"]) -> Float[Tensor, "b p"]:
        """Return the candidate terms of every row."""
        return self._library(obs, action)

    def term_names(self, names: Sequence[str] | None = None) -> list[str]:
        """Return the candidate terms in words; ``names`` are those of the observation columns, then the actions.

        Raises:
            ValueError: the model has not been fitted, or ``names`` are not one per column.
        """
        self._require_fitted()
        return self._library.names(names)

    def equations(self, names: Sequence[str] | None = None, digits: int = 4, member: int = 0) -> list[str]:
        """Return one line per observation column, ``x0' = 1 x0 + 0.02 x1``, and one for the reward if there is one.

        Raises:
            ValueError: the model has not been fitted, or ``names`` are not one per column.
        """
        terms = self.term_names(names)
        own = [f"x{i}" for i in range(self._library.obs_dim)] if names is None else list(names)
        lines = []
        for index, column in enumerate(self.coefficients[member].T.tolist()):
            first = [own[index]] if index in self._relative else []
            lines.append(f"{own[index]}' = {sum_of_terms(column, terms, digits, first)}")
        if self.learn_reward:
            column = self.reward_coefficients[member, :, 0].tolist()
            lines.append(f"reward(x') = {sum_of_terms(column, terms, digits)}")
        return lines

    def _every(self, obs: Float[Tensor, "b o"], action: Float[Tensor, "b a"], memory: Tensor | None) -> Answer:
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return Answer(self._differentiable(obs, action))
        o, columns = obs.shape[1], obs.T
        out = obs.new_empty(self.num_members, o + self.learn_reward, len(obs))
        self._evaluator("coefficients").write(columns, action.T, out[:, :o], plus=self._relative)
        if self.learn_reward:
            reward = self._evaluator("reward_coefficients")
            for member in range(self.num_members):
                reward.write(out[member, :o], action.T, out[member : member + 1, o:], first=member)
        return Answer(out.mT)

    def _differentiable(self, obs: Float[Tensor, "b o"], action: Float[Tensor, "b a"]) -> Float[Tensor, "e b q"]:
        """Return what `_every` does, from all terms and so that gradients flow."""
        relative = torch.zeros_like(obs[0])
        relative[self._relative] = 1.0
        mean = self.library(obs, action) @ self.coefficients + relative * obs
        if not self.learn_reward:
            return mean
        rewards = [self.library(each, action) @ w for each, w in zip(mean, self.reward_coefficients, strict=True)]
        return torch.cat([mean, torch.stack(rewards)], dim=2)

    def _evaluator(self, name: str) -> Evaluator:
        """Return what evaluates these coefficients, remembered until they change."""
        coefficients, known = getattr(self, name), self._evaluators.get(name)
        if known is None or known[0] is not coefficients or known[1] != coefficients._version:
            evaluator = Evaluator(self._library, coefficients)
            known = self._evaluators[name] = coefficients, coefficients._version, evaluator
        return known[2]

    def __getstate__(self) -> dict[str, Any]:
        """Let copies begin without evaluators: the versions of a copied tensor are counted from zero again."""
        return self.__dict__ | {"_evaluators": {}}

    def _learn(
        self, data: Transitions, rows: Bool[Tensor, " n"], rng: torch.Generator, progress: bool
    ) -> list[dict[str, float]]:
        data = data[rows]
        obs, action, after = data.obs.double(), data.action.double(), data.next_obs.double()
        target = after.clone()
        target[:, self._relative] = apart(after, obs, self.angles)[:, self._relative]
        self.bootstrapped.copy_(self._regressed(self.library(obs, action), target, rng, progress))
        self.coefficients.copy_(merged(self.bootstrapped, self.aggregate))
        if self.learn_reward:
            reward = self._regressed(self.library(after, action), data.reward[:, None].double(), rng, progress)
            self.reward_coefficients.copy_(merged(reward, self.aggregate))
        active = float((self.coefficients != 0).sum() / self.num_members)
        return [{"epoch": 1.0, "active_terms": active}]

    def _regressed(
        self, theta: Float[Tensor, "n p"], target: Float[Tensor, "n q"], rng: torch.Generator, progress: bool
    ) -> Float[Tensor, "m p q"]:
        """Return the coefficients of every bootstrap."""
        draws = draw_bootstraps(theta, target, self.bootstraps, self.dropped, rng, progress)
        return torch.stack([draw.stlsq(self.threshold, self.ridge) for draw in draws])

    # Declared for type checkers; `_build_members` registers them.
    bootstrapped: Tensor
    coefficients: Tensor
    reward_coefficients: Tensor
