"""The report: does the agent exploit its model? One self-contained ``report.html`` and ``metrics.json``."""

import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

import learneddyn
from learneddyn.core import Json
from learneddyn.evaluation.calibration import Calibration
from learneddyn.evaluation.fidelity import Fidelity, StepAccuracy
from learneddyn.evaluation.returns import Gap, Imagined, Mismatch, Returns, real_vs_imagined
from learneddyn.evaluation.stats import Estimate, bootstrap_difference, bootstrap_interval, plain
from learneddyn.files import replace_file

FORMAT = 1
Curves = Mapping[str, Mapping[str, tuple[Any, Any]]]
"""Figure title -> curve name -> (x, y), any sequences of numbers."""


class Verdict(StrEnum):
    """What the gap between imagined and real return says, from good to bad."""

    AGREES = "agrees"
    PESSIMISTIC = "pessimistic"
    UNCLEAR = "unclear"
    OPTIMISTIC = "optimistic"
    EXPLOITED = "exploited"

    @property
    def severity(self) -> int:
        """0 for the best, rising."""
        return list(Verdict).index(self)


def judge(gap: Gap, *, scale: float | None = None, tolerance: float = 0.1, severe: float = 0.3) -> Verdict:
    """Return the verdict on a gap ``imagined - real``.

    ==============  =====================================================================================
    agrees          |gap| is at most ``tolerance`` of the scale, and its interval stays within ``severe``
    exploited       the gap is above ``severe`` of the scale, and its whole interval above zero
    optimistic      the gap is above ``tolerance`` of the scale, and its whole interval above zero
    pessimistic     the gap is below minus ``tolerance`` of the scale, and its whole interval below zero
    unclear         anything else: too few episodes or seeds to tell
    ==============  =====================================================================================

    Args:
        gap: imagined and real return and their difference, with intervals.
        scale: what counts as 100 %, for example expert minus random return; by default the larger magnitude of the
            two means.
        tolerance: share of the scale that still counts as agreement.
        severe: share of the scale from which optimism counts as exploitation.
    """
    full = max(abs(gap.imagined.value), abs(gap.real.value)) if scale is None else abs(scale)
    value, low, high = gap.gap
    if abs(value) <= tolerance * full:
        return Verdict.AGREES if -severe * full <= low and high <= severe * full else Verdict.UNCLEAR
    if value > 0 and low > 0:
        return Verdict.EXPLOITED if value > severe * full else Verdict.OPTIMISTIC
    if value < 0 and high < 0:
        return Verdict.PESSIMISTIC
    return Verdict.UNCLEAR


@dataclass(frozen=True)
class Round:
    """One round of fit, train in the model, judge in the real environment, for one seed.

    ``real_steps`` counts all real steps the agent and its model have learned from so far. ``model_error`` is the
    open-loop error after ``model_error_horizon`` steps in standard deviations of the data. ``scale``: see `judge`.
    """

    round: int
    real_steps: int
    imagined: Estimate
    real: Estimate
    gap: Estimate
    model_error: float | None = None
    model_error_horizon: int | None = None
    break_even_horizon: int | None = None
    untrusted_share: float | None = None
    scale: float | None = None

    @classmethod
    def from_episodes(
        cls,
        round: int,
        real_steps: int,
        imagined: Imagined,
        real: Returns,
        *,
        fidelity: Fidelity | None = None,
        at: int = 10,
        scale: float | None = None,
    ) -> "Round":
        """Build a round from judged episodes.

        Args:
            round: number of the round, from 0.
            real_steps: real steps learned from so far.
            imagined: the agent's episodes in its world.
            real: the agent's episodes in the real environment.
            fidelity: open-loop error of the model, if measured.
            at: horizon at which the model error is reported (the largest measured one if that is shorter).
            scale: return units that count as 100 %; see `judge`.
        """
        [gap] = real_vs_imagined(real, imagined)
        known = cls(round, real_steps, gap.imagined, gap.real, gap.gap, scale=scale)
        known = replace(known, untrusted_share=imagined.untrusted_share)
        if fidelity is None:
            return known
        at = min(at, fidelity.horizon)
        error = float(fidelity.overall[at - 1])
        return replace(
            known,
            model_error=None if math.isnan(error) else error,
            model_error_horizon=at,
            break_even_horizon=fidelity.break_even_horizon,
        )

    @property
    def verdict(self) -> Verdict:
        """The verdict on this round's gap."""
        return judge(Gap(self.imagined, self.real, self.gap), scale=self.scale)

    def to_json(self) -> Json:
        """Return a plain dictionary that `from_json` reads back."""
        estimates = {name: getattr(self, name).to_json() for name in ("imagined", "real", "gap")}
        return {
            **vars(self),
            **estimates,
            "model_error": None if self.model_error is None else plain(self.model_error),
            "verdict": str(self.verdict),
        }

    @classmethod
    def from_json(cls, text: Json) -> "Round":
        """Read what `to_json` wrote."""
        estimates = {name: Estimate.from_json(text[name]) for name in ("imagined", "real", "gap")}
        return cls(**{name: value for name, value in text.items() if name != "verdict"} | estimates)


