"""A policy that prints as a formula: actions as a sparse polynomial of the observation.

    student = distil(teacher, states, spaces, rng=generator(0))
    student.formula(["x", "angle", "speed", "spin"])      # ["u0 = clip(1.2 x - 0.4 spin sin(angle), -3, 3)"]
    student.predict(observation)                          # SB3's surface: `evaluate` takes it

Source: Zolman, Lagemann, Fasel, Kutz, Brunton, "SINDy-RL: Interpretable and Efficient Model-Based Reinforcement
Learning" (2024): the actions of a trained policy on the states it visits, and on noisy copies of them, are regressed
by an ensemble of thresholded least squares on a polynomial library; of a grid of thresholds and ridges the best on
held-out rows is kept, with the mean of its coefficients.
"""

import itertools
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from jaxtyping import Float
from stable_baselines3.common.utils import is_vectorized_observation
from torch import Tensor

from learneddyn.core import ActionFn, DataError, Transitions
from learneddyn.models import AbstractModel, FitReport
from learneddyn.models.library import PolynomialLibrary, sum_of_terms
from learneddyn.models.stlsq import draw_bootstraps, merged, require_options
from learneddyn.spaces import Spaces, decode, encode

LOG_GRID = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
_SATURATED = 0.995
"""Share of the action's range beyond which a hyperbolic tangent is not inverted."""


