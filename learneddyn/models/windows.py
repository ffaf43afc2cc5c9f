"""Windows of consecutive rows of one unbroken stretch: what memories grow along and long losses are computed on.

A stretch is unbroken where the episode stays the same and each ``next_obs`` is the ``obs`` of the following row, so
rows that were dropped from a log are never bridged.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from learneddyn.core import Transitions


def linked(data: Transitions) -> Bool[Tensor, " n"]:
    """Return which rows go on from the row before them; the first row does not."""
    after = (data.episode[1:] == data.episode[:-1]) & (data.obs[1:] == data.next_obs[:-1]).all(dim=1)
    return torch.cat([after.new_zeros(min(1, len(data))), after])


def remaining(data: Transitions) -> Int[Tensor, " n"]:
    """Return how many rows of the same unbroken stretch are left, this one included."""
    row = torch.arange(len(data), device=data.device)
    ends = torch.cat([~linked(data)[1:], torch.ones(1, dtype=torch.bool, device=data.device)]).nonzero().flatten()
    return ends[torch.searchsorted(ends, row)] - row + 1


def elapsed(data: Transitions) -> Int[Tensor, " n"]:
    """Return how many rows of the same unbroken stretch stand before each row."""
    row = torch.arange(len(data), device=data.device)
    return row if not len(data) else row - torch.where(linked(data), 0, row).cummax(dim=0).values


def along(data: Transitions) -> Iterator[Int[Tensor, " r"]]:
    """Yield the rows that have one row of their stretch before them, then those that have two, and so on.

    All rows together are visited once, so that a state can be carried along a log without work that grows with the
    rows times the steps.
    """
    position = elapsed(data)
    yield from position.argsort(stable=True).split(position.bincount().tolist())[1:]


def longest_window(data: Transitions, window: int) -> int:
    """Return ``window``, or the rows of the longest unbroken stretch where those are fewer."""
    return min(window, int(remaining(data).max()))


def window_starts(data: Transitions, window: int) -> Int[Tensor, " w"]:
    """Return the rows from which ``window`` steps stay within one unbroken stretch."""
    return (remaining(data) >= window).nonzero().flatten()


def windows(part: Float[Tensor, "n c"], starts: Int[Tensor, " w"], window: int) -> Float[Tensor, "w t c"]:
    """Return ``window`` consecutive rows from every start."""
    return part[starts[:, None] + torch.arange(window, device=starts.device)]
