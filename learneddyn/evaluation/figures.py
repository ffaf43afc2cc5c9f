"""The report's plots, as inline SVG that takes its ink from the page (``currentColor``), so it reads in light and dark.

Built on matplotlib's Figure objects: no pyplot, no figure outlives its function.
"""

import io
import re
from collections.abc import Mapping
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from learneddyn.evaluation.calibration import Calibration
from learneddyn.evaluation.fidelity import Fidelity

MODEL, PERSISTENCE, REAL = "#e07a2f", "#8a94a6", "#2f7fd1"
SERIES = ("#2f7fd1", "#e07a2f", "#2a9d77", "#b05bc0", "#c9495a", "#8f8420", "#5b6ee1", "#5e8fa3")
_INK = "#010203"
_TOO_MANY = 12
Curve = tuple[Any, Any]


def error_against_horizon(fidelity: Fidelity) -> str:
    """Plot the overall error and that of persistence, and mark the break-even horizon."""
    figure, [axes] = _figure(1)
    steps = np.arange(1, fidelity.horizon + 1)
    _error_lines(axes, steps, fidelity.overall, fidelity.persistence_overall, fidelity.break_even_horizon)
    _label(axes, "steps imagined without looking", "error / std of the data")
    _legend(axes)
    return svg(figure)


def error_per_column(fidelity: Fidelity) -> str:
    """Plot every varying column by itself, or, where they are many, the ratio to persistence as a map."""
    shown = [i for i, scale in enumerate(fidelity.scale) if scale > 0]
    steps = np.arange(1, fidelity.horizon + 1)
    if not shown:
        return ""
    if len(shown) > _TOO_MANY:
        return _error_map(fidelity, shown)
    figure, panels = _figure(len(shown), height=1.5)
    for axes, i in zip(panels, shown, strict=False):
        mark = fidelity.break_even[i]
        _error_lines(axes, steps, fidelity.error[:, i], fidelity.persistence_error[:, i], mark)
        axes.set_title(fidelity.names[i], fontsize=8, color=_INK, pad=3)
    return svg(figure)


def reward_error(fidelity: Fidelity) -> str:
    """Plot the reward error against horizon, beside the spread of the logged reward."""
    figure, [axes] = _figure(1)
    steps = np.arange(1, fidelity.horizon + 1)
    axes.plot(steps, _drawable(fidelity.reward_rmse), color=MODEL, label="reward error (rms)")
    axes.axhline(fidelity.reward_scale, color=PERSISTENCE, linestyle="--", label="spread of the logged reward")
    _label(axes, "steps imagined without looking", "reward units")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    _legend(axes)
    return svg(figure)


def pit_histograms(calibration: Calibration) -> str:
    """Plot where the truth fell in the predictive distribution: flat is calibrated, a U is overconfident."""
    picks = np.unique(np.linspace(0, len(calibration.horizons) - 1, 4).round().astype(int))
    figure, panels = _figure(len(picks), height=1.5)
    for axes, i in zip(panels, picks, strict=False):
        counts = calibration.pit[i]
        share = counts / max(1, counts.sum()) * len(counts)
        axes.bar((np.arange(len(counts)) + 0.5) / len(counts), share, width=0.9 / len(counts), color=MODEL)
        axes.axhline(1.0, color=PERSISTENCE, linestyle="--", linewidth=1)
        axes.set_title(
            f"{calibration.horizons[i]} step{'s' * (calibration.horizons[i] > 1)}", fontsize=8, color=_INK, pad=3
        )
        axes.set_yticks([0, 1])
        axes.set_ylim(0, max(2.0, float(share.max()) * 1.05))
        axes.set_xticks([0, 0.5, 1])
    return svg(figure)


def coverage_against_horizon(calibration: Calibration) -> str:
    """Plot how often the central intervals hold the truth, beside what they promise."""
    figure, [axes] = _figure(1)
    for color, (level, coverage) in zip(SERIES, calibration.mean_coverage.items(), strict=False):
        axes.plot(calibration.horizons, _drawable(coverage), "o-", color=color, label=f"{level:.0%} interval")
        axes.axhline(level, color=color, linestyle="--", linewidth=1, alpha=0.6)
    axes.set_ylim(0, 1.03)
    axes.set_xscale("log")
    axes.set_xticks(calibration.horizons, [str(h) for h in calibration.horizons])
    axes.minorticks_off()
    _label(axes, "steps ahead", "share of truths inside")
    _legend(axes)
    return svg(figure)