@dataclass(frozen=True)
class Headline:
    """The verdict over all seeds: the worst of their last judgements decides, and the counts say how many share it.

    ``gap`` compares the seeds' last judgements: over seeds (paired) where there are several, over episodes for one.
    """

    verdict: Verdict
    counts: dict[Verdict, int]
    gap: Gap
    target: float | None
    reached: int | None

    @classmethod
    def of(
        cls,
        rounds: Mapping[int, Sequence[Round]],
        target: float | None = None,
        fresh: Mapping[int, Round] | None = None,
    ) -> "Headline":
        """Judge the last agent of every seed, on fresh episodes where there are any, else on those of its round.

        Raises:
            ValueError: no seed, or a seed without rounds.
        """
        if not rounds or not all(rounds.values()):
            raise ValueError(f"every seed needs at least one round, got { ({s: len(r) for s, r in rounds.items()}) }")
        last = [(fresh or {}).get(seed, played[-1]) for seed, played in rounds.items()]
        verdicts = [played.verdict for played in last]
        promised, paid = ([getattr(played, name).value for played in last] for name in ("imagined", "real"))
        if len(last) > 1:
            overall = Gap(
                bootstrap_interval(promised),
                bootstrap_interval(paid),
                bootstrap_difference(promised, paid, paired=True),
            )
        else:
            overall = Gap(last[0].imagined, last[0].real, last[0].gap)
        reached = None if target is None else int((np.array(paid) >= target).sum())
        worst = max(verdicts, key=lambda verdict: verdict.severity)
        return cls(worst, {v: verdicts.count(v) for v in Verdict if v in verdicts}, overall, target, reached)

    def to_json(self) -> Json:
        """Return a plain dictionary."""
        counts = {str(verdict): count for verdict, count in self.counts.items()}
        return {
            "verdict": str(self.verdict),
            "seeds": counts,
            "target": self.target,
            "target_reached": self.reached,
        } | self.gap.to_json()


