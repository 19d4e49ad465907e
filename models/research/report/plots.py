"""The report's plots as small PNGs; equal figures give equal bytes.

Colours are those of Okabe and Ito (2008), which can be told apart with any colour vision. Lines and markers differ as
well, so plots can be read in grey. Nothing is computed here: callers pass estimates and curves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from research.bootstrap import Estimate
from research.retrieval.estimates import has_interval, is_significant

COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D1F")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = ("-", "--", "-.", ":")
N_COLOURS = 128
STYLE = {
    "figure.dpi": 110,
    "font.family": "DejaVu Sans",  # part of matplotlib, so letters are the same on every machine
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Curve:
    """A model's learning curve on validation: step [c], seconds [c], and the metric [s,c] with one row per seed."""

    label: str
    step: np.ndarray
    seconds: np.ndarray
    metric: np.ndarray


def curves(path: Path, learning_curves: Sequence[Curve], ylabel: str) -> None:
    """The metric against seconds and against steps: the mean over seeds, with the range of the seeds shaded."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.4, 3.6), layout="constrained")
        by_time, by_step = figure.subplots(1, 2, sharey=True)
        for place, curve in enumerate(learning_curves):
            for axes, x in ((by_time, curve.seconds), (by_step, curve.step)):
                _curve(axes, x, curve, place)
        by_time.set(xlabel="seconds of training", ylabel=ylabel)
        by_step.set(xlabel="optimiser steps")
        by_step.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
        _save(figure, path)


def _curve(axes: Axes, x: np.ndarray, curve: Curve, place: int) -> None:
    colour = COLOURS[place % len(COLOURS)]
    style = {"linestyle": DASHES[place % len(DASHES)], "marker": MARKERS[place % len(MARKERS)], "markersize": 3.5}
    axes.plot(x, curve.metric.mean(axis=0), color=colour, label=curve.label, linewidth=1.4, **style)
    if len(curve.metric) > 1:
        low, high = curve.metric.min(axis=0), curve.metric.max(axis=0)
        axes.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)


def buckets(path: Path, names: Sequence[str], by_model: Mapping[str, Sequence[Estimate | None]], ylabel: str) -> None:
    """A metric by bucket: one marker with its interval per model (label -> one estimate per bucket)."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.4, 3.6), layout="constrained")
        axes = figure.subplots()
        width = 0.8 / max(1, len(by_model))
        for place, (label, estimates) in enumerate(by_model.items()):
            offset = (place - (len(by_model) - 1) / 2) * width
            known = [(x + offset, estimate) for x, estimate in enumerate(estimates) if estimate is not None]
            _points(axes, known, label, place)
        axes.set_xticks(range(len(names)), names)
        axes.set(xlabel="ratings of the target in training (test events)", ylabel=ylabel)
        axes.set_xlim(-0.5, len(names) - 0.5)
        axes.set_ylim(bottom=0)
        axes.grid(visible=False, axis="x")
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
        _save(figure, path)


def _points(axes: Axes, known: Sequence[tuple[float, Estimate]], label: str, place: int) -> None:
    if not known:
        return
    x = np.array([at for at, _ in known])
    value = np.array([estimate.value for _, estimate in known])
    style = {"color": COLOURS[place % len(COLOURS)], "marker": MARKERS[place % len(MARKERS)]}
    axes.errorbar(
        x, value, yerr=_bars([estimate for _, estimate in known]), label=label, linestyle="none", markersize=4, **style
    )


def forest(path: Path, differences: Mapping[str, Estimate], xlabel: str) -> None:
    """Differences with their intervals, one line each; markers are filled where p < .05."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 1.0 + 0.28 * len(differences)), layout="constrained")
        axes = figure.subplots()
        axes.axvline(0.0, color="#000000", linewidth=0.8)
        for row, estimate in enumerate(differences.values()):
            colour = COLOURS[0] if not is_significant(estimate) else COLOURS[1 if estimate.value > 0 else 2]
            fill = colour if is_significant(estimate) else "white"
            axes.errorbar(
                [estimate.value], [row], xerr=_bars([estimate]), color=colour, marker="o", markerfacecolor=fill
            )
        axes.set_yticks(range(len(differences)), list(differences))
        axes.set_ylim(len(differences) - 0.5, -0.5)
        axes.set(xlabel=xlabel)
        axes.grid(visible=False, axis="y")
        _save(figure, path)


def _bars(estimates: Sequence[Estimate]) -> np.ndarray:
    """[2,n] lengths below and above each estimate; 0 where the interval cannot be trusted."""
    bars = [
        (max(0.0, e.value - e.low), max(0.0, e.high - e.value)) if has_interval(e) else (0.0, 0.0) for e in estimates
    ]
    return np.array(bars).T


def _save(figure: Figure, path: Path) -> None:
    """Saves a PNG with a palette, a third of the size of true colour, without date and version."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.quantize(N_COLOURS, dither=Image.Dither.NONE).save(path, "PNG")
