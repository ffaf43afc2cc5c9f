"""A run that is killed leaves no process behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = """
import os, time
from pathlib import Path

from learneddyn.runs.seeds import for_each_seed


def work(seed, notify):
    Path(f"seed-{seed}").write_text(str(os.getpid()))
    time.sleep(120)


if __name__ == "__main__":
    for_each_seed(work, [0, 1], workers=2, progress=False)
"""


def alive(process: int) -> bool:
    """A zombie has ended, and waits for a container's first process to take note."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def until(true, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.05)
    return true()


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="processes are looked up in /proc")
def test_the_processes_of_a_killed_run_end_with_it(tmp_path):
    (tmp_path / "main.py").write_text(SCRIPT)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, (os.getcwd(), os.environ.get("PYTHONPATH"))))
    }
    with subprocess.Popen([sys.executable, "main.py"], cwd=tmp_path, env=environment, stderr=subprocess.PIPE) as run:
        begun = until(lambda: all((tmp_path / f"seed-{seed}").exists() for seed in (0, 1)), 120)
        children = [int(word) for word in Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()]
        run.kill()
    try:
        assert begun
        assert len(children) >= 3, "two workers and the manager of their messages"
        assert until(lambda: not any(alive(child) for child in children), 10)
    finally:
        for child in filter(alive, children):
            os.kill(child, signal.SIGKILL)
