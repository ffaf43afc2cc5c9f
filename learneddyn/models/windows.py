"""Windows of consecutive rows within one episode: what losses over several steps are computed on."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from learneddyn.core import Transitions


def longest_window(data: Transitions, window: int) -> int:
    """Return ``window``, or the rows of the longest episode where those are fewer."""
    return min(window, int(data.episode.unique_consecutive(return_counts=True)[1].max()))


def window_starts(data: Transitions, window: int) -> Int[Tensor, " w"]:
    """Return the rows from which ``window`` steps stay within one episode."""
    row = torch.arange(max(0, len(data) - window + 1), device=data.device)
    return row[data.episode[row] == data.episode[row + window - 1]]


def windows(part: Float[Tensor, "n c"], starts: Int[Tensor, " w"], window: int) -> Float[Tensor, "w t c"]:
    """Return ``window`` consecutive rows from every start."""
    return part[starts[:, None] + torch.arange(window, device=starts.device)]
