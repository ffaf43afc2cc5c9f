"""A published claim as a small experiment: measured over seeds, judged, written down as JSON and PNG.

An experiment is one file in `learneddyn.reproduce`. Its ``measure`` plays one seed and returns plain JSON; `run_claim`
plays the seeds side by side, keeps each in its own file (a killed run goes on with the seeds that are missing), and
writes ``result.json`` and ``result.png``. `publish` copies them to the docs and rewrites the table there.
"""

import hashlib
import inspect
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from learneddyn.core import Json
from learneddyn.evaluation.report import versions
from learneddyn.evaluation.stats import Estimate
from learneddyn.files import replace_file, write_file
from learneddyn.runs.cells import spent
from learneddyn.runs.folder import RunFolder
from learneddyn.runs.seeds import Notify, for_each_seed

Measure = Callable[[int, Path, Notify], Json]
"""One seed: (seed, folder for its checkpoints, notify) -> JSON figures. A function of a module, so that it pickles."""


class Finding(NamedTuple):
    """One figure of an experiment, with its interval over seeds, and what was expected of it.

    ``holds`` is None where the figure is reported without a bound that could fail.
    """

    what: str
    measured: Estimate
    wanted: str
    holds: bool | None

    def to_json(self) -> Json:
        """Return plain JSON."""
        holds = None if self.holds is None else bool(self.holds)  # a comparison of NumPy numbers is no JSON
        return {"what": self.what, "measured": self.measured.to_json(), "wanted": self.wanted, "holds": holds}

    @classmethod
    def from_json(cls, text: Json) -> "Finding":
        """Read what `to_json` wrote."""
        return cls(text["what"], Estimate.from_json(text["measured"]), text["wanted"], text["holds"])


@dataclass(frozen=True)
class Claim:
    """A paper's central claim and the experiment that tests it.

    Args:
        name: what ``learneddyn reproduce`` calls it; the name of its file.
        paper: authors, title, year.
        claim: what the paper says, in our words.
        setting: what is run here, and how it differs from the paper's setting.
        measure: plays one seed.
        findings: turns the figures of all seeds into findings.
        draw: turns the figures of all seeds into a picture.
        seeds: at least three.
        notes: what was tried where a claim fails; what a reader should know.
        table: turns the figures of all seeds into a Markdown table, where findings alone do not show them all.
        cells: ``measure`` keeps its figures in `learneddyn.runs.cells`, each beside its settings. It is asked again on
            every resume, and what the experiment's file says otherwise may change between runs.
    """

    name: str
    paper: str
    claim: str
    setting: str
    measure: Measure
    findings: Callable[[dict[int, Json]], list[Finding]]
    draw: Callable[[dict[int, Json]], Figure]
    seeds: tuple[int, ...] = (0, 1, 2)
    notes: str = ""
    table: Callable[[dict[int, Json]], str] | None = None
    cells: bool = False


def run_claim(
    claim: Claim,
    out: str | Path,
    *,
    seeds: Sequence[int] | None = None,
    workers: int | None = None,
    resume: bool = False,
    progress: bool = True,
) -> list[Finding]:
    """Play a claim's seeds and write ``out/<name>/result.json`` and ``result.png``.

    Args:
        claim: to test.
        out: folder of all experiments.
        seeds: by default the claim's own.
        workers: processes at once, by default one per core.
        resume: keep the seeds that are there; they must come from the same experiment file and seeds (with cells: keep
            the cells that have the same settings).
        progress: show one line per seed.

    Raises:
        RunExists: the folder holds a run and ``resume`` is False, or the experiment has changed since.
    """
    chosen = list(claim.seeds if seeds is None else seeds)
    source = inspect.getsource(inspect.getmodule(claim.measure) or claim.measure)
    settings = {"claim": claim.name, "seeds": chosen}
    settings |= {} if claim.cells else {"source": hashlib.sha256(source.encode()).hexdigest()}
    folder = RunFolder(Path(out) / claim.name, settings, resume=resume)
    for seed in chosen:
        folder.child(f"seed-{seed}")
    work = partial(_measured, claim.measure, claim.cells, folder.path)
    measured = for_each_seed(work, chosen, workers=workers, progress=progress)
    figures = {seed: entry["figures"] for seed, entry in measured.items()}
    findings = claim.findings(figures)
    folder.write(
        "result.json",
        {
            "name": claim.name,
            "paper": claim.paper,
            "claim": claim.claim,
            "setting": claim.setting,
            "notes": claim.notes,
            "table": claim.table(figures) if claim.table else "",
            "findings": [finding.to_json() for finding in findings],
            "seconds": {str(seed): entry["seconds"] for seed, entry in measured.items()},
            "figures": {str(seed): entry for seed, entry in figures.items()},
            "versions": versions(),
        },
    )
    figure = claim.draw(figures)
    FigureCanvasAgg(figure)
    fresh = folder.path / ".result.png"
    figure.savefig(fresh, format="png", dpi=130)
    fresh.replace(folder.path / "result.png")
    return findings


