"""Weights for the rows of a model's loss: what the controller will meet counts more than what it never sees.

A one-step likelihood treats all rows alike, and may rise while the return of a controller that uses the model falls.
Two weights, computed once per refit and never back-propagated, both positive and of sum n:

    distance_weights   near trajectories that matter (expert's, or the best so far) counts more
    value_weights      rows count as much as a wrong prediction there changes the value

Both go to ``ProbabilisticEnsemble.fit(data, weights=...)``. Gains are small where a network is large enough to fit all
rows, and what is far is fitted worse: `learneddyn.reproduce.mismatch` measures both.

Sources: Lambert, Amos, Yadan, Calandra, "Objective Mismatch in Model-based Reinforcement Learning" (2020), which weighs
by the distance to expert trajectories; Voelcker, Liao, Garg, Farahmand, "Value Gradient weighted Model-Based
Reinforcement Learning" (2022), which weighs every column of the error by the value's slope. Deviations: a floor, and
forms besides the exponential; the value's slope weighs a row as a whole, by the length of its slope in standardised
columns, not every column apart.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from learneddyn.core import Transitions

FLOOR = 0.05
"""Least weight before scaling, relative to the largest: without it few relevant rows are all a network ever sees."""

FORMS = ("exp", "inverse", "nearest")
_CHUNK = 4_000_000


def distance_weights(
    data: Transitions,
    relevant: Transitions,
    *,
    form: str = "exp",
    length: float = 1.0,
    share: float = 0.25,
    floor: float = FLOOR,
    angles: Sequence[int] = (),
) -> Float[Tensor, " n"]:
    """Weigh rows by their distance d to the nearest relevant row (`distances`, in standard deviations).

    Args:
        data: n rows to be weighed.
        relevant: rows of trajectories that matter, of the same columns.
        form: ``exp`` is exp(-d / length), ``inverse`` is 1 / (1 + d / length), ``nearest`` gives 1 to the ``share`` of
            rows that lie nearest and the floor to the others.
        length: distance at which a weight has dropped to 1 / e or 1 / 2; infinity weighs all rows alike.
        share: of the rows that count, for ``nearest``.
        floor: least weight relative to the largest.
        angles: observation columns in radians, whose distance is measured on the circle.

    Returns:
        Positive weights whose sum is n; a row on a relevant one has the largest.

    Raises:
        ValueError: an unknown form, or a length, share or floor out of range.
    """
    for name, ok, value, allowed in (
        ("form", form in FORMS, form, f"one of {FORMS}"),
        ("length", length > 0, length, "positive"),
        ("share", 0 < share <= 1, share, "above 0 and at most 1"),
        ("floor", 0 < floor <= 1, floor, "above 0 and at most 1"),
    ):
        if not ok:
            raise ValueError(f"{name} must be {allowed}, got {value!r}")
    distance = distances(data, relevant, angles=angles)
    if form == "nearest":
        weight = torch.zeros_like(distance)
        weight[distance.argsort(stable=True)[: max(1, round(share * len(data)))]] = 1.0
    else:
        ratio = distance / length
        weight = (-ratio).exp() if form == "exp" else 1 / (1 + ratio)
    return _scaled(weight, floor)


def value_weights(
    data: Transitions,
    value: Callable[[Float[Tensor, "b o"]], Float[Tensor, " b"]],
    *,
    floor: float = FLOOR,
    cut: float = 0.95,
) -> Float[Tensor, " n"]:
    """Weigh rows by the squared slope of the value at their next observation.

    A small error e of the next observation changes the value by slope . e; the slope is taken along columns in standard
    deviations of the observation's change over ``data``.

    Args:
        data: n rows.
        value: differentiable value of observations, for example a critic at its policy's action.
        floor: least weight relative to the largest.
        cut: quantile that longer slopes are cut to, so that a few rows do not take the whole loss.

    Returns:
        Positive weights whose sum is n. A value without any slope weighs all rows alike.

    Raises:
        ValueError: a floor or cut out of range, or a value that is not one finite number with a gradient per row.
    """
    for name, number in (("floor", floor), ("cut", cut)):
        if not 0 < number <= 1:
            raise ValueError(f"{name} must be above 0 and at most 1, got {number!r}")
    with torch.enable_grad():
        obs = data.next_obs.detach().clone().requires_grad_()
        worth = value(obs)
        if worth.shape != (len(data),) or not worth.requires_grad:
            raise ValueError(
                f"value must give {len(data)} numbers with a gradient by the observation, got shape "
                f"{tuple(worth.shape)}, requires_grad={worth.requires_grad}"
            )
        (slope,) = torch.autograd.grad(worth.sum(), obs)
    length = (slope * (data.next_obs - data.obs).std(dim=0, correction=0)).norm(dim=1)
    if not bool(length.isfinite().all()):
        raise ValueError(f"the value has no finite slope in {int((~length.isfinite()).sum())} of {len(data)} rows")
    weight = length.clamp_max(length.quantile(cut)).square()
    return _scaled(weight, floor) if bool(weight.amax() > 0) else torch.ones_like(weight)


def distances(data: Transitions, relevant: Transitions, *, angles: Sequence[int] = ()) -> Float[Tensor, " n"]:
    """Return the Euclidean distance from every row's (obs, action) to the nearest relevant one.

    Columns are in standard deviations over ``data``; columns that do not vary there stay in their units. An angle
    enters as its cosine and sine.

    Raises:
        ValueError: no relevant row, other columns, or an angle that names no observation column.
    """
    widths, wanted = ((rows.obs.shape[1], rows.action.shape[1]) for rows in (relevant, data))
    if not len(relevant) or widths != wanted:
        raise ValueError(
            f"the relevant rows must have obs and action of {wanted[0]} and {wanted[1]} columns, got {len(relevant)} "
            f"rows of {widths[0]} and {widths[1]}"
        )
    if any(not 0 <= column < data.obs.shape[1] for column in angles):
        raise ValueError(f"angles must name observation columns 0 to {data.obs.shape[1] - 1}, got {list(angles)}")
    rows, marks = _features(data, angles), _features(relevant.to(data.device), angles)
    mean, std = rows.mean(dim=0), rows.std(dim=0, correction=0)
    std = torch.where(std < 1e-12, 1.0, std)
    rows, marks = (rows - mean) / std, (marks - mean) / std
    # Products of matrices would give 1e-3 where a row lies on a relevant one.
    parts = rows.split(max(1, _CHUNK // len(marks)))
    exact = "donot_use_mm_for_euclid_dist"
    return torch.cat([torch.cdist(part, marks, compute_mode=exact).amin(dim=1) for part in parts])


def _features(data: Transitions, angles: Sequence[int]) -> Float[Tensor, "n k"]:
    plain = [column for column in range(data.obs.shape[1]) if column not in angles]
    angle = data.obs[:, list(angles)]
    return torch.cat([data.obs[:, plain], angle.cos(), angle.sin(), data.action], dim=1)


def _scaled(weight: Float[Tensor, " n"], floor: float) -> Float[Tensor, " n"]:
    weight = (weight / weight.amax()).clamp_min(floor)
    return weight * (len(weight) / weight.sum())