def learning_curves(name: str, curves: Mapping[str, Curve], x_label: str = "steps") -> str:
    """Plot named curves ``(x, y)`` on one pair of axes."""
    figure, [axes] = _figure(1)
    for color, (label, (x, y)) in zip(SERIES * (1 + len(curves) // len(SERIES)), curves.items(), strict=False):
        axes.plot(x, _drawable(np.asarray(y, dtype=float)), color=color, label=label, linewidth=1.4)
    _label(axes, x_label, name)
    _legend(axes)
    return svg(figure)


def svg(figure: Figure) -> str:
    """Return a figure as one inline ``<svg>``: no XML header, no outside address, ink from the page."""
    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "learneddyn"}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    body = text.getvalue()
    body = body[body.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r' xmlns(:\w+)?="[^"]*"', "", body)
    body = re.sub(r'<g id="[a-zA-Z0-9_.]+_\d+">', "<g>", body)
    body = re.sub(r'<svg height="[^"]*"', "<svg", re.sub(r' (width|height)="[\d.]+pt"', "", body, count=2), count=1)
    return body.replace(_INK, "currentColor").replace("<svg", '<svg role="img"', 1)


def _figure(panels: int, *, height: float = 2.5) -> tuple[Figure, list[Axes]]:
    """Panels in two columns, or one alone, at the width of a phone."""
    columns = min(panels, 2)
    rows = -(-panels // columns)
    figure = Figure(figsize=(4.0, height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = [figure.add_subplot(rows, columns, i + 1) for i in range(panels)]
    for each in axes:
        each.tick_params(colors=_INK, labelsize=7, length=2, width=0.6)
        each.grid(True, color=PERSISTENCE, alpha=0.25, linewidth=0.5)
        each.set_axisbelow(True)
        for side, spine in each.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(PERSISTENCE)
            spine.set_linewidth(0.6)
    return figure, axes


def _error_lines(axes: Axes, steps: np.ndarray, model: np.ndarray, still: np.ndarray, mark: int | None) -> None:
    axes.plot(
        steps, _drawable(still), color=PERSISTENCE, linestyle="--", linewidth=1.4, label="persistence (no change)"
    )
    axes.plot(
        steps, _drawable(model), color=MODEL, linewidth=1.8, label="model", marker="o" if len(steps) == 1 else None
    )
    if mark is not None:
        axes.axvline(mark, color="#d8495c", linewidth=1.4, linestyle=":", label=f"break-even at {mark}")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    errors, still = _drawable(model), _drawable(still)
    highest = float(np.nanmax(np.concatenate([errors, still]), initial=0.0))
    # A model that runs away would flatten everything else: cut it, but never out of the picture.
    middle = float(np.nanmedian(errors)) if np.isfinite(errors).any() else 0.0
    top = max(3 * float(np.nanmax(still, initial=0.0)), 1.5 * middle)
    axes.set_ylim(0, max(1e-9, min(highest, top)) * 1.08)


def _error_map(fidelity: Fidelity, shown: list[int]) -> str:
    """Colour every (column, horizon) by error over persistence: 1 is break-even."""
    figure = Figure(figsize=(4.0, max(2.4, 0.16 * len(shown) + 0.9)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(1, 1, 1)
    still = fidelity.persistence_error[:, shown]
    ratio = np.divide(fidelity.error[:, shown], still, out=np.full(still.shape, np.nan), where=still > 0)
    ratio = np.where(np.isinf(ratio), 2.0, ratio)
    image = axes.imshow(ratio.T, aspect="auto", cmap="RdYlBu_r", vmin=0, vmax=2, interpolation="nearest")
    image.set_extent((0.5, fidelity.horizon + 0.5, len(shown) - 0.5, -0.5))
    every = max(1, len(shown) // 20)
    axes.set_yticks(range(0, len(shown), every), [fidelity.names[i] for i in shown[::every]])
    axes.tick_params(colors=_INK, labelsize=6, length=2, width=0.6)
    bar = figure.colorbar(image, ax=axes, shrink=0.8)
    bar.ax.tick_params(colors=_INK, labelsize=6)
    bar.set_label("error / persistence (1: break-even)", fontsize=7, color=_INK)
    axes.set_xlabel("steps imagined without looking", fontsize=8, color=_INK)
    return svg(figure)


def _label(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x, fontsize=8, color=_INK)
    axes.set_ylabel(y, fontsize=8, color=_INK)


def _legend(axes: Axes) -> None:
    legend = axes.legend(fontsize=7, frameon=False, labelcolor=_INK)
    legend.set_in_layout(False)


def _drawable(numbers: Any) -> np.ndarray:
    values = np.asarray(numbers, dtype=float)
    return np.where(np.isfinite(values), values, np.nan)