class SparsePolicy(AbstractModel):
    """Actions as sparse polynomials of the observation, brought into the action's bounds.

    ``fit`` imitates the actions of a data set; `distil` makes that data set from another policy. A folder written by
    ``save`` holds it, as with every model. `act` takes tensors (a world's rollouts), `predict` is SB3's.

    Args:
        degree: of the monomials.
        interactions: products of different coordinates.
        bias: a constant term.
        angles: observation columns in radians, which enter as cosine and sine.
        unit_pairs: pairs of observation columns (cosine, sine), see `learneddyn.models.library`.
        squash: "clip" the polynomial to the bounds, as the source does, or "tanh": the polynomial is the argument of a
            hyperbolic tangent that fills the bounds, as in the squashed Gaussians of SAC.
        thresholds: coefficients below are dropped; every pair of a threshold and a ridge is tried.
        ridges: L2 factors inside the thresholding.
        tolerance: of the pairs whose held-out error is within this share of the best one's, the one with the fewest
            terms is kept; 0 keeps the best, as the source does.
        bootstraps: regressions, each on its own draw of the rows.
        dropped: candidate terms that each of them leaves out.
        aggregate: "mean" of the coefficients, as in the source, or "median", which drops what few bootstraps found.
        holdout_ratio: share of the rows that the pairs are compared on.

    Raises:
        ValueError: an argument outside its range (names it, the value, what is allowed).
    """

    coefficients: Tensor
    low: Tensor
    high: Tensor

    def __init__(
        self,
        degree: int = 3,
        interactions: bool = True,
        bias: bool = False,
        angles: Sequence[int] = (),
        unit_pairs: Sequence[Sequence[int]] = (),
        squash: str = "clip",
        thresholds: Sequence[float] = LOG_GRID,
        ridges: Sequence[float] = LOG_GRID,
        tolerance: float = 0.0,
        bootstraps: int = 20,
        dropped: int = 1,
        aggregate: str = "mean",
        holdout_ratio: float = 0.2,
    ) -> None:
        super().__init__()
        require_options(bootstraps, dropped, aggregate, holdout_ratio)
        for name, ok, value, allowed in (
            ("degree", degree >= 1, degree, "at least 1"),
            ("squash", squash in ("clip", "tanh"), squash, "'clip' or 'tanh'"),
            ("aggregate", aggregate is not None, aggregate, "'mean' or 'median'"),
            ("thresholds", _not_negative(thresholds), thresholds, "numbers of at least 0, one or more"),
            ("ridges", _not_negative(ridges), ridges, "numbers of at least 0, one or more"),
            ("tolerance", tolerance >= 0, tolerance, "at least 0"),
        ):
            if not ok:
                raise ValueError(f"{name} must be {allowed}, got {value!r}")
        self.degree, self.interactions, self.bias, self.angles = degree, interactions, bias, list(angles)
        self.unit_pairs = [list(pair) for pair in unit_pairs]
        self.squash, self.thresholds, self.ridges = squash, list(thresholds), list(ridges)
        self.tolerance, self.bootstraps, self.dropped = tolerance, bootstraps, dropped
        self.aggregate, self.holdout_ratio = aggregate, holdout_ratio

    def _build(self, spaces: Spaces) -> None:
        low, high = _bounds(spaces)
        self._library = PolynomialLibrary(
            spaces.obs_dim,
            0,
            degree=self.degree,
            interactions=self.interactions,
            bias=self.bias,
            angles=self.angles,
            unit_pairs=self.unit_pairs,
        )
        self.register_buffer("coefficients", torch.zeros(len(self._library), spaces.action_dim))
        self.register_buffer("low", low)
        self.register_buffer("high", high)

    def fit(self, data: Transitions, *, rng: torch.Generator, progress: bool = False) -> FitReport:
        """Imitate the actions of the data; every call learns anew.

        Returns:
            ``holdout_mse`` (squared share of half the action's range), ``terms`` (not zero, over all actions),
            ``threshold`` and ``ridge`` of the pair that was kept, ``train_rows``, ``holdout_rows``.

        Raises:
            DataError: fewer than two rows, or NaN or infinite rows.
            ValueError: the data has other spaces than the policy, or the actions are no Box with finite bounds.
        """
        started = time.perf_counter()
        data.check()
        if len(data) < 2:
            raise DataError(f"fit needs at least 2 rows (one to learn from, one to hold out), got {len(data)}")
        self.check_spaces(data)
        data = data.to(self.coefficients.device)
        held = max(1, int(self.holdout_ratio * len(data)))
        order = torch.randperm(len(data), generator=rng, device=rng.device).to(data.device)
        judged, learned = data[order[:held]], data[order[held:]]
        theta = self._terms(learned.obs.double())
        draws = draw_bootstraps(
            theta, self._wanted(learned.action.double()), self.bootstraps, self.dropped, rng, progress
        )
        against, wanted = self._terms(judged.obs.double()), self._share(judged.action.double())
        tried = []
        for threshold, ridge in itertools.product(self.thresholds, self.ridges):
            found = merged(torch.stack([draw.stlsq(threshold, ridge) for draw in draws]), self.aggregate)[0]
            error = float((self._squashed(against @ found) - wanted).square().mean())
            tried.append((error, int((found != 0).sum()), threshold, ridge, found))
        enough = (1 + self.tolerance) * min(error for error, *_ in tried)
        error, terms, threshold, ridge, found = min(
            (one for one in tried if one[0] <= enough), key=lambda one: (one[1] if self.tolerance else 0, one[0])
        )
        self.coefficients.copy_(found)
        metrics = {"holdout_mse": error, "terms": float(terms), "threshold": threshold, "ridge": ridge}
        metrics |= {"train_rows": float(len(learned)), "holdout_rows": float(held)}
        return FitReport(1, time.perf_counter() - started, metrics)

    def act(self, obs: Float[Tensor, "b o"]) -> Float[Tensor, "b a"]:
        """Return actions inside their bounds.

        Raises:
            ValueError: the policy has not been fitted.
        """
        self._require_fitted()
        share = self._squashed(self._terms(obs) @ self.coefficients)
        action = self.low + (0.5 * share + 0.5) * (self.high - self.low)
        return action.clamp(self.low, self.high)  # rounding can lead out of them

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = True,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """Return the action for an observation or a batch of them; the same whether ``deterministic`` or not.

        Raises:
            ValueError: the policy has not been fitted.
        """
        asked = self._require_fitted()
        many = is_vectorized_observation(observation, asked.observation)  # type: ignore[arg-type]  # dicts too
        batch: Any = observation if many else _one(observation)
        with torch.no_grad():
            action = self.act(torch.as_tensor(encode(asked.observation, batch), device=self.low.device))
        actions = decode(asked.action, action.cpu().numpy())
        return actions if many else np.asarray(actions[0]), state

    def formula(self, names: Sequence[str] | None = None, digits: int = 3) -> list[str]:
        """Return one line per action, in the action's units: ``u0 = clip(0.4 x0 - 1.2 x1, -1, 1)``.

        Args:
            names: of the observation columns, by default x0, x1 ...
            digits: of the coefficients.

        Raises:
            ValueError: the policy has not been fitted, or ``names`` are not one per column.
        """
        self._require_fitted()
        terms = self._library.names(names)
        lines = []
        for index, column in enumerate(self.coefficients.T):
            low, high = float(self.low[index]), float(self.high[index])
            half, middle = (high - low) / 2, (high + low) / 2
            shift = [f"{middle:.{digits}g}"] if middle else []
            if self.squash == "clip":
                inside = sum_of_terms((half * column).tolist(), terms, digits, shift)
                lines.append(f"u{index} = clip({inside}, {low:g}, {high:g})")
            else:
                squashed = f"{half:g} tanh({sum_of_terms(column.tolist(), terms, digits)})"
                lines.append(f"u{index} = {' + '.join([*shift, squashed])}")
        return lines

    def _terms(self, obs: Float[Tensor, "b o"]) -> Float[Tensor, "b p"]:
        return self._library(obs, obs[:, :0])

    def _share(self, action: Float[Tensor, "b a"]) -> Float[Tensor, "b a"]:
        """Return actions in shares of half their range, -1 to 1."""
        return 2 * (action - self.low) / (self.high - self.low) - 1

    def _wanted(self, action: Float[Tensor, "b a"]) -> Float[Tensor, "b a"]:
        """Return what the polynomial is regressed on."""
        share = self._share(action)
        return share if self.squash == "clip" else share.clamp(-_SATURATED, _SATURATED).atanh()

    def _squashed(self, polynomial: Float[Tensor, "b a"]) -> Float[Tensor, "b a"]:
        return polynomial.clamp(-1, 1) if self.squash == "clip" else polynomial.tanh()

    def _require_fitted(self) -> Spaces:
        if self.spaces is None:
            raise ValueError("SparsePolicy has not been fitted: call fit(data) or distil(...), or load one first")
        return self.spaces


