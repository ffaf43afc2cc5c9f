"""The page behind `learneddyn.evaluation.report.write_report`: one HTML file, nothing fetched from anywhere."""

import base64
import json
import math
import re
from collections.abc import Iterable, Mapping
from html import escape
from importlib import resources

import numpy as np

from learneddyn.evaluation import figures
from learneddyn.evaluation.calibration import Calibration
from learneddyn.evaluation.fidelity import Fidelity, StepAccuracy
from learneddyn.evaluation.report import Report, Round, Verdict
from learneddyn.evaluation.returns import Mismatch
from learneddyn.evaluation.stats import Estimate

_SAYS = {
    Verdict.AGREES: "Imagination and reality agree",
    Verdict.PESSIMISTIC: "The model promises too little",
    Verdict.UNCLEAR: "Too few episodes to tell",
    Verdict.OPTIMISTIC: "The model promises too much",
    Verdict.EXPLOITED: "The agent exploits its model",
}
Lines = Mapping[int, list[tuple[str, Round]]]
"""Seed -> named judgements."""
_MAGIC = {b"\x89PNG": "image/png", b"GIF8": "image/gif", b"\xff\xd8\xff": "image/jpeg", b"<svg": "image/svg+xml"}


def page(report: Report) -> str:
    """Return the whole page as text."""
    css = resources.files("learneddyn.evaluation").joinpath("page.css").read_text()
    body = [
        f"<p class='soft'>learneddyn report · {escape(report.created)}</p><h1>{escape(report.title)}</h1>",
        _headline(report),
        _section("Promised and paid", _gaps(_judged(report), report.headline.target)),
        _section("Rounds", _rounds(_judged(report))),
        _section("Imagined beside real", _video(report.gif)),
        _section(
            "How long imagination follows the truth", "".join(_fidelity(*part) for part in report.fidelity.items())
        ),
        _section("Reward and termination after one step", _accuracy(report.accuracy)),
        _section(
            "Does the model know what it does not know",
            "".join(_calibration(*part) for part in report.calibration.items()),
        ),
        _section("Does a likelier model earn more", _mismatch(report.mismatch)),
        _section("Learning", _curves(report)),
        _section("Notes", "".join(f"<p>{escape(note)}</p>" for note in report.notes)),
        _section("Configuration and versions", _config(report)),
    ]
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{escape(report.title)}</title><style>{css}</style></head>\n<body><main>"
        + _apart("\n".join(part for part in body if part))
        + "</main></body></html>\n"
    )


def _apart(html: str) -> str:
    """Give every figure its own ids: a browser resolves a reference to the first element of that name on the page."""
    parts = html.split("<svg")
    return parts[0] + "".join(
        "<svg" + re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>g{number}-", part) for number, part in enumerate(parts[1:])
    )


def _judged(report: Report) -> Lines:
    """Return every judgement of every seed under its name, in order of time."""
    lines = {seed: [(f"round {played.round}", played) for played in line] for seed, line in report.rounds.items()}
    for seed, played in report.fresh.items():
        lines[seed].append(("fresh episodes", played))
    return lines


def _headline(report: Report) -> str:
    headline, rounds = report.headline, report.rounds
    seeds, verdict = len(rounds), headline.verdict
    share = f" on {headline.counts[verdict]} of {seeds} seeds" if seeds > 1 else ""
    others = ", ".join(f"{count} {name}" for name, count in headline.counts.items())
    cells = [
        ("promised by the model", _interval(headline.gap.imagined)),
        ("paid by the real environment", _interval(headline.gap.real)),
        ("promised minus paid", _interval(headline.gap.gap, signed=True)),
    ]
    if headline.target is not None:
        cells.append((f"seeds at or above {_number(headline.target)}", f"<b>{headline.reached} of {seeds}</b>"))
    first = [next(iter(line)).verdict for line in rounds.values()]
    before = ", ".join(f"{first.count(name)} {name}" for name in Verdict if name in first)
    many = any(len(line) > 1 for line in rounds.values())
    end = "Last agents" if report.fresh else "Last round"
    history = f"First round: {before}. {end}: {others}. " if many else f"Seeds: {others}. " if seeds > 1 else ""
    if report.fresh:
        history += "Judged on fresh episodes that decided nothing. "
    over = f"means over {seeds} seeds" if seeds > 1 else "means over episodes"
    return (
        f"<section class='card verdict {verdict}'><strong>{_SAYS[verdict]}{share}</strong>"
        + "<div class='figures'>"
        + "".join(f"<div class='figure'><small>{escape(name)}</small>{value}</div>" for name, value in cells)
        + f"</div><small>{history}Returns are {over}, with 95 % bootstrap intervals.</small></section>"
    )


