"""Run every benchmark of this folder, and write machine, versions, goals and tables to results.md.

    python benchmarks/run.py [--only rollout sac] [--seconds 0.2] [--rounds 5] [--out benchmarks/results.md]

Every script runs in a process of its own: first on one thread, pinned to one core, then, where threads matter, on two,
then on a GPU where there is one. The page is written anew after each. Peers that are not installed are shown as such; a
script that fails is named, the others still count, and the exit code is 1. ``make bench`` installs the peers and runs
this, in ten minutes on two quiet cores.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch
from contest import CEILING, Row, ceiling, lines

HERE = Path(__file__).parent
ONE_THREAD = ("rollout", "penalty", "imagine", "plan", "sac", "env_steps", "collect", "sindy", "profiles")
TWO_THREADS = ("rollout", "penalty", "imagine", "plan", "sac", "env_steps", "memory")
ON_GPU = ("rollout", "imagine", "plan", "sac")
EARLIER = 4
"""Earlier runs whose figures stay beside the goals."""
PACKAGES = (
    *("learneddyn", "torch", "numpy", "gymnasium", "mujoco", "stable-baselines3", "minari"),
    *("mbrl", "sbx-rl", "jax", "torchrl", "pysindy", "envpool"),
)


class Setting(NamedTuple):
    """What a run of all scripts has in common."""

    title: str
    threads: int
    device: str
    scripts: tuple[str, ...]


class Goal(NamedTuple):
    """A figure to reach; times are those on one thread.

    ``against`` is the peer whose rate is exceeded ``wanted`` times; "ceiling": the share of the fp32 ceiling; "us": at
    most so many microseconds a call; "amount": at most that much. Where the table has a row that does only what
    nobody can leave out ("... alone fp32"), its figure is shown beside.
    """

    table: str
    case: str
    name: str
    against: str
    wanted: float

    @property
    def text(self) -> str:
        """Say it in words."""
        wanted = {
            "ceiling": f">= {self.wanted:.0%} of the fp32 ceiling",
            "us": f"<= {self.wanted:g} µs a call",
            "amount": f"<= {self.wanted:g} GiB",
        }.get(self.against, f">= {self.wanted:g} x {self.against}")
        return f"{self.table}, {', '.join(part for part in (self.case, self.name) if part)}: {wanted}"

    def judge(self, rows: Sequence[Row]) -> tuple[str, bool] | None:
        """Return what was measured and whether it suffices; None: one of the rows is not there."""
        table = [row for row in rows if row.table == self.table]
        ours = [row for row in table if (row.case, row.name) == (self.case, self.name)]
        theirs = [row for row in table if row.name == self.against and row.case in ("", self.case) and row.seconds]
        if not ours:
            return None
        if self.against == "amount":
            return f"{ours[0].amount:.2f} GiB", ours[0].amount <= self.wanted
        alone = f"alone {'bf16' if 'bf16' in self.name else 'fp32'}"
        least = [row for row in table if row.name.endswith(alone) and row.case == self.case]
        if self.against == "us":
            spent = [1e6 * statistics.median(row.seconds) for row in (ours[0], *least)]
            told = [f" ({row.name}: {each:.1f} µs)" for row, each in zip(least, spent[1:], strict=True)]
            return "".join([f"{spent[0]:.1f} µs", *told]), spent[0] <= self.wanted
        if self.against == "ceiling":
            share = ours[0].rate * ours[0].flop / ceiling(table, "fp32")
            return f"{share:.0%}", share >= self.wanted
        if not theirs:
            return None
        ratio = statistics.median(ours[0].times_faster_than(theirs[0]))
        told = [f" ({row.name}: {statistics.median(row.times_faster_than(theirs[0])):.2f} x)" for row in least]
        return "".join([f"{ratio:.2f} x", *told]), ratio >= self.wanted


GOALS = [
    Goal("World step", "4096 lanes", "fp32", "mbrl-lib", 1.5),
    Goal("World step", "4096 lanes", "bf16", "mbrl-lib", 2.5),
    Goal("World step", "4096 lanes", "fp32", "ceiling", 0.5),
    Goal("World step", "256 lanes", "fp32", "mbrl-lib", 2.2),
    Goal("World step", "1 lane", "fp32 through gym.make", "us", 80),
    Goal("World step beside all members and a gather", "4096 lanes", "fp32", "all members and a gather", 4),
    Goal("World step with MOPO's penalty", "4096 lanes", "fp32", "as a kit", 2),
    Goal("World step with MOPO's penalty", "4096 lanes", "bf16", "as a kit", 3.5),
    Goal("Imagination with the policy in the loop", "20000 starts x 5 steps", "fp32", "mbrl-lib", 2),
    Goal("CEM plan at equal budget", "400 plans x 30 steps x 20 particles", "fp32", "mbrl-lib", 1.5),
    Goal("CEM plan at equal budget", "400 plans x 30 steps x 20 particles", "bf16", "mbrl-lib", 2.7),
    Goal("A step of control by iCEM", "100 plans x 30 steps x 5 particles", "bf16", "us", 100_000),
    Goal("Environment steps", "4096 lanes", "World.step", "gym.make", 12),
    Goal("Environment steps", "4096 lanes", "World.step bf16", "gym.make", 12),
    Goal("An interface alone, on a world that computes nothing", "256 lanes", "LearnedVectorEnv", "us", 10),
    Goal("An interface alone, on a world that computes nothing", "4096 lanes", "LearnedVectorEnv", "us", 40),
    Goal("An interface alone, on a world that computes nothing", "4096 lanes", "LearnedVecEnv (SB3)", "us", 300),
    Goal("Ensemble training step", "7 x 256 rows", "fp32", "mbrl-lib", 1.3),
    Goal("Ensemble training step", "7 x 256 rows", "bf16", "mbrl-lib", 2),
    Goal("SAC update", "batch 256, 2 x 256", "FastSAC fp32, device replay", "SB3", 2.3),
    Goal("SAC update", "batch 256, 2 x 256", "FastSAC bf16, device replay", "SB3", 3.3),
    Goal("SAC update", "batch 256, 2 x 256", "FastSAC bf16, device replay", "sbx (JAX)", 1.1),
    Goal("SINDy step", "4096 lanes", "SINDy", "pysindy", 50),
    Goal("Peak memory of an offline run", "1000000 rows", "+ SAC updates", "amount", 2),
]
NOTES = {
    "SINDy step": "The two find the same equations but evaluate different terms: of 69 candidates, a step here "
    "evaluates those that the equations use, and what these are made of; pysindy's `predict` evaluates all of its 56.",
}
"""What a reader must know to compare the rows of a table."""


def play(setting: Setting, seconds: float, rounds: int) -> Iterator[tuple[list[Row], list[str]]]:
    """Run the scripts of a setting; after each, yield its rows, and what failed."""
    environment = os.environ | {f"{name}_NUM_THREADS": str(setting.threads) for name in ("OMP", "MKL", "OPENBLAS")}
    with tempfile.TemporaryDirectory() as folder:
        for script in setting.scripts:
            target, begun = Path(folder) / f"{script}.json", time.perf_counter()
            options = {"seconds": seconds, "rounds": rounds, "threads": setting.threads, "device": setting.device}
            command = [sys.executable, str(HERE / f"{script}.py"), "--json", str(target)]
            command += [text for name, value in options.items() for text in (f"--{name}", str(value))]
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            print(f"{setting.title}: {script}, {time.perf_counter() - begun:.0f} s", flush=True)
            if done.returncode:
                print(done.stderr, file=sys.stderr)
                yield [], [f"{script} ({setting.title}): {done.stderr.strip().splitlines()[-1]}"]
            else:
                yield [Row(**row) for row in json.loads(target.read_text())], []


def machine() -> list[str]:
    """Return what the figures depend on, as Markdown."""
    try:
        cpu = next(
            line.split(":")[1] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
        )
    except (OSError, StopIteration):
        cpu = platform.processor()
    have = {}
    for name in PACKAGES:
        try:
            have[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            have[name] = "not installed"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return [
        f"- Machine: {cpu}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}, GPU: {gpu}",
        f"- {platform.system()} {platform.release()}, Python {platform.python_version()}",
        "- " + ", ".join(f"{name} {version}" for name, version in have.items()),
    ]


def earlier(text: str, here: str) -> dict[str, list[str]]:
    """Return what a page and those before it measured of every goal, newest first, if it is of the machine ``here``."""
    if here not in text:
        return {}
    cells = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ") and ": " in line]
    found = {goal: [now, *(before[0].split("; ") if before else [])] for goal, now, _, *before in cells if now}
    return {goal: values[:EARLIER] for goal, values in found.items() if goal in {each.text for each in GOALS}}


def page(
    played: dict[Setting, list[Row]],
    failed: Sequence[str],
    load: Sequence[str],
    before: dict[str, list[str]],
) -> str:
    """Return results.md."""
    judged = [row for one, found in played.items() for row in found if one.title == "one thread" or row.amount]
    text = ["# Speed, measured", "", "Written by `make bench`. Figures of one run on one machine:", "", *machine()]
    text.append(f"- Load average before and after: {', '.join(load)}")
    for one, found in played.items():
        tables = {row.table for row in found}
        best = {
            kind: max((ceiling([row for row in found if row.table == name], kind) for name in tables), default=0)
            for kind in ("fp32", "bf16")
        }
        told = ", ".join(f"{kind} {value / 1e9:.0f} GFLOP/s" for kind, value in best.items() if value)
        text += [f"- {CEILING.capitalize()}, {one.title}: {told}"] if told else []
    text += [
        "",
        "On one thread, times are CPU times and the process is pinned to one core; else they are wall-clock times. The",
        "contestants of a table take turns. A time is the median over the turns, with the points below which 10 % and",
        "90 % of them lie; a ratio is the median of the ratios within each turn. The goals in bf16 were set on a CPU",
        "with matrix units for bf16 (AMX); the ceilings above say how much faster than fp32 its products are here.",
        "",
        "## Goals",
        "",
        "Where other programs share the host, some minutes of a run are slower than others: what earlier runs measured",
        "stands beside, newest first.",
        "",
        "| goal | measured | | earlier runs |",
        "|---|---|---|---|",
    ]
    for goal in GOALS:
        found = goal.judge(judged)
        verdict = ("", "not measured") if found is None else (found[0], "reached" if found[1] else "**missed**")
        told = "; ".join(value.split(" (")[0] for value in before.get(goal.text, []))
        text.append(f"| {goal.text} | {verdict[0]} | {verdict[1]} | {told} |")
    text += ["", *(f"- Failed: {what}" for what in failed)] if failed else []
    for one, found in played.items():
        text += ["", f"## {one.title.capitalize()}"]
        for name in dict.fromkeys(row.table for row in found):
            text += ["", f"### {name}", "", *([NOTES[name], ""] if name in NOTES else [])]
            text += lines([row for row in found if row.table == name])
    return "\n".join(text) + "\n"


def main() -> None:
    scripts = sorted({*ONE_THREAD, *TWO_THREADS, *ON_GPU})
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=scripts, default=scripts)
    parser.add_argument("--seconds", type=float, default=0.2, help="of a turn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=HERE / "results.md")
    args = parser.parse_args()
    settings = [Setting("one thread", 1, "cpu", ONE_THREAD), Setting("two threads", 2, "cpu", TWO_THREADS)]
    if torch.cuda.is_available():
        settings.append(Setting("GPU", 1, "cuda", ON_GPU))
    before, load = earlier(args.out.read_text() if args.out.exists() else "", machine()[0]), f"{os.getloadavg()[0]:.1f}"
    played: dict[Setting, list[Row]] = {}
    failed: list[str] = []
    for setting in settings:
        chosen = setting._replace(scripts=tuple(name for name in setting.scripts if name in args.only))
        played[chosen] = []
        for rows, bad in play(chosen, args.seconds, args.rounds):
            played[chosen] += rows
            failed += bad
            args.out.write_text(page(played, failed, (load, f"{os.getloadavg()[0]:.1f}"), before))
    print(f"wrote {args.out}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
