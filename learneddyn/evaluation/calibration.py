"""Does a model know what it does not know? NLL, CRPS, coverage and PIT, for one step and for k-step sample clouds.

The probability integral transform (PIT) is the predictive distribution function at the truth: uniform where the model
is calibrated, piled up at both ends where it is overconfident, in the middle where it is underconfident. Coverage of
central intervals and the expected calibration error follow from it. An angle is judged within the turn about the mean
direction of its predictive distribution: across the seam of a wrapped angle the truth is as near as it is.

    normal CRPS     Gneiting & Raftery, "Strictly Proper Scoring Rules, Prediction, and Estimation", 2007
    mixture CRPS    Grimit, Gneiting, Berrocal & Johnson, "The continuous ranked probability score for circular
                    variables and its application to mesoscale forecast ensemble verification", 2006
    fair CRPS       Ferro, "Fair scores for ensemble forecasts", 2014
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from learneddyn.core import Dynamics, Json, Transitions
from learneddyn.evaluation.fidelity import rolled, varying_scale, windows_of
from learneddyn.evaluation.stats import plain
from learneddyn.models.angles import gathered
from learneddyn.models.base import memory_of
from learneddyn.world import World

LEVELS = (0.5, 0.9)
BINS = 20
_FAR = 1e30
_GRID = torch.arange(1, 20, dtype=torch.float64) / 20


@dataclass(frozen=True)
class Calibration:
    """Calibration per horizon. Columns that are constant in the data are left out (``scale`` zero, figures NaN).

    ``nll`` is in nats per column; ``crps`` and ``sharpness`` (mean predicted standard deviation) in the column's units;
    ``coverage`` the share of truths inside the central interval of each level; ``ece`` the mean over p = 0.05 ... 0.95
    of |P(PIT <= p) - p|; ``pit`` counts over all varying columns. ``what`` says which distribution was judged.
    """

    what: str
    horizons: tuple[int, ...]
    scale: Float[np.ndarray, " o"]
    rows: int
    nll: Float[np.ndarray, "h o"]
    crps: Float[np.ndarray, "h o"]
    sharpness: Float[np.ndarray, "h o"]
    coverage: dict[float, Float[np.ndarray, "h o"]]
    ece: Float[np.ndarray, "h o"]
    pit: Int[np.ndarray, "h bins"]

    @property
    def mean_coverage(self) -> dict[float, Float[np.ndarray, " h"]]:
        """Coverage per level, averaged over the columns that vary."""
        return {level: self._mean(figures) for level, figures in self.coverage.items()}

    @property
    def mean_nll(self) -> Float[np.ndarray, " h"]:
        """NLL per column, averaged over the columns that vary."""
        return self._mean(self.nll)

    @property
    def mean_ece(self) -> Float[np.ndarray, " h"]:
        """Expected calibration error, averaged over the columns that vary."""
        return self._mean(self.ece)

    @property
    def mean_crps(self) -> Float[np.ndarray, " h"]:
        """CRPS in standard deviations of the data, averaged over the columns that vary."""
        varying = self.scale > 0
        return self._mean(np.where(varying, self.crps / np.where(varying, self.scale, 1.0), np.nan))

    def to_json(self) -> Json:
        """Return a plain dictionary; undefined and infinite figures become None."""
        means = {"nll": self.mean_nll, "crps": self.mean_crps, "ece": self.mean_ece}
        per_column = {"nll": self.nll, "crps": self.crps, "sharpness": self.sharpness, "ece": self.ece}
        return {
            "what": self.what,
            "horizons": list(self.horizons),
            "rows": self.rows,
            "mean": {name: _row(figures) for name, figures in means.items()}
            | {"coverage": {str(level): _row(figures) for level, figures in self.mean_coverage.items()}},
            "per_column": {name: [_row(row) for row in figures] for name, figures in per_column.items()}
            | {"coverage": {str(level): [_row(row) for row in figures] for level, figures in self.coverage.items()}},
            "pit": self.pit.tolist(),
        }

    def _mean(self, figures: Float[np.ndarray, "h o"]) -> Float[np.ndarray, " h"]:
        varying = figures[:, self.scale > 0]
        return varying.mean(axis=1) if varying.shape[1] else np.full(len(figures), np.nan)


def normal_cdf(z: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
    """Standard normal distribution function."""
    return torch.special.ndtr(z)


def normal_nll(y: Float[Tensor, "*b"], mean: Float[Tensor, "*b"], std: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
    """Negative log-density of a normal distribution, in nats."""
    return 0.5 * ((y - mean) / std).square() + std.log() + 0.5 * math.log(2 * math.pi)


def normal_crps(y: Float[Tensor, "*b"], mean: Float[Tensor, "*b"], std: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
    """CRPS of a normal distribution, closed form, in the units of ``y``."""
    z = (y - mean) / std
    return std * (z * (2 * normal_cdf(z) - 1) + 2 * _density(z) - 1 / math.sqrt(math.pi))


def mixture_nll(y: Float[Tensor, "*b"], mean: Float[Tensor, "e *b"], std: Float[Tensor, "e *b"]) -> Float[Tensor, "*b"]:
    """Negative log-density of an equal mixture of normal distributions, in nats."""
    logs = -normal_nll(y.expand_as(mean), mean, std)
    return math.log(len(mean)) - logs.logsumexp(dim=0)


def mixture_crps(
    y: Float[Tensor, "*b"], mean: Float[Tensor, "e *b"], std: Float[Tensor, "e *b"]
) -> Float[Tensor, "*b"]:
    """CRPS of an equal mixture of normal distributions, closed form, in the units of ``y``."""
    members = len(mean)
    to_truth = _mean_distance(y - mean, std).mean(dim=0)
    # One pair of members at a time: all at once would need members^2 times the memory.
    spread = sum(
        _mean_distance(mean[i] - mean[j], (std[i].square() + std[j].square()).sqrt())
        for i in range(members)
        for j in range(members)
    )
    return to_truth - 0.5 * spread / members**2


def sample_crps(y: Float[Tensor, "*b"], samples: Float[Tensor, "s *b"]) -> Float[Tensor, "*b"]:
    """Fair CRPS of samples: mean |x - y| - 1/2 mean |x - x'| over distinct pairs, unbiased for any number of samples.

    Raises:
        ValueError: fewer than two samples.
    """
    count = len(samples)
    if count < 2:
        raise ValueError(f"the fair CRPS needs at least two samples, got {count}")
    ordered = samples.sort(dim=0).values
    weight = 2 * torch.arange(count, device=y.device, dtype=samples.dtype) - count + 1
    pairs = torch.tensordot(weight, ordered, dims=1)
    return (samples - y).abs().mean(dim=0) - pairs / (count * (count - 1))


def sample_pit(y: Float[Tensor, "*b"], samples: Float[Tensor, "s *b"], rng: torch.Generator) -> Float[Tensor, "*b"]:
    """Randomised PIT of samples: the truth's rank among them, spread evenly over its cell (ties shared at random)."""
    below, equal = (samples < y).sum(dim=0), (samples == y).sum(dim=0)
    place = torch.rand(y.shape, generator=rng, device=y.device, dtype=y.dtype)
    return (below + place * (equal + 1)) / (len(samples) + 1)


