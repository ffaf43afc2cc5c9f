"""Objective mismatch: is a likelier model a better model to act by, and can a likely one be useless?

Source: Lambert, Amos, Yadan, Calandra, "Objective Mismatch in Model-based Reinforcement Learning" (2020). Two tools:

    likelihood_study    many models, their likelihood on several data sets, the return of whoever acts by them
    adversarial_model   a model nearly as likely as a good one, by which a controller fails

`learneddyn.models.weighting` holds the mitigation, weights of the model's loss.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import silu

from learneddyn.core import Dynamics, Json, Transitions
from learneddyn.evaluation.calibration import normal_nll
from learneddyn.evaluation.stats import Estimate, correlation
from learneddyn.models import ProbabilisticEnsemble
from learneddyn.models.base import memory_of

Judge = Callable[[Dynamics], float]
"""The return, in the real environment, of a controller that acts by this model."""


@torch.no_grad()
def log_likelihood(model: Dynamics, data: Transitions, *, chunk: int = 10_000) -> float:
    """Return the mean log-likelihood of the rows' next observations, in nats a row (summed over columns).

    An ensemble is the even mixture of its elites; no weight of the loss enters.
    """
    total = torch.zeros((), dtype=torch.float64, device=data.device)
    memory = memory_of(model, data)
    for rows in torch.arange(len(data), device=data.device).split(chunk):
        said = model.predict(data.obs[rows], data.action[rows], None if memory is None else memory[rows])
        mean, std = said.mean[said.elites], said.std[said.elites]
        logs = -normal_nll(data.next_obs[rows].expand_as(mean), mean, std).double().sum(dim=2)
        total += (logs.logsumexp(dim=0) - math.log(len(logs))).sum()
    return float(total / len(data))


@dataclass(frozen=True)
class LikelihoodStudy:
    """Log-likelihoods and returns of many models, and how they are correlated (Pearson) on each data set.

    ``top`` uses the half of the models with the better returns: failed models alone can make a correlation. It is None
    where fewer than three are left, or nothing varies. Intervals are bootstrap intervals over models.
    """

    likelihoods: dict[str, Float[np.ndarray, " n"]]
    returns: Float[np.ndarray, " n"]
    pearson: dict[str, Estimate]
    top: dict[str, Estimate | None]

    def to_json(self) -> Json:
        """Return a plain dictionary."""
        return {
            "models": len(self.returns),
            "returns": self.returns.tolist(),
            "likelihoods": {name: values.tolist() for name, values in self.likelihoods.items()},
            "pearson": {name: value.to_json() for name, value in self.pearson.items()},
            "top": {name: value and value.to_json() for name, value in self.top.items()},
        }


def likelihood_study(
    models: Sequence[Dynamics], data: Mapping[str, Transitions], judge: Judge, *, level: float = 0.95, seed: int = 0
) -> LikelihoodStudy:
    """Measure likelihood and return of every model, and correlate them.

    Args:
        models: at least three, of different quality: sizes, seeds, amounts of data, lengths of training.
        data: held-out data sets by name; what likelihood means depends on them.
        judge: plays a controller that acts by the model in the real environment.
        level: nominal coverage of the intervals.
        seed: of the bootstrap.

    Raises:
        ValueError: fewer than three models, or likelihoods or returns that are not finite or do not vary.
    """
    likelihoods = {name: [log_likelihood(model, rows) for model in models] for name, rows in data.items()}
    return correlated(likelihoods, [judge(model) for model in models], level=level, seed=seed)


def correlated(likelihoods: Mapping[str, Any], returns: Any, *, level: float = 0.95, seed: int = 0) -> LikelihoodStudy:
    """Correlate figures at hand, for example of several studies put together.

    Args:
        likelihoods: ``[n]`` per data set.
        returns: ``[n]``, of the same models.
        level: nominal coverage of the intervals.
        seed: of the bootstrap.

    Raises:
        ValueError: fewer than three models, or figures that are not finite or do not vary.
    """
    y = np.asarray(returns, dtype=np.float64)
    best = np.argsort(-y, kind="stable")[: (len(y) + 1) // 2]
    measured = {name: np.asarray(values, dtype=np.float64) for name, values in likelihoods.items()}

    def pearson(x: np.ndarray, rows: Any) -> Estimate:
        return correlation(x[rows], y[rows], method="pearson", level=level, seed=seed)

    return LikelihoodStudy(
        likelihoods=measured,
        returns=y,
        pearson={name: pearson(x, slice(None)) for name, x in measured.items()},
        top={
            name: pearson(x, best) if len(best) > 2 and np.ptp(x[best]) and np.ptp(y[best]) else None
            for name, x in measured.items()
        },
    )


@dataclass(frozen=True)
class Adversary:
    """A model that is nearly as likely as the one it came from, and what it costs to act by it.

    ``history`` holds the lowest return among admissible models after every generation.
    """

    model: ProbabilisticEnsemble
    likelihood: float
    original_likelihood: float
    returned: float
    original_return: float
    played: int
    history: list[float]

    def to_json(self) -> Json:
        """Return a plain dictionary without the model."""
        return {name: value for name, value in vars(self).items() if name != "model"}


def adversarial_model(
    model: ProbabilisticEnsemble,
    data: Transitions,
    judge: Judge,
    *,
    delta: float = 0.1,
    generations: int = 10,
    population: int = 10,
    step: float = 0.7,
    penalty: float = 1000.0,
    seed: int = 0,
) -> Adversary:
    """Search, near a good model, for one by which a controller fails and which the data hardly tell apart.

    CMA-ES over the weights and biases of the last layer's means minimises ``return + penalty * max(0, original
    likelihood - delta - likelihood)``. Deviations from the source: coordinates are those in which the likelihood on
    ``data`` is round, so that steps are long where the data do not look; a model outside the bound is not played, it
    counts as the original return plus its penalty; and the strategy's covariance is diagonal (hundreds of weights, few
    generations).

    Args:
        model: a fitted model; it is not changed.
        data: rows that likelihood is measured on.
        judge: plays a controller that acts by the model in the real environment.
        delta: log-likelihood, in nats a row, that may be lost.
        generations: of the strategy.
        population: models per generation.
        step: first standard deviation of the search; at 1, candidates lose about ``delta`` on average.
        penalty: return per nat below the bound.
        seed: of the strategy.

    Returns:
        The admissible model with the lowest return; the original where none was lower.

    Raises:
        ValueError: an argument out of range.
        ImportError: the extra ``reproduce`` (package ``cma``) is not installed.
    """
    for name, value, ok in (
        ("delta", delta, delta >= 0),
        ("generations", generations, generations >= 1),
        ("population", population, population >= 2),
        ("step", step, step > 0),
    ):
        if not ok:
            raise ValueError(f"{name} is out of range: {value}")
    try:
        import cma
    except ImportError as error:
        raise ImportError("adversarial_model needs the package cma: pip install learneddyn[reproduce]") from error
    original, first = log_likelihood(model, data), judge(model)
    axes = _round_axes(model, data, delta)
    settings = {"popsize": population, "seed": seed + 1, "verbose": -9, "CMA_diagonal": True}
    strategy = cma.CMAEvolutionStrategy(np.zeros(axes.shape[:3].numel()), step, settings)
    worst, likely, lowest, played = model, original, first, 1
    history: list[float] = []
    for _ in range(generations):
        asked, costs = strategy.ask(), []
        for point in asked:
            moved = _moved(model, axes, point)
            likelihood = log_likelihood(moved, data)
            short = original - delta - likelihood
            if not short <= 0:
                costs.append(first + penalty * (short if np.isfinite(short) else 1e6))
                continue
            costs.append(judge(moved))
            played += 1
            if costs[-1] < lowest:
                worst, likely, lowest = moved, likelihood, costs[-1]
        strategy.tell(asked, costs)
        history.append(lowest)
    if worst is model:
        worst = copy.deepcopy(model)
    return Adversary(worst, likely, original, lowest, first, played, history)


@torch.no_grad()
def _round_axes(model: ProbabilisticEnsemble, data: Transitions, delta: float) -> Float[Tensor, "e q k k"]:
    """Return, per member and target, k steps of the last layer (rows: weights, then the bias).

    The likelihood's second derivative by these weights is the mean of features x features / variance. Its eigenvectors
    are scaled so that standard normal coordinates lose ``delta`` on average; none is longer than the weights are.
    """
    features = model._standardised(data.obs, data.action).expand(model.num_members, -1, -1)
    for weight, bias in zip(model.weights[:-1], model.biases[:-1], strict=True):
        features = silu(torch.baddbmm(bias, features, weight))
    features = torch.cat([features, torch.ones_like(features[..., :1])], dim=2).double()
    heads = model._networks(model._standardised(data.obs, data.action).expand(model.num_members, -1, -1))
    precision = (-heads.logvar).exp().double() * model.learned
    curvature = torch.einsum("enk,enl,enq->eqkl", features, features, precision) / len(data)
    values, vectors = torch.linalg.eigh(curvature)
    count = values.numel()
    length = (2 * max(delta, 1e-6) / count / values.clamp_min(1e-12)).sqrt()
    longest = model.weights[-1][..., : len(model.max_logvar)].norm(dim=1).double()[..., None]
    return (vectors * length.minimum(longest)[..., None, :]).mT.float()


def _moved(model: ProbabilisticEnsemble, axes: Float[Tensor, "e q k k"], point: np.ndarray) -> ProbabilisticEnsemble:
    """Return a copy whose last layer's means are moved by the coordinates ``point`` along ``axes``."""
    moved = copy.deepcopy(model)
    coordinates = torch.as_tensor(point, dtype=torch.float32, device=axes.device).view(axes.shape[:3])
    change = torch.einsum("eqk,eqkl->elq", coordinates, axes)
    columns = axes.shape[1]
    with torch.no_grad():
        moved.weights[-1][..., :columns] += change[:, :-1]
        moved.biases[-1][..., :columns] += change[:, -1:]
    return moved
