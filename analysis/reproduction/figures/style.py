"""How figures look: one style for screen and print, colours that colour-blind readers tell apart, and the mark of reduced scales.

Figures are made without pyplot, so that nothing global is left behind: settings hold inside `style()` only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from mpl_toolkits.mplot3d import Axes3D

from analysis.reproduction.scale import Scale
from analysis.reproduction.view import NOT_RUN, ItemView

COLUMN_WIDTH, PAGE_WIDTH = 3.4, 6.9
"""Inches of one column and of a page."""

# Okabe and Ito, without yellow, which does not show on white.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1, 1, 1)), (0, (1, 1)))
PRINTED = "#555555"
SUSPICIOUS = "#B00020"
SCALE_COLORS: dict[Scale, str] = {"smoke": "#B00020", "short": "#8A5A00", "paper": "#00664F"}

_IN_FRONT = 10_000  # surfaces get their order from their distance to the eye

_SETTINGS: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "legend.handlelength": 2.2,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.5,
    "axes.axisbelow": True,
    "lines.linewidth": 1.3,
    "lines.markersize": 3.8,
    "hatch.linewidth": 0.6,
    "pdf.fonttype": 42,
    "svg.hashsalt": "rayndom",
}


@contextmanager
def style() -> Iterator[None]:
    """Settings of figures, in force inside only; making and saving both need them."""
    with mpl.rc_context(_SETTINGS):
        yield


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of a size in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def scale_text(view: ItemView) -> str:
    """Return what is written across a figure of a reduced scale; empty at paper scale, and where nothing was run."""
    if view.scale in (None, "paper"):
        return ""
    counts = sorted({reading.num_samples for cell in view.cells() for reading in cell.readings if reading.num_samples is not None})
    samples = f", n = {counts[0]}" if len(counts) == 1 else f", n = {counts[0]} to {counts[-1]}" if counts else ""
    return f"{view.scale} scale{samples}"


def watermark(figure: Figure, view: ItemView) -> None:
    """Write a reduced scale across every pair of axes and above the figure, so that no crop of it passes for a full-scale one."""
    text = scale_text(view)
    if not text:
        if view.scale is None:
            figure.suptitle(f"printed values; {NOT_RUN}", fontsize=7, color=PRINTED, ha="right", x=0.99)
        return
    color = SCALE_COLORS[view.scale or "smoke"]
    for axes in figure.axes:
        if axes.get_label() == "<colorbar>":
            continue
        place = axes.text2D if isinstance(axes, Axes3D) else axes.text
        place(
            *(0.5, 0.5, f"{view.scale} scale"),
            transform=axes.transAxes,
            ha="center",
            va="center",
            rotation=28,
            color=color,
            alpha=0.22,
            fontsize=16,
            fontweight="bold",
            zorder=_IN_FRONT if isinstance(axes, Axes3D) else 5,
            path_effects=[withStroke(linewidth=2.5, foreground="white", alpha=0.35)],  # dark maps would swallow it
        )
    figure.suptitle(text, fontsize=7, color=color, fontweight="bold", ha="right", x=0.99)


def color_of(place: int) -> str:
    """Return the colour of a curve; after the last one they begin again, with another line."""
    return COLORS[place % len(COLORS)]


def line_of(place: int) -> Any:
    """Return the line style of a curve."""
    return LINES[(place + place // len(COLORS)) % len(LINES)]


def marker_of(place: int) -> str:
    """Return the marker of a curve."""
    return MARKERS[(place + place // len(COLORS)) % len(MARKERS)]