@torch.no_grad()
def one_step_calibration(
    dynamics: Dynamics,
    data: Transitions,
    *,
    angles: Sequence[int] = (),
    device: torch.device | str = "cpu",
    batch: int = 16_384,
) -> Calibration:
    """Judge the one-step mixture of the elites on held-out rows, with the memory of what came before them.

    Args:
        dynamics: a fitted model.
        data: held-out experience.
        angles: observation columns that are angles in radians.
        device: of the model.
        batch: rows asked at once.

    Raises:
        DataError: no rows, or NaN or infinite entries.
    """
    data = data.check().to(device)
    parts: list[tuple[Tensor, ...]] = []
    memory = memory_of(dynamics, data)
    for i in range(0, len(data), batch):
        rows = slice(i, i + batch)
        prediction = dynamics.predict(data.obs[rows], data.action[rows], None if memory is None else memory[rows])
        mean, std = (part[prediction.elites].double() for part in (prediction.mean, prediction.std))
        std = std.clamp_min(torch.finfo(torch.float32).tiny)
        truth = data.next_obs[rows].double()
        mean = gathered(mean, angles, truth)
        overall = (std.square().mean(dim=0) + mean.var(dim=0, correction=0)).sqrt()
        pit = normal_cdf((truth - mean) / std).mean(dim=0)
        parts.append((mixture_nll(truth, mean, std), mixture_crps(truth, mean, std), overall, pit))
    columns = [torch.cat(column)[:, None] for column in zip(*parts, strict=True)]
    scale = varying_scale(data, angles)
    return _summary("one-step mixture of the elites", (1,), scale, *columns)


