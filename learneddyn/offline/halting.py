"""How often imagination is halted: a trust that counts what it refuses."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from learneddyn.core import State
from learneddyn.world import Trust


class Halting:
    """A trust that answers as another one does, and counts the steps it was asked about and those it refused.

    Args:
        trust: that decides.
        rule: what it judges by, for the record.
        threshold: the value of it from which on a step is refused, in its units.
    """

    def __init__(self, trust: Trust, *, rule: str, threshold: float) -> None:
        self.trust, self.rule, self.threshold = trust, rule, threshold
        self._counts: Tensor | None = None  # of trusted and of all steps

    def __call__(self, state: State, action: Float[Tensor, "b a"], after: State) -> Bool[Tensor, " b"]:
        """Ask the other one."""
        trusted = self.trust(state, action, after)
        counts = torch.stack((trusted.sum(), trusted.new_tensor(len(trusted), dtype=torch.int64)))
        self._counts = counts if self._counts is None else self._counts + counts
        return trusted

    def share(self) -> float:
        """Return the share of steps refused since the last call, 0 where none were asked about."""
        if self._counts is None:
            return 0.0
        trusted, asked = self._counts.tolist()
        self._counts = None
        return (asked - trusted) / asked