def _gaps(lines: Lines, target: float | None) -> str:
    """One row a judgement: what was promised, what was paid, and a bar as long as the gap between them."""
    every = [played for line in lines.values() for _, played in line]
    bounds = [number for r in every for number in (*r.imagined, *r.real)] + ([] if target is None else [target])
    ticks = _ticks([number for number in bounds if math.isfinite(number)])
    low, high = ticks[0], ticks[-1]

    def at(number: float) -> float:
        return 100 * (min(max(number, low), high) - low) / (high - low)

    def stretch(a: float, b: float) -> str:
        return f"left:{at(min(a, b)):.2f}%;width:{abs(at(b) - at(a)):.2f}%"

    goal = "" if target is None else f"<i class='goal' style='left:{at(target):.2f}%'></i>"
    rows: list[str] = []
    for seed, line in lines.items():
        for i, (what, played) in enumerate(line):
            promised, paid, verdict = played.imagined, played.real, played.verdict
            name = f"seed {seed} · {what}" if len(lines) > 1 else what
            spans = "".join(
                f"<i class='span {kind}' style='{stretch(e.low, e.high)}'></i>"
                f"<i class='dot {kind}' style='left:{at(e.value):.2f}%'></i>"
                for kind, e in (("imagined", promised), ("real", paid))
            )
            rows.append(
                f"<div class='row{' first' if i == 0 and rows else ''}'><div class='label'>{name}<br>"
                f"<small>{played.real_steps:,} real steps</small></div>"
                f"<div class='track'>{goal}<i class='bar {verdict}' style='{stretch(promised.value, paid.value)}'></i>"
                f"{spans}</div><span class='chip {verdict}'>{verdict} {_signed(played.gap.value)}</span></div>"
            )
    scale = "".join(f"<span style='left:{at(tick):.2f}%'>{_number(tick)}</span>" for tick in ticks)
    aim = "" if target is None else f"<span><i class='goal'></i>target {_number(target)}</span>"
    return (
        "<div class='card'>"
        + "".join(rows)
        + f"<div class='row axis'><div class='label'></div><div class='track ticks'>{scale}</div><span></span></div>"
        + "<div class='legend'><span><i class='dot imagined'></i>imagined return</span>"
        + "<span><i class='dot real'></i>real return</span>"
        + "<span><i class='bar unclear'></i>gap, coloured by verdict</span>"
        + f"{aim}<span>lines: 95 % bootstrap intervals</span></div></div>"
    )


def _rounds(lines: Lines) -> str:
    head = (
        "seed, judged on",
        "real steps",
        "imagined return",
        "real return",
        "gap",
        "model error",
        "break-even",
        "untrusted",
    )
    rows = []
    for seed, line in lines.items():
        for what, played in line:
            error = "–"
            if played.model_error is not None:
                error = f"{_number(played.model_error)}<small>σ after {played.model_error_horizon} steps</small>"
            even = "–" if played.model_error is None else "not reached"
            if played.break_even_horizon is not None:
                even = _count(played.break_even_horizon, "step")
            rows.append(
                (
                    f"{seed}, {what}",
                    f"{played.real_steps:,}",
                    _cell(played.imagined),
                    _cell(played.real),
                    _cell(played.gap, signed=True),
                    error,
                    even,
                    "–" if played.untrusted_share is None else f"{played.untrusted_share:.2%}",
                    f"<span class='chip {played.verdict}'>{played.verdict}</span>",
                )
            )
    return _card(_table((*head, "verdict"), rows))


def _fidelity(name: str, fidelity: Fidelity) -> str:
    mark = fidelity.break_even_horizon
    when = (
        f"better than “nothing changes” at all {_count(fidelity.horizon, 'step')} measured"
        if mark is None
        else f"no better than “nothing changes” after {_count(mark, 'step')} for the first time"
    )
    constant = [label for label, scale in zip(fidelity.names, fidelity.scale, strict=True) if scale == 0]
    left_out = f" Constant columns left out: {escape(', '.join(constant))}." if constant else ""
    measured = _count(int(fidelity.windows[0]), "window")
    return (
        f"<h3>On {escape(name)}</h3><p class='soft'>The model is {when}. Measured on {measured}."
        f"{left_out}</p><div class='grid'><div class='stack'>"
        + _plot("Error of all columns together", figures.error_against_horizon(fidelity))
        + _plot("Reward", figures.reward_error(fidelity))
        + "</div>"
        + _plot("Error column by column", figures.error_per_column(fidelity))
        + "</div>"
    )


def _calibration(name: str, calibration: Calibration) -> str:
    coverage = figures.coverage_against_horizon(calibration) if len(calibration.horizons) > 1 else ""
    rows = [
        (
            f"{horizon}",
            _number(calibration.mean_nll[i]),
            _number(calibration.mean_crps[i]),
            *(f"{coverage[i]:.1%}" for coverage in calibration.mean_coverage.values()),
            f"{calibration.mean_ece[i]:.3f}",
        )
        for i, horizon in enumerate(calibration.horizons)
    ]
    head = (
        "steps",
        "NLL (nats)",
        "CRPS (σ)",
        *(f"in {level:.0%} interval" for level in calibration.mean_coverage),
        "calibration error",
    )
    return (
        f"<h3>{escape(name)}</h3><p class='soft'>Judged: {escape(calibration.what)}, {calibration.rows:,} truths, "
        "averaged over columns.</p><div class='grid'>"
        + _plot("Where the truth fell (flat is calibrated, a U overconfident)", figures.pit_histograms(calibration))
        + _plot("Truths inside the intervals (dashed: promised)", coverage)
        + f"</div>{_card(_table(head, rows))}"
    )