@dataclass(frozen=True)
class Report:
    """Everything a report shows; ``fidelity``, ``calibration``, ``accuracy`` are keyed by the data they are on."""

    title: str
    rounds: Mapping[int, Sequence[Round]]
    fresh: Mapping[int, Round]
    fidelity: Mapping[str, Fidelity]
    calibration: Mapping[str, Calibration]
    accuracy: Mapping[str, StepAccuracy]
    mismatch: Mismatch | None
    curves: Curves
    figures: Mapping[str, bytes]
    gif: bytes | None
    config: Json
    versions: Mapping[str, str]
    headline: Headline
    notes: Sequence[str]
    created: str

    def to_json(self) -> Json:
        """Return the content of ``metrics.json``."""
        return {
            "format": FORMAT,
            "title": self.title,
            "created": self.created,
            "headline": self.headline.to_json(),
            "seeds": {str(seed): [played.to_json() for played in rounds] for seed, rounds in self.rounds.items()},
            "fresh": {str(seed): played.to_json() for seed, played in self.fresh.items()},
            "fidelity": {name: part.to_json() for name, part in self.fidelity.items()},
            "calibration": {name: part.to_json() for name, part in self.calibration.items()},
            "accuracy": {name: part.to_json() for name, part in self.accuracy.items()},
            "mismatch": self.mismatch.to_json() if self.mismatch else None,
            "curves": {
                title: {name: {"x": _numbers(x), "y": _numbers(y)} for name, (x, y) in lines.items()}
                for title, lines in self.curves.items()
            },
            "notes": list(self.notes),
            "config": self.config,
            "versions": dict(self.versions),
        }


def write_report(
    folder: str | Path,
    *,
    title: str,
    rounds: Mapping[int, Sequence[Round]],
    fresh: Mapping[int, Round] | None = None,
    fidelity: Mapping[str, Fidelity] | None = None,
    calibration: Mapping[str, Calibration] | None = None,
    accuracy: Mapping[str, StepAccuracy] | None = None,
    mismatch: Mismatch | None = None,
    curves: Curves | None = None,
    figures: Mapping[str, bytes] | None = None,
    gif: str | Path | bytes | None = None,
    config: Json | None = None,
    target: float | None = None,
    notes: Sequence[str] = (),
) -> Path:
    """Write ``report.html`` and ``metrics.json`` into a folder and return the path of the page.

    Both are composed before the first byte is written and then moved into place, so a failure leaves the old ones.

    Args:
        folder: made if missing.
        title: of the page, such as the environment and the method.
        rounds: rounds of every seed, in order.
        fresh: the last agents judged again on episodes that decided nothing; the headline takes these. Where a round's
            own episodes decide that it is the last, they flatter it.
        fidelity: open-loop errors, keyed by the data they were measured on.
        calibration: keyed alike.
        accuracy: one-step reward and termination accuracy, keyed alike.
        mismatch: correlation of the models' likelihood with return, over many models.
        curves: learning curves: figure title -> curve name -> (x, y).
        figures: further pictures, caption -> PNG, GIF, JPEG or SVG file content.
        gif: side-by-side video, a path or file content.
        config: plain JSON, shown as it is.
        target: real return to reach; a seed reaches it with its mean.
        notes: sentences for the reader, such as what a task's observation lacks.

    Raises:
        ValueError: no seed, a seed without rounds, a picture of unknown format, or a config that JSON cannot hold.
        FileNotFoundError: ``gif`` names no file.
    """
    from learneddyn.evaluation.page import page

    report = Report(
        title=title,
        rounds=rounds,
        fresh=fresh or {},
        fidelity=fidelity or {},
        calibration=calibration or {},
        accuracy=accuracy or {},
        mismatch=mismatch,
        curves=curves or {},
        figures=figures or {},
        gif=gif if isinstance(gif, bytes | None) else Path(gif).read_bytes(),
        config=config or {},
        versions=versions(),
        headline=Headline.of(rounds, target, fresh),
        notes=notes,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    try:
        metrics = json.dumps(report.to_json(), indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"config must be plain JSON (numbers finite, no objects): {error}") from error
    html = page(report)
    target_folder = Path(folder)
    target_folder.mkdir(parents=True, exist_ok=True)
    for name, content in (("metrics.json", metrics), ("report.html", html)):
        replace_file(target_folder / name, content.encode())
    return target_folder / "report.html"


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    names = ("torch", "gymnasium", "mujoco", "stable-baselines3", "sb3-contrib", "minari", "numpy")
    known = {"learneddyn": learneddyn.__version__, "python": platform.python_version()}
    return known | {name: metadata.version(name) for name in names}


def _numbers(values: Any) -> list[float | None]:
    return [plain(float(value)) for value in values]