def verdict(findings: Sequence[Finding]) -> str:
    """Return "holds", "fails" (one bound at least is missed) or "reported" (no bound to fail)."""
    judged = [finding.holds for finding in findings if finding.holds is not None]
    return "reported" if not judged else "holds" if all(judged) else "fails"


def publish(out: str | Path, docs: str | Path) -> Path:
    """Copy every result in ``out`` to ``docs/reproduce`` and rewrite the table ``docs/reproduce.md``."""
    target = Path(docs) / "reproduce"
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(Path(out).glob("*/result.json")):
        replace_file(target / f"{path.parent.name}.json", path.read_bytes())
        replace_file(target / f"{path.parent.name}.png", path.with_name("result.png").read_bytes())
    table = target.with_suffix(".md")
    results = [json.loads(path.read_text()) for path in sorted(target.glob("*.json"))]
    write_file(table, _page(results).encode())
    return table


def panels(count: int = 1, *, width: float = 3.6, height: float = 2.8) -> tuple[Figure, list[Axes]]:
    """Return a white figure of ``count`` axes side by side, without pyplot."""
    figure = Figure(figsize=(width * count + 0.4, height), layout="constrained")
    axes: list[Axes] = [figure.add_subplot(1, count, index + 1) for index in range(count)]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=8)
    return figure, axes


def _measured(measure: Measure, cells: bool, folder: Path, seed: int, notify: Notify) -> Json:
    """Play one seed, or read it where it has been played; runs in a process of its own."""
    home = folder / f"seed-{seed}"
    done = home / "figures.json"
    if cells or not done.exists():
        begun, busy = time.perf_counter(), time.process_time()
        figures = measure(seed, home, notify)
        seconds = {"wall": round(time.perf_counter() - begun, 1), "cpu": round(time.process_time() - busy, 1)}
        seconds = spent(home) if cells else seconds
        entry = {"figures": figures, "seconds": seconds}
        replace_file(done, json.dumps(entry, allow_nan=False).encode())
    return json.loads(done.read_text())


def _page(results: list[dict[str, Any]]) -> str:
    lines = [
        "# What the papers claim, and what is measured here",
        "",
        "Written by `make reproduce`; every row is one file in `learneddyn/reproduce/` and one command,",
        "`learneddyn reproduce NAME`. Intervals are 95 % bootstrap intervals over seeds unless a row says otherwise;",
        "the experiments are small (CPU, minutes): a claim that holds here is the mechanism, not the paper's scores.",
        "",
        "| experiment | finding | measured | wanted | |",
        "|---|---|---|---|---|",
    ]
    for result in results:
        for index, text in enumerate(result["findings"]):
            finding = Finding.from_json(text)
            name = f"[{result['name']}](#{result['name']})" if index == 0 else ""
            sign = {True: "holds", False: "**fails**", None: "reported"}[finding.holds]
            lines.append(f"| {name} | {finding.what} | {told(finding.measured)} | {finding.wanted} | {sign} |")
    for result in results:
        seconds = ", ".join(f"{value['cpu']:.0f}" for value in result["seconds"].values())
        lines += [
            "",
            f"## {result['name']}",
            "",
            f"*{result['paper']}*",
            "",
            f"**Claim.** {result['claim']}",
            "",
            f"**Here.** {result['setting']} CPU seconds per seed: {seconds}.",
            *(["", f"**Notes.** {result['notes']}"] if result["notes"] else []),
            *(["", result["table"]] if result.get("table") else []),
            "",
            f"![{result['name']}](reproduce/{result['name']}.png)",
        ]
    return "\n".join(lines) + "\n"


def told(estimate: Estimate) -> str:
    """Return an estimate as people read it; one sample alone shows no interval."""
    value, low, high = (f"{number:.4g}" for number in estimate)
    return value if "inf" in (low.lstrip("-"), high) else f"{value} [{low}, {high}]"
