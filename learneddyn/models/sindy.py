"""SINDy: dynamics as a sparse sum of candidate terms, fitted on bootstraps (E-SINDy), printable as equations.

Sources: Brunton, Proctor, Kutz, "Discovering governing equations from data by sparse identification of nonlinear
dynamical systems" (2016); ensembles as in Fasel, Kutz, Brunton, Brunton, "Ensemble-SINDy" (2022); the library with
inputs and its use inside a Dyna loop as in Zolman, Lagemann, Fasel, Kutz, Brunton, "SINDy-RL: Interpretable and
Efficient Model-Based Reinforcement Learning" (2024). The sparse regressions are pysindy's; the terms are evaluated here
in torch, because rollouts evaluate them millions of times.
"""

from collections.abc import Sequence
from itertools import combinations_with_replacement
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm

from learneddyn.core import DataError, Transitions
from learneddyn.models.regression import AbstractRegression, Answer
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
            ``angles`` are always fitted as changes.
        bootstraps: regressions, each on its own draw of the rows.
        dropped: candidate terms that each bootstrap leaves out.
        aggregate: "median", "mean", or None for one member per bootstrap.
        threshold: coefficients below it are dropped.
        ridge: L2 factor inside the thresholding; what survives is fitted again without it.
        angles: observation columns in radians.
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
        learn_reward: bool = False,
        holdout_ratio: float = 0.2,
    ) -> None:
        super().__init__()
        for name, ok, value, allowed in (
            ("degree", degree >= 1, degree, "at least 1"),
            ("target", target in ("next", "change"), target, "'next' or 'change'"),
            ("bootstraps", bootstraps >= 1, bootstraps, "at least 1"),
            ("dropped", dropped >= 0, dropped, "at least 0"),
            ("aggregate", aggregate in (None, "median", "mean"), aggregate, "'median', 'mean' or None"),
            ("threshold", threshold >= 0, threshold, "at least 0"),
            ("ridge", ridge >= 0, ridge, "at least 0"),
            ("holdout_ratio", 0 < holdout_ratio < 1, holdout_ratio, "between 0 and 1"),
        ):
            if not ok:
                raise ValueError(f"{name} must be {allowed}, got {value!r}")
        self.degree, self.interactions, self.products, self.bias = degree, interactions, products, bias
        self.target, self.bootstraps, self.dropped, self.aggregate = target, bootstraps, dropped, aggregate
        self.threshold, self.ridge, self.angles = threshold, ridge, list(angles)
        self.learn_reward, self.holdout_ratio = learn_reward, holdout_ratio
        self.num_members = bootstraps if aggregate is None else 1

    def _build_members(self, spaces: Spaces) -> None:
        o, a = spaces.obs_dim, spaces.action_dim
        if any(not 0 <= column < o for column in self.angles):
            raise ValueError(f"angles must name observation columns 0 to {o - 1}, got {self.angles}")
        self._plain = [column for column in range(o) if column not in self.angles]
        self._supports: dict[str, tuple[int, Tensor, Tensor]] = {}
        terms = self._candidates(o + len(self.angles), a)
        count, width = len(terms), max(map(len, terms))
        # Row 0 is the constant: it fills the terms that have fewer factors than others.
        padded = [[*term, *[0] * (width - len(term))] for term in terms]
        self.register_buffer("factors", torch.tensor(padded).T.contiguous(), persistent=False)
        self.register_buffer("bootstrapped", torch.zeros(self.bootstraps, count, o))
        self.register_buffer("coefficients", torch.zeros(self.num_members, count, o))
        self.register_buffer("reward_coefficients", torch.zeros(self.num_members, count, int(self.learn_reward)))
        relative = torch.full((o,), float(self.target == "change"))
        relative[self.angles] = 1.0
        self.register_buffer("relative", relative, persistent=False)

    def library(self, obs: Float[Tensor, "b o"], action: Float[Tensor, "b a"]) -> Float[Tensor, "b p"]:
        """Return the candidate terms of every row."""
        return self._terms(obs, action, self.factors).T

    def _terms(
        self, obs: Float[Tensor, "b o"], action: Float[Tensor, "b a"], factors: Int[Tensor, "f p"]
    ) -> Float[Tensor, "p b"]:
        """Return one row per term, so that products run over the batch and not over a handful of columns."""
        parts = [torch.ones_like(obs[:, :1]), obs, action]
        if self.angles:
            angle = obs[:, self.angles]
            parts[1:2] = [obs[:, self._plain], angle.cos(), angle.sin()]
        rows = torch.cat(parts, dim=1).T.contiguous()
        terms = rows.index_select(0, factors[0])
        for factor in factors[1:]:
            terms = terms * rows.index_select(0, factor)
        return terms

    def _support(self, coefficients: Float[Tensor, "e p q"], name: str) -> tuple[Tensor, Tensor]:
        """Return factors and coefficients of the terms in use, remembered until the coefficients change."""
        known = self._supports.get(name)
        if known is None or known[0] != coefficients._version or known[2].device != coefficients.device:
            used = (coefficients != 0).any(dim=2).any(dim=0).nonzero().flatten()
            known = coefficients._version, self.factors[:, used], coefficients[:, used].mT.contiguous()
            self._supports[name] = known
        return known[1], known[2]

    def term_names(self, names: Sequence[str] | None = None) -> list[str]:
        """Return the candidate terms in words; ``names`` are those of the observation columns, then the actions."""
        self._require_fitted()
        assert self.spaces is not None
        o, a = self.spaces.obs_dim, self.spaces.action_dim
        own = [f"x{i}" for i in range(o)] + [f"u{i}" for i in range(a)] if names is None else list(names)
        if len(own) != o + a:
            raise ValueError(f"names must be {o} observation columns and {a} actions, got {own}")
        cosines, sines = ([f"{call}({own[i]})" for i in self.angles] for call in ("cos", "sin"))
        rows = ["1", *(own[i] for i in self._plain), *cosines, *sines, *own[o:]]
        return [" ".join(rows[i] for i in term if i) or "1" for term in self.factors.T.tolist()]

    def equations(self, names: Sequence[str] | None = None, digits: int = 4, member: int = 0) -> list[str]:
        """Return one line per observation column, ``x0' = 1 x0 + 0.02 x1``, and one for the reward if there is one.

        Raises:
            ValueError: the model has not been fitted, or ``names`` are not one per column.
        """
        terms = self.term_names(names)
        assert self.spaces is not None
        o = self.spaces.obs_dim
        own = [f"x{i}" for i in range(o)] if names is None else list(names)
        heads = [(f"{own[i]}'", self.coefficients[member, :, i], bool(self.relative[i])) for i in range(o)]
        if self.learn_reward:
            heads.append(("reward(x')", self.reward_coefficients[member, :, 0], False))
        lines = []
        for index, (head, column, relative) in enumerate(heads):
            parts = [f"{own[index]}"] if relative else []
            parts += [f"{c:.{digits}g} {t}" for c, t in zip(column.tolist(), terms, strict=True) if c]
            lines.append(f"{head} = {' + '.join(parts) or '0'}".replace("+ -", "- "))
        return lines

    def _candidates(self, coordinates: int, actions: int) -> list[tuple[int, ...]]:
        """Return the candidate terms, each as its factors: 0 the constant, then the coordinates, then the actions."""
        monomials = [
            factors
            for total in range(1, self.degree + 1)
            for factors in combinations_with_replacement(range(1, coordinates + 1), total)
            if self.interactions or len(set(factors)) == 1
        ]
        inputs = range(coordinates + 1, coordinates + actions + 1)
        products = [(*factors, u) for u in inputs for factors in monomials] if self.products else []
        return [(0,)] * self.bias + monomials + [(u,) for u in inputs] + products

    def _every(self, obs: Float[Tensor, "b o"], action: Float[Tensor, "b a"], memory: Tensor | None) -> Answer:
        factors, coefficients = self._support(self.coefficients, "dynamics")
        mean = (coefficients @ self._terms(obs, action, factors)).mT.addcmul(self.relative, obs)
        if self.learn_reward:
            factors, coefficients = self._support(self.reward_coefficients, "reward")
            terms = self._terms(mean.flatten(0, 1), action.repeat(len(mean), 1), factors).unflatten(1, (len(mean), -1))
            mean = torch.cat([mean, (coefficients @ terms.transpose(0, 1)).mT], dim=2)
        return Answer(mean)

    def _learn(
        self, data: Transitions, rows: Bool[Tensor, " n"], rng: torch.Generator, progress: bool
    ) -> list[dict[str, float]]:
        data = data[rows]
        theta = self.library(data.obs.double(), data.action.double())
        if self.dropped >= theta.shape[1]:
            raise DataError(f"dropped must be below the number of candidate terms {theta.shape[1]}, got {self.dropped}")
        target = data.next_obs.double() - self.relative.double() * data.obs.double()
        rewards = self.library(data.next_obs.double(), data.action.double()) if self.learn_reward else None
        dynamics, reward = [], []
        for _ in tqdm(range(self.bootstraps), desc="bootstraps", disable=not progress):
            drawn = torch.randint(len(data), (len(data),), generator=rng, device=theta.device)
            kept = torch.randperm(theta.shape[1], generator=rng, device=theta.device)[self.dropped :].sort().values
            dynamics.append(self._sparse(theta[drawn][:, kept], target[drawn], kept, theta.shape[1]))
            if rewards is not None:
                wanted = data.reward[drawn, None].double()
                reward.append(self._sparse(rewards[drawn][:, kept], wanted, kept, theta.shape[1]))
        self.bootstrapped.copy_(torch.stack(dynamics))
        self.coefficients.copy_(self._merged(torch.stack(dynamics)))
        if reward:
            self.reward_coefficients.copy_(self._merged(torch.stack(reward)))
        active = float((self.coefficients != 0).sum() / self.num_members)
        return [{"epoch": 1.0, "active_terms": active}]

    def _merged(self, coefficients: Float[Tensor, "m p q"]) -> Float[Tensor, "e p q"]:
        match self.aggregate:
            case "median":
                return coefficients.quantile(0.5, dim=0, keepdim=True)
            case "mean":
                return coefficients.mean(dim=0, keepdim=True)
        return coefficients

    def _sparse(self, theta: Tensor, target: Tensor, kept: Tensor, terms: int) -> Float[Tensor, "p q"]:
        """Return the thresholded coefficients of one bootstrap, zero for the terms that were left out."""
        found = _stlsq(self.threshold, self.ridge).fit(theta.cpu().numpy(), target.cpu().numpy()).coef_
        out = torch.zeros(terms, target.shape[1], dtype=torch.float64, device=theta.device)
        out[kept] = torch.as_tensor(found, device=theta.device).T
        return out

    # Declared for type checkers; `_build_members` registers them.
    bootstrapped: Tensor
    coefficients: Tensor
    reward_coefficients: Tensor
    relative: Tensor
    factors: Tensor


def _stlsq(threshold: float, ridge: float) -> Any:
    """Return pysindy's optimiser.

    Raises:
        ImportError: pysindy is not installed (names the extra).
    """
    try:
        from pysindy import STLSQ
    except ImportError as error:
        raise ImportError("SINDy needs pysindy: pip install 'learneddyn[models]'") from error
    return STLSQ(threshold=threshold, alpha=ridge, max_iter=20)