def _accuracy(accuracy: Mapping[str, StepAccuracy]) -> str:
    if not accuracy:
        return ""
    rows = []
    for name, part in accuracy.items():
        cells = part.termination
        ends = int(cells.true_positive + cells.false_negative)
        shares = (cells.precision, cells.recall, cells.balanced_accuracy)
        rows.append(
            (
                escape(name),
                f"{part.rows:,}",
                f"{_number(part.reward_rmse)}<small>spread {_number(part.reward_scale)}</small>",
                _signed(part.reward_bias),
                f"{ends:,}",
                *(_percent(float(share)) for share in shares),
            )
        )
    head = ("data", "rows", "reward error", "reward bias", "terminations", "precision", "recall", "balanced accuracy")
    return _card(_table(head, rows))


def _mismatch(mismatch: Mismatch | None) -> str:
    if mismatch is None:
        return ""
    rows = [("Pearson", _cell(mismatch.pearson)), ("Spearman", _cell(mismatch.spearman))]
    if mismatch.spearman_top is not None:
        rows.append(("Spearman, better half of the returns", _cell(mismatch.spearman_top)))
    return (
        f"<p class='soft'>Correlation of the held-out negative log-likelihood with the real return, {mismatch.models} "
        "models. Negative: a likelier model earns more.</p>" + _card(_table(("correlation", "value"), rows))
    )


def _curves(report: Report) -> str:
    plots = [_plot(title, figures.learning_curves(title, lines)) for title, lines in report.curves.items()]
    plots += [_plot(caption, _image(content, caption)) for caption, content in report.figures.items()]
    return f"<div class='grid'>{''.join(plots)}</div>" if plots else ""


def _config(report: Report) -> str:
    versions = _table(("package", "version"), [(escape(k), escape(v)) for k, v in report.versions.items()])
    text = escape(json.dumps(report.config, indent=2))
    config = f"<details><summary>Configuration</summary><pre>{text}</pre></details>" if report.config else ""
    return _card(f"{config}<details><summary>Versions</summary>{versions}</details>")


def _video(gif: bytes | None) -> str:
    return _card(_image(gif, "left imagined, right real")) if gif else ""


def _image(content: bytes, caption: str) -> str:
    kind = next((kind for magic, kind in _MAGIC.items() if content.startswith(magic)), None)
    if kind is None:
        raise ValueError(f"picture {caption!r} begins with {content[:8]!r}; allowed are PNG, GIF, JPEG and SVG files")
    return f"<img alt='{escape(caption)}' src='data:{kind};base64,{base64.b64encode(content).decode()}'>"


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>" if content else ""


def _plot(title: str, content: str) -> str:
    return _card(f"<h3>{escape(title)}</h3>{content}") if content else ""


def _card(content: str) -> str:
    return f"<div class='card'>{content}</div>"


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    titles = "".join(f"<th>{escape(title)}</th>" for title in head)
    lines = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class='scroll'><table><thead><tr>{titles}</tr></thead><tbody>{lines}</tbody></table></div>"


def _interval(estimate: Estimate, *, signed: bool = False) -> str:
    show = _signed if signed else _number
    return f"<b>{show(estimate.value)}</b><small>{_bounds(estimate, signed)}</small>"


def _cell(estimate: Estimate, *, signed: bool = False) -> str:
    show = _signed if signed else _number
    return f"{show(estimate.value)}<small>{_bounds(estimate, signed)}</small>"


def _bounds(estimate: Estimate, signed: bool) -> str:
    if not math.isfinite(estimate.low):
        return "no interval from one sample"
    show = _signed if signed else _number
    return f"{show(estimate.low)} … {show(estimate.high)}"


def _number(number: float) -> str:
    if not math.isfinite(number):
        return "∞" if number > 0 else "–"
    if number == 0 or 100 <= abs(number) < 1e7:
        return f"{number:,.0f}".replace("-", "−")
    return f"{number:.3g}".replace("-", "−")


def _signed(number: float) -> str:
    return ("+" if number > 0 else "") + _number(number)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' if number != 1 else ''}"


def _percent(share: float) -> str:
    return f"{share:.1%}" if math.isfinite(share) else "–"


def _ticks(numbers: list[float]) -> list[float]:
    """About five round numbers that enclose all others."""
    low, high = min(numbers), max(numbers)
    if low == high:
        low, high = low - max(1.0, abs(low) / 2), high + max(1.0, abs(high) / 2)
    raw = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.999)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [float(tick) * step for tick in np.arange(first, last + 1)]
