"""Candidate terms in words: products of simple factors of the observation x0, x1 ... and the action u0, u1 ...

"1"   "x1"   "x1^2"   "x0 x1"   "|x1| x1"   "sin(x0)"   "u0 cos(x0)"   "tanh(x1/0.1)"
"""

import re
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

_FACTOR = re.compile(
    r"^(?:(?P<one>1)|\|(?P<abs>[xu]\d+)\||(?P<call>sin|cos|tanh)\((?P<arg>[xu]\d+)(?:/(?P<scale>[0-9.e+-]+))?\)"
    r"|(?P<name>[xu]\d+)(?:\^(?P<power>\d+))?)$"
)
_CALLS: dict[str, Callable[[Tensor], Tensor]] = {"sin": torch.sin, "cos": torch.cos, "tanh": torch.tanh}


def evaluate_terms(
    terms: Sequence[str], obs: Float[Tensor, "b o"], action: Float[Tensor, "b a"]
) -> Float[Tensor, "b p"]:
    """Return one column per term.

    Raises:
        ValueError: a factor that is not of the grammar, or a column that the data does not have.
    """
    columns = []
    for term in terms:
        column = torch.ones_like(obs[:, 0])
        for factor in term.split():
            column = column * _factor(factor, obs, action)
        columns.append(column)
    return torch.stack(columns, dim=1)


def _factor(text: str, obs: Tensor, action: Tensor) -> Tensor:
    found = _FACTOR.match(text)
    if found is None:
        raise ValueError(
            f"{text!r} is no factor: allowed are 1, x0, x0^2, |x0|, sin(x0), cos(x0), tanh(x0/0.1), and u0 likewise"
        )
    part = found.groupdict()
    if part["one"]:
        return torch.ones_like(obs[:, 0])
    if part["abs"]:
        return _column(part["abs"], obs, action).abs()
    if part["call"]:
        return _CALLS[part["call"]](_column(part["arg"], obs, action) / float(part["scale"] or 1))
    return _column(part["name"], obs, action) ** int(part["power"] or 1)


def _column(name: str, obs: Tensor, action: Tensor) -> Tensor:
    source, index = (obs if name[0] == "x" else action), int(name[1:])
    if index >= source.shape[1]:
        raise ValueError(f"there is no column {name}: there are {obs.shape[1]} x and {action.shape[1]} u")
    return source[:, index]