@torch.no_grad()
def cloud_calibration(
    world: World,
    data: Transitions,
    *,
    horizons: Sequence[int] = (1, 2, 5, 10),
    samples: int = 50,
    windows: int = 200,
    rng: torch.Generator,
) -> Calibration:
    """Judge k-step clouds of sampled futures on held-out windows, with the logged actions.

    CRPS and PIT are those of the samples (fair, randomised); the NLL is that of the normal distribution with the
    cloud's mean and standard deviation. A future that leaves the finite numbers counts as 1e30: its scores become
    enormous, not undefined.

    Args:
        world: the world; its sampler draws the futures, its task says which columns are angles.
        data: held-out experience.
        horizons: steps ahead to judge, ascending.
        samples: futures per window.
        windows: number of starts.
        rng: of windows and world, on the world's device.

    Raises:
        ValueError: horizons not ascending and positive, fewer than two samples, no window as long as the last horizon.
        DataError: no rows, or NaN or infinite entries.
    """
    ahead = tuple(int(h) for h in horizons)
    if not ahead or ahead[0] < 1 or any(b <= a for a, b in pairwise(ahead)):
        raise ValueError(f"horizons must be ascending numbers of steps from 1, got {ahead}")
    if samples < 2:
        raise ValueError(f"a cloud needs at least two samples, got {samples}")
    data = data.to(rng.device)
    log = windows_of(data, ahead[-1], rng=rng, windows=windows, dynamics=world.dynamics)
    steps = torch.tensor(ahead, device=rng.device) - 1
    cloud = rolled(world, log, samples, rng).obs[:, steps].reshape(samples, len(log.start), len(ahead), -1).double()
    truth = log.next_obs[:, steps].double()
    cloud = gathered(cloud, world.task.angles, truth).clamp(-_FAR, _FAR)
    mean, std = cloud.mean(dim=0), cloud.std(dim=0).clamp_min(torch.finfo(torch.float32).tiny)
    scale = varying_scale(data, world.task.angles)
    figures = (normal_nll(truth, mean, std), sample_crps(truth, cloud), std, sample_pit(truth, cloud, rng))
    return _summary(f"clouds of {samples} sampled futures", ahead, scale, *figures)


def _summary(
    what: str,
    horizons: tuple[int, ...],
    scale: Float[Tensor, " o"],
    nll: Float[Tensor, "n h o"],
    crps: Float[Tensor, "n h o"],
    std: Float[Tensor, "n h o"],
    pit: Float[Tensor, "n h o"],
) -> Calibration:
    constant = scale == 0

    def mean(figures: Tensor) -> np.ndarray:
        return figures.double().mean(dim=0).masked_fill(constant, torch.nan).cpu().numpy()

    reached = torch.stack([(pit <= p).double().mean(dim=0) for p in _GRID.tolist()])
    ece = (reached - _GRID.to(pit.device)[:, None, None]).abs().mean(dim=0)
    cells = (pit * BINS).long().clamp(0, BINS - 1)[:, :, ~constant]
    counts = torch.stack([torch.bincount(cells[:, h].flatten(), minlength=BINS) for h in range(len(horizons))])
    return Calibration(
        what=what,
        horizons=horizons,
        scale=scale.cpu().numpy(),
        rows=len(pit),
        nll=mean(nll),
        crps=mean(crps),
        sharpness=mean(std),
        coverage={level: mean((pit - 0.5).abs() <= level / 2) for level in LEVELS},
        ece=ece.masked_fill(constant, torch.nan).cpu().numpy(),
        pit=counts.cpu().numpy(),
    )


def _density(z: Tensor) -> Tensor:
    return torch.exp(-0.5 * z.square()) / math.sqrt(2 * math.pi)


def _mean_distance(shift: Tensor, std: Tensor) -> Tensor:
    """E|X| of a normal X with mean ``shift``."""
    z = shift / std
    return 2 * std * _density(z) + shift * (2 * normal_cdf(z) - 1)


def _row(figures: np.ndarray) -> list[float | None]:
    return [plain(float(number)) for number in figures]
