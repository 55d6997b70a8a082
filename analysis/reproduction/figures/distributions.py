"""Distributions: a box per trained network, and histograms laid over one another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from analysis.reporting import figure_style as style
from analysis.reproduction.outcome import Reading
from analysis.reproduction.papers.model import Column, Row
from analysis.reproduction.view import ItemView, finite

_WIDE_RANGE = 30
_BINS = 40


def draw_boxes(view: ItemView) -> Figure:
    """Draw a lying box per row: quartiles, whiskers from the 1st to the 99th percentile, ticks at the extremes; groups by colour."""
    item = view.item
    assert item.figure is not None
    rows = list(item.rows)
    groups = list(dict.fromkeys(row.group for row in rows))
    figure = style.new_figure(style.COLUMN_WIDTH * 1.5, 1.0 + 0.27 * len(rows))
    axes = figure.subplots()
    seen: list[np.ndarray] = []
    for place, row in enumerate(rows):
        cell = view.cell(row.key, item.columns[0].key)
        values = _values(cell.paper if cell is not None else None)
        color = style.color_of(groups.index(row.group))
        if not len(values):
            axes.text(0.01, place, cell.reason if cell is not None else "", transform=axes.get_yaxis_transform(), va="center", fontsize=6.5)
            continue
        seen.append(values)
        axes.boxplot(
            [values],
            positions=[place],
            orientation="horizontal",
            widths=0.6,
            whis=(1, 99),
            showfliers=False,
            patch_artist=True,
            manage_ticks=False,
            boxprops={"facecolor": color, "alpha": 0.45, "linewidth": 0.7},
            medianprops={"color": "black", "linewidth": 1.2},
            whiskerprops={"color": color},
            capprops={"color": color},
        )
        axes.plot([values.min(), values.max()], [place, place], linestyle="", marker="|", markersize=6, color=color)
    together = np.concatenate(seen) if seen else np.array([])
    if len(together) and together.min() > 0 and together.max() / together.min() > _WIDE_RANGE:
        axes.set_xscale("log")
    names = [f"{row.x:g}  {row.label}" if row.x is not None and row.label != f"{row.x:g}" else row.label for row in rows]
    axes.set_yticks(range(len(rows)), names)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    # The paper's vertical axis lies here, so that names can be read.
    axes.set_xlabel(item.figure.y_label)
    axes.set_ylabel(item.figure.x_label)
    handles = [Patch(facecolor=style.color_of(place), alpha=0.45, label=group) for place, group in enumerate(groups) if group]
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return figure


def draw_histograms(view: ItemView) -> Figure:
    """Draw the curves (rows or columns) over one another, in a panel per entry of the other side; all on the same bins."""
    item = view.item
    assert item.figure is not None
    by_rows = item.figure.curves == "rows"
    curves: Sequence[Row | Column] = item.rows if by_rows else item.columns
    panels: Sequence[Row | Column] = item.columns if by_rows else item.rows
    values = {
        (curve.key, panel.key): _values(cell.paper if cell is not None else None)
        for curve in curves
        for panel in panels
        if curve.key != panel.key  # a network's gradient has a cosine of 1 with itself, which would dwarf the rest
        for cell in [view.cell(curve.key, panel.key) if by_rows else view.cell(panel.key, curve.key)]
    }
    edges = _edges(np.concatenate([np.array([]), *values.values()]))
    across = min(len(panels), 3)
    down = -(-len(panels) // across)
    figure = style.new_figure(style.COLUMN_WIDTH * 1.3 if across == 1 else style.PAGE_WIDTH, 0.5 + 1.7 * down + (0.3 if across == 1 else 0))
    grid = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True)
    for axes, panel in zip(grid.ravel(), panels, strict=False):
        for place, curve in enumerate(curves):
            _histogram(axes, values.get((curve.key, panel.key), np.array([])), edges, place)
        itself = any(curve.key == panel.key for curve in curves)
        axes.set_title(f"{panel.label} (itself left out)" if itself else panel.label if len(panels) > 1 else "", loc="left")
    for axes in grid.ravel()[len(panels) :]:
        axes.remove()
    for axes in grid[:, 0]:
        axes.set_ylabel(item.figure.y_label)
    for axes in grid.ravel()[max(len(panels) - across, 0) : len(panels)]:
        axes.set_xlabel(item.figure.x_label)
        axes.tick_params(labelbottom=True)
    handles = [
        Patch(facecolor=style.color_of(place), alpha=0.5, edgecolor=style.color_of(place), label=curve.label)
        for place, curve in enumerate(curves)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 6))
    return figure


def _histogram(axes: Any, values: np.ndarray, edges: np.ndarray, place: int) -> None:
    if not len(values):
        return
    color = style.color_of(place)
    axes.hist(values, bins=edges, histtype="stepfilled", color=color, alpha=0.18)
    axes.hist(values, bins=edges, histtype="step", color=color, linestyle=style.line_of(place), linewidth=1.1)


def _edges(values: np.ndarray) -> np.ndarray:
    low, high = (float(values.min()), float(values.max())) if len(values) else (-1.0, 1.0)
    # Identical gradients have a cosine of 1; a little room keeps them in view.
    room = max((high - low) * 0.02, 1e-6 * max(abs(low), abs(high), 1.0))
    return np.linspace(low - room, high + room, _BINS + 1)


def _values(reading: Reading | None) -> np.ndarray:
    return finite(reading.series.get("values", [])) if reading is not None else np.array([])
