"""Seeds side by side: one process per seed, one thread per process, as many processes as there are cores.

On a CPU two seeds in two one-thread processes finish sooner than one seed after the other on two threads: the small
matrices of reinforcement learning leave a second thread mostly waiting.
"""

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.managers import SyncManager
from queue import Empty
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

T = TypeVar("T")
Notify = Callable[[str, float], None]
"""Says what is being done and what share of it is done, 0 to 1."""

Events = Any
"""A manager's proxy of a `queue.Queue` of (seed, what, share); such proxies are no instances of what they stand for."""


def silent(what: str, share: float) -> None:
    """Say nothing."""


@contextmanager
def one_thread() -> Iterator[None]:
    """Keep PyTorch to one thread: among few rows other threads would only wait, and count as time spent."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def for_each_seed(
    work: Callable[[int, Notify], T],
    seeds: Sequence[int],
    *,
    workers: int | None = None,
    progress: bool = True,
) -> dict[int, T]:
    """Run ``work(seed, notify)`` for every seed and return the results by seed.

    Args:
        work: picklable (a function of a module, or `functools.partial` of one); seeds share nothing.
        seeds: distinct.
        workers: processes at once; by default one per core. One seed or one worker runs in this process, on one thread
            as in the others: a seed gives the same numbers alone and beside others.
        progress: show one line per seed.

    Raises:
        ValueError: no seed, or a seed twice.
        Exception: whatever a seed raised; seeds that have not begun are cancelled, running ones end first.
    """
    if not seeds or len(set(seeds)) != len(seeds):
        raise ValueError(f"seeds must be distinct and at least one, got {list(seeds)}")
    workers = min(len(seeds), workers or os.cpu_count() or 1)
    with _Board(seeds, progress) as board:
        if workers == 1:
            with one_thread():
                return {seed: work(seed, board.notifier(seed)) for seed in seeds}
        context = multiprocessing.get_context("spawn")
        manager = SyncManager(ctx=context)
        manager.start(end_with_parent)
        with manager, ProcessPoolExecutor(workers, context, begin_worker) as pool:
            queue: Events = manager.Queue()
            running = {seed: pool.submit(_told, work, seed, queue) for seed in seeds}
            while not (all(future.done() for future in running.values()) or _failed(running)):
                board.show(queue)
            pool.shutdown(cancel_futures=True)
            for future in _failed(running) or running.values():
                future.result()
            return {seed: future.result() for seed, future in running.items()}


def _failed(running: dict[int, Future[T]]) -> list[Future[T]]:
    ended = [future for future in running.values() if future.done() and not future.cancelled()]
    return [future for future in ended if future.exception() is not None]


def begin_worker() -> None:
    """Prepare a process that computes for another: one thread, and an end when that one ends, even by a kill.

    A killed parent tells nobody, and a pool's workers would wait for work for ever.
    """
    torch.set_num_threads(1)
    end_with_parent()


def end_with_parent() -> None:
    """Let this process end as soon as the one that started it has; `multiprocessing` must have started it."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()


def _told(work: Callable[[int, Notify], T], seed: int, queue: Events) -> T:
    return work(seed, lambda what, share: queue.put((seed, what, share)))


class _Board:
    """One line per seed: a bar on a terminal, a line per change of activity elsewhere."""

    def __init__(self, seeds: Sequence[int], progress: bool) -> None:
        self.console = Console(stderr=True)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[what]}"),
            TimeElapsedColumn(),
        )
        self.shown = progress
        self.bars = Progress(*columns, console=self.console, disable=not (progress and self.console.is_terminal))
        self.lines = {seed: self.bars.add_task(f"seed {seed}", total=1.0, what="waiting") for seed in seeds}
        self.last: dict[int, str] = {}

    def __enter__(self) -> "_Board":
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def notifier(self, seed: int) -> Notify:
        return lambda what, share: self.update(seed, what, share)

    def update(self, seed: int, what: str, share: float) -> None:
        self.bars.update(self.lines[seed], completed=share, what=what)
        if self.shown and not self.console.is_terminal and self.last.get(seed) != what:
            self.console.print(f"seed {seed}: {what}", highlight=False, soft_wrap=True)
        self.last[seed] = what

    def show(self, queue: Events) -> None:
        try:
            self.update(*queue.get(timeout=0.2))
        except Empty:
            return
