"""The marks of a run: judgements on the way, one entry each in ``curve.json``, and the curve they draw.

A mark is a NamedTuple of its run's own: first the steps or updates done, then ``returns`` and whatever else was told.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
from matplotlib.axes import Axes

from learneddyn.files import replace_file


@runtime_checkable
class AnyMark(Protocol):
    """What marks share."""

    @property
    def returns(self) -> list[float]:
        """Returns of the judged episodes."""
        ...

    @property
    def mean(self) -> float:
        """Their mean."""
        ...

    def _asdict(self) -> dict[str, Any]:
        """The entry of the mark."""
        ...

    def __getitem__(self, index: int, /) -> Any:
        """A field by its place."""
        ...


M = TypeVar("M", bound=AnyMark)


def read_marks(folder: Path, kind: Callable[..., M]) -> list[M]:
    """Return the marks in a folder as ``kind``, none if there are none."""
    path = folder / "curve.json"
    return [kind(**entry) for entry in json.loads(path.read_text())] if path.exists() else []


def write_marks(folder: Path, marks: Sequence[AnyMark]) -> None:
    """Write the marks of a folder anew."""
    replace_file(folder / "curve.json", json.dumps([mark._asdict() for mark in marks]).encode())


def draw_marks(ax: Axes, curves: Mapping[int, Sequence[AnyMark]], title: str, counted: str) -> None:
    """Draw each seed's mean return over what is counted, with the range over episodes."""
    for seed, marks in curves.items():
        steps = [mark[0] for mark in marks]
        (line,) = ax.plot(steps, [mark.mean for mark in marks], label=f"seed {seed}")
        low, high = ([function(mark.returns) for mark in marks] for function in (np.min, np.max))
        ax.fill_between(steps, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    ax.set(xlabel=counted, ylabel="return", title=title)
    ax.legend(frameon=False, fontsize=7)