@torch.no_grad()
def distil(
    teacher: ActionFn,
    states: Float[Tensor, "n o"],
    spaces: Spaces,
    *,
    rng: torch.Generator,
    student: SparsePolicy | None = None,
    copies: int = 2,
    noise: float = 0.1,
) -> SparsePolicy:
    """Return a sparse polynomial that acts as the teacher does where it goes.

    Args:
        teacher: deterministic policy, flat observations to flat actions in environment units.
        states: that it visits.
        spaces: that it speaks.
        rng: of noise, bootstraps and hold-out, on the device of ``states``.
        student: fitted in place; by default the source's: degree 3, without angles.
        copies: of the states, with noise added; they keep the formula from going astray beside the visited states.
        noise: standard deviation in every column, in the units of the observation.

    Raises:
        ValueError: fewer than no copies, or a negative noise.
        DataError: fewer than two states.
    """
    if copies < 0 or noise < 0:
        raise ValueError(f"copies and noise must be at least 0, got {copies} and {noise}")
    drawn = [states + noise * torch.randn(states.shape, generator=rng, device=states.device) for _ in range(copies)]
    obs = torch.cat([states, *drawn])
    rows = len(obs)
    nothing = torch.zeros(rows, device=obs.device)
    data = Transitions(obs, teacher(obs), nothing, obs, nothing.bool(), torch.arange(rows, device=obs.device), spaces)
    student = SparsePolicy() if student is None else student
    student.fit(data, rng=rng)
    return student


def _bounds(asked: Spaces) -> tuple[Tensor, Tensor]:
    space = asked.action
    if not (isinstance(space, spaces.Box) and space.is_bounded()):
        raise ValueError(f"a SparsePolicy gives actions of a Box with finite bounds, got {space}")
    low, high = (torch.tensor(encode(space, bound[None])[0]) for bound in (space.low, space.high))
    return low, high


def _not_negative(values: Sequence[float]) -> bool:
    return len(values) > 0 and min(values) >= 0


def _one(observation: Any) -> Any:
    """Return a batch of one observation."""
    if isinstance(observation, dict):
        return {key: np.asarray(part)[None] for key, part in observation.items()}
    return np.asarray(observation)[None]
