"""How much a unit of uncertainty costs: a number, or a rule that carries over from one data set to another.

A penalty weight λ has units, reward per unit of the penalty u, and both differ between data sets by orders of
magnitude; so does a weight that was tuned on one of them. The rule ``"quantile:c"`` measures both on the log:

    λ = c · median |r| / median u(s, a)        medians over logged rows

A logged step of median uncertainty then costs c median rewards: c is a pure number, one setting for all sets (0.5 to 5
is the range to try). The rule is this package's own.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from learneddyn.core import DataError, Dynamics, Penalty, State, Transitions
from learneddyn.models.base import memory_of

PREFIX = "quantile:"


def factor(rule: float | str) -> float | None:
    """Return c of a rule ``"quantile:c"``, None for a weight that is a number.

    Raises:
        ValueError: neither a number nor a rule, or one below 0.
    """
    text = rule.removeprefix(PREFIX) if isinstance(rule, str) else rule
    try:
        value = float(text) if isinstance(text, float | int) or rule != text else -1.0
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise ValueError(f"penalty_weight must be a number of at least 0 or 'quantile:c' with c >= 0, got {rule!r}")
    return value if isinstance(rule, str) else None


def weight_of(rule: float | str, model: Dynamics, data: Transitions, penalty: Penalty) -> float:
    """Return λ in units of the logged reward per unit of the penalty.

    Args:
        rule: the weight itself, or ``"quantile:c"``.
        model: fitted.
        data: logged rows, on the model's device.
        penalty: u.

    Raises:
        ValueError: see `factor`.
        DataError: the rule finds a median of 0 (sparse rewards, or a model that is sure of half the log).
    """
    share = factor(rule)
    if share is None:
        return float(rule)
    doubt = _positive(rule, "uncertainty", float(penalties_of(model, data, penalty).median()))
    return share * median_reward(rule, data) / doubt


def median_reward(rule: float | str, data: Transitions) -> float:
    """Return the median of |r| over the log, which a rule takes for its unit.

    Raises:
        DataError: it is 0.
    """
    return _positive(rule, "|reward|", float(data.reward.abs().median()))


def _positive(rule: float | str, name: str, median: float) -> float:
    if not 0 < median < float("inf"):
        raise DataError(
            f"{rule!r} needs a positive median of {name} over the log, which is {median:g}: pass a number as "
            "penalty_weight"
        )
    return median


@torch.no_grad()
def penalties_of(model: Dynamics, data: Transitions, penalty: Penalty, chunk: int = 50_000) -> Float[Tensor, " n"]:
    """Return a model's uncertainty about every logged step; what a penalty asks of the drawn step is the logged one."""
    parts, memory = [], memory_of(model, data)
    for first in range(0, len(data), chunk):
        rows = data[first : first + chunk]
        prediction = model.predict(rows.obs, rows.action, None if memory is None else memory[first : first + chunk])
        after = State(rows.next_obs, prediction.elites[0].expand(len(rows)))
        parts.append(penalty(rows.obs, rows.action, prediction, after))
    return torch.cat(parts)
