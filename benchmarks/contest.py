"""Contests of speed: the contestants of a table take turns, so that a busy machine slows all of them alike.

Every script of this folder has ``measure(turns) -> list[Row]``, prints its tables when it is run by itself
(``python benchmarks/NAME.py --help``), and is run by ``python benchmarks/run.py``, which writes ``results.md``.

On one thread, times are CPU times of this process, which other load changes little. With more threads, and on a GPU,
they are wall-clock times: threads that wait for each other burn CPU time too.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

CEILING = "matrix products"
"""The table, and in it the rows, of the machine's own speed."""


class Contestant(NamedTuple):
    """One way of doing something. ``peer``: the others of its case are compared with it, or all if its case is ""."""

    name: str
    case: str
    rows: int
    """What one call works through: lanes, transitions, updates."""
    call: Callable[[], Any]
    flop: float = 0.0
    """Floating-point operations that one row cannot do without; 0: not counted."""
    peer: bool = False


class Row(NamedTuple):
    """A line of a table: seconds per call of every turn, or none and a ``note`` that says why.

    ``amount`` is a figure that is no time.
    """

    table: str
    name: str
    case: str
    rows: int = 0
    flop: float = 0.0
    peer: bool = False
    seconds: Sequence[float] = ()
    note: str = ""
    amount: float = 0.0

    @property
    def rate(self) -> float:
        """Rows per second, median over the turns."""
        return self.rows / statistics.median(self.seconds)

    def times_faster_than(self, other: "Row") -> list[float]:
        """Ratio of the two rates in every turn."""
        ratio = self.rows / other.rows
        return [ratio * theirs / ours for ours, theirs in zip(self.seconds, other.seconds, strict=True)]


class Turns(NamedTuple):
    """How long a contest lasts, and what it runs on."""

    seconds: float = 0.2
    """Of a turn."""
    rounds: int = 5
    threads: int = 1
    device: str = "cpu"

    def clock(self) -> float:
        """Return CPU seconds on one thread of a CPU, else wall-clock seconds when all that was asked is done."""
        if self.device != "cpu":
            torch.cuda.synchronize()
        elif self.threads == 1:
            return time.process_time()
        return time.perf_counter()

    def contest(self, table: str, contestants: Iterable[Contestant]) -> list[Row]:
        """Time every contestant in every round; where operations are counted, matrix products take turns with them."""
        field = list(contestants)
        if any(one.flop for one in field):
            field = [*products(self.device), *field]
        times: list[list[float]] = [[] for _ in field]
        calls = [max(1, round(self.seconds / self._timed(one.call, 1))) for one in field]
        for turn in range(self.rounds + 1):
            for index, one in enumerate(field):
                each = self._timed(one.call, calls[index])
                if turn:
                    times[index].append(each)
                else:  # the first turn warms up and corrects the number of calls
                    calls[index] = max(1, round(self.seconds / each))
        return [
            Row(table, one.name, one.case, one.rows, one.flop, one.peer, tuple(spent))
            for one, spent in zip(field, times, strict=True)
        ]

    def _timed(self, call: Callable[[], Any], calls: int) -> float:
        start = self.clock()
        for _ in range(calls):
            call()
        return (self.clock() - start) / calls


def products(device: str = "cpu") -> list[Contestant]:
    """Square matrix products: the best of them is the ceiling of everything else."""
    found = []
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        for size in (512, 1024) if device == "cpu" else (1024, 4096):
            one, other = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
            out = torch.empty_like(one)

            def multiply(one: Tensor = one, other: Tensor = other, out: Tensor = out) -> None:
                torch.mm(one, other, out=out)

            found.append(Contestant(f"{CEILING}, {name}", str(size), 1, multiply, 2.0 * size**3))
    return found


def ceiling(rows: Iterable[Row], precision: str) -> float:
    """Return the best rate of matrix products among ``rows``, in operations per second; 0: there are none."""
    return max((row.rate * row.flop for row in rows if row.name == f"{CEILING}, {precision}"), default=0.0)


def lanes_of(count: int) -> str:
    """Return the case of so many lanes."""
    return f"{count} lanes" if count > 1 else "1 lane"


def missing(table: str, name: str, error: ImportError) -> Row:
    """Return the line of a peer that is not there."""
    return Row(table, name, "", peer=True, note=f"not installed ({error})")


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Return median and, in brackets, the points below which 10 % and 90 % of the values lie."""
    deciles = statistics.quantiles(values, n=10, method="inclusive") if len(values) > 1 else [values[0]]
    return f"{statistics.median(values):.{digits}f} [{deciles[0]:.{digits}f}..{deciles[-1]:.{digits}f}]"


def lines(rows: Sequence[Row]) -> list[str]:
    """Return the rows of one table as Markdown."""
    peak = ceiling(rows, "fp32")
    cases = list(dict.fromkeys(row.case for row in rows))
    shown = sorted((row for row in rows if not row.name.startswith(CEILING)), key=lambda row: cases.index(row.case))
    if not any(row.seconds for row in shown):
        return ["| case | | |", "|---|---|---|", *(f"| {row.case} | {row.name} | {row.note} |" for row in shown)]
    peers = list(dict.fromkeys(row.name for row in shown if row.peer and row.seconds))
    head = ["case", "", "µs a call", "rows/s", *(["of fp32 ceiling"] if peak else []), *(f"x {name}" for name in peers)]
    text = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in shown:
        if not row.seconds:
            text.append("| " + " | ".join([row.case, row.name, row.note, *[""] * (len(head) - 3)]) + " |")
            continue
        cells = [row.case, row.name, spread([1e6 * each for each in row.seconds], 1), f"{row.rate:,.0f}"]
        if peak:
            cells.append(f"{row.rate * row.flop / peak:.0%}" if row.flop else "")
        for name in peers:
            other = next((one for one in shown if one.name == name and one.case in ("", row.case)), None)
            same = other is None or other.name == row.name or not other.seconds
            cells.append("" if same else f"{statistics.median(row.times_faster_than(other)):.2f}")
        text.append("| " + " | ".join(cells) + " |")
    return text


def main(measure: Callable[..., list[Row]], about: str, **options: int) -> None:
    """Run one script: print its tables, and write its rows to ``--json`` if that is given.

    Args:
        measure: called with `Turns` and the options.
        about: the script's docstring.
        **options: names and defaults of integers that ``measure`` takes.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (Turns()._asdict() | options).items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    parser.add_argument("--json", type=Path)
    args = vars(parser.parse_args())
    torch.set_num_threads(args["threads"])
    if hasattr(os, "sched_setaffinity"):  # JAX asks no other setting how many threads to start
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-args["threads"] :])
    target = args.pop("json")
    turns = Turns(**{name: args.pop(name) for name in Turns._fields})
    rows = measure(turns, **args)
    for table in dict.fromkeys(row.table for row in rows):
        print(f"\n{table}\n", *lines([row for row in rows if row.table == table]), sep="\n")
    if target:
        target.write_text(json.dumps([row._asdict() for row in rows]))
