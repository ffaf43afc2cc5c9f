"""What happens when a model leaves the finite numbers in the middle of a rollout: it is noticed, and named.

A World never hands out what is not finite (such a step is not trusted, and a plan that leads there scores -inf), so
a broken model would otherwise show as imagination that shrinks, or as a planner that finds nothing. A sentinel is
called at every step at which living rows diverge, with the members and the step.
"""

from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Bool, Int
from torch import Tensor


class Divergence(NamedTuple):
    """Rows that left the finite numbers at one step of a rollout."""

    step: int
    """From 1."""
    members: tuple[int, ...]
    rows: int
    of: int
    """Rows that were still alive before."""

    def __str__(self) -> str:
        who = "member" if len(self.members) == 1 else "members"
        return (
            f"{who} {', '.join(map(str, self.members))} of the model left the finite numbers at step {self.step} of a "
            f"rollout, in {self.rows} of {self.of} rows"
        )


Sentinel = Callable[[Divergence], None]


class ModelDiverged(FloatingPointError):
    """A model left the finite numbers. The message names the members and the step."""


def strict(divergence: Divergence) -> None:
    """Raise at the first divergence: the sentinel for debugging a model.

    Raises:
        ModelDiverged: always.
    """
    raise ModelDiverged(f"{divergence}: fit on more data, lower the learning rate, or bound the world with trust=")


def told(
    sentinel: Sentinel, step: int, member: Int[Tensor, " b"], alive: Bool[Tensor, " b"], finite: Bool[Tensor, " b"]
) -> None:
    """Call the sentinel if a living row is not finite."""
    gone = alive & ~finite
    if bool(gone.any()):
        members = tuple(member[gone].unique().tolist())
        sentinel(Divergence(step, members, int(gone.sum()), int(alive.sum())))
