"""Curves: accuracy over steps, radius, draws or a parameter of the defence, and bands of mean, minimum and maximum.

The paper's protocol and the honest one stand side by side on one scale; printed values are hollow and dashed.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis.reporting import figure_style as style
from analysis.reproduction.outcome import Reading
from analysis.reproduction.view import CellView, ItemView, Kind

_MANY_CURVES = 4
_MANY_TICKS = 21
_WRAP = 46


@dataclass(frozen=True)
class Curve:
    """One curve: its name and, point by point, where it is and which cell it shows."""

    name: str
    points: tuple[tuple[float, CellView], ...]


def draw_lines(view: ItemView) -> Figure:
    """Draw each row, or each column, as a curve over the other side's x."""
    curves = curves_of(view)
    kinds = panels_of(view)
    figure, panels = _panels(view, kinds, len(curves))
    for axes, kind in zip(panels, kinds, strict=True):
        for place, curve in enumerate(curves):
            _line(axes, curve, kind, place, 0.13 if len(curves) < _MANY_CURVES else 0.06)
            if kind == "paper":
                _printed(axes, curve, place)
        _dress(axes, view, kind, curves)
    panels[0].set_ylabel(_value_label(view))
    _limits(panels[0], view)
    _legend(figure, curves, view)
    return figure


def draw_bands(view: ItemView) -> Figure:
    """Draw each row as its mean over x, between its minimum and its maximum: columns are grouped into `mean`, `minimum`, `maximum`."""
    item = view.item
    figure = style.new_figure(style.COLUMN_WIDTH * 1.5, 2.9)
    axes = figure.subplots()
    means: list[Curve] = []
    for place, row in enumerate(item.rows):
        by_group = {
            group: [(column.x, cell) for column in item.columns if column.group == group and (cell := view.cell(row.key, column.key))]
            for group in ("mean", "minimum", "maximum")
        }
        mean = Curve(row.label, tuple((x, cell) for x, cell in by_group["mean"] if x is not None))
        low = {x: _value(cell.paper) for x, cell in by_group["minimum"]}
        high = {x: _value(cell.paper) for x, cell in by_group["maximum"]}
        x = [x for x, _ in mean.points]
        axes.fill_between(
            x,
            [low.get(each, math.nan) for each in x],
            [high.get(each, math.nan) for each in x],
            color=style.color_of(place),
            alpha=0.15,
            linewidth=0,
        )
        _line(axes, mean, "paper", place, 0.0)
        _printed(axes, mean, place)
        means.append(mean)
    _dress(axes, view, "paper", means)
    axes.set_title("mean, and band from minimum to maximum over the pairs", loc="left", color="#333333")
    axes.set_ylabel(_value_label(view))
    _limits(axes, view)
    _legend(figure, means, view)
    return figure


def curves_of(view: ItemView) -> list[Curve]:
    """Return the curves of an item: rows over the columns' x, or columns over the rows' x."""
    item = view.item
    assert item.figure is not None
    curves = []
    if item.figure.curves == "rows":
        for row in item.rows:
            cells = [(column.x, view.cell(row.key, column.key)) for column in item.columns]
            name = f"{row.label} (not in the paper)" if row.extra else row.label
            curves.append(Curve(name, tuple((x, cell) for x, cell in cells if x is not None and cell is not None)))
        return curves
    for column in item.columns:
        cells = [(row.x, view.cell(row.key, column.key)) for row in item.rows]
        points = sorted(((x, cell) for x, cell in cells if x is not None and cell is not None), key=lambda point: point[0])
        curves.append(Curve(column.label, tuple(points)))
    return curves


def panels_of(view: ItemView) -> tuple[Kind, ...]:
    """Return what gets a panel: the paper's protocol, and beside it the honest one, if anything of it was measured."""
    measured = any(cell.honest is not None for cell in view.cells())
    return ("paper", "honest") if "honest" in view.kinds and measured else ("paper",)


def panel_title(kind: Kind, view: ItemView) -> str:
    """Return what stands above a panel."""
    if view.outcome is None:
        return ""
    return {"paper": "paper's protocol", "honest": "honest protocol"}.get(kind, "") if len(panels_of(view)) > 1 else ""


def reading_for(cell: CellView, kind: Kind) -> Reading | None:
    """Return what a panel shows of a cell; the honest one shows a number that is the same under every protocol too."""
    if kind == "honest" and cell.same:
        return cell.paper
    return cell.honest if kind == "honest" else cell.paper


def _panels(view: ItemView, kinds: Sequence[Kind], num_curves: int) -> tuple[Figure, list[Any]]:
    assert view.item.figure is not None
    lines = math.ceil(num_curves / (4 if len(kinds) > 1 else 3)) + len(textwrap.wrap(view.item.figure.x_label, _WRAP))
    width = style.PAGE_WIDTH if len(kinds) > 1 else style.COLUMN_WIDTH * 1.3
    figure = style.new_figure(width, 2.2 + 0.17 * lines)
    panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    return figure, list(panels)


def _line(axes: Any, curve: Curve, kind: Kind, place: int, band: float) -> None:
    color = style.color_of(place)
    readings = [(x, reading_for(cell, kind)) for x, cell in curve.points]
    if not any(reading is not None for _, reading in readings):
        return
    x, y = [x for x, _ in readings], [_value(reading) for _, reading in readings]
    # Gaps stay gaps: a line across them would look measured.
    axes.plot(x, y, color=color, linestyle=style.line_of(place), marker=style.marker_of(place), zorder=3)
    low = [reading.low if reading is not None and reading.low is not None else math.nan for _, reading in readings]
    high = [reading.high if reading is not None and reading.high is not None else math.nan for _, reading in readings]
    if band:
        axes.fill_between(x, low, high, color=color, alpha=band, linewidth=0)
    wrong = [(x, reading.value) for x, reading in readings if reading is not None and reading.failed_checks and reading.value is not None]
    if wrong:
        axes.plot(*zip(*wrong, strict=True), linestyle="", marker="x", markersize=7, markeredgewidth=1.6, color=style.SUSPICIOUS, zorder=4)


def _printed(axes: Any, curve: Curve, place: int) -> None:
    points = [(x, cell.cell.published.value) for x, cell in curve.points if cell.cell.published is not None]
    if points:
        axes.plot(
            *zip(*points, strict=True),
            color=style.color_of(place),
            linestyle=(0, (2, 2)),
            linewidth=0.8,
            marker=style.marker_of(place),
            markersize=7,
            markerfacecolor="none",
            markeredgewidth=1.2,
            zorder=5,
        )


def _dress(axes: Any, view: ItemView, kind: Kind, curves: Sequence[Curve]) -> None:
    assert view.item.figure is not None
    axes.set_title(panel_title(kind, view), loc="left", color="#333333")
    axes.set_xlabel(textwrap.fill(view.item.figure.x_label, _WRAP))
    places = sorted({x for curve in curves for x, _ in curve.points})
    if places and len(places) <= _MANY_TICKS and all(x == int(x) for x in places):
        # Sweeps name few values: ticks stand where something was measured.
        axes.set_xticks(places, [f"{x:g}" for x in places])


def _value_label(view: ItemView) -> str:
    assert view.item.figure is not None
    label = view.item.figure.y_label
    return f"{label} in %" if all(column.unit == "%" for column in view.item.columns) else label


def _limits(axes: Any, view: ItemView) -> None:
    values = [value for cell in view.cells() for reading in cell.readings for value in (reading.value, reading.low, reading.high)]
    values += [cell.cell.published.value for cell in view.cells() if cell.cell.published is not None]
    shown = [value for value in values if value is not None and math.isfinite(value)]
    if shown and all(column.unit == "%" for column in view.item.columns):
        # A change of a point must not look like a cliff.
        middle, half = (min(shown) + max(shown)) / 2, max((max(shown) - min(shown)) / 2 * 1.08, 8)
        axes.set_ylim(max(middle - half, -2), min(middle + half, 102))


def _legend(figure: Figure, curves: Sequence[Curve], view: ItemView) -> None:
    handles = [
        Line2D([], [], color=style.color_of(place), linestyle=style.line_of(place), marker=style.marker_of(place), label=curve.name)
        for place, curve in enumerate(curves)
        if any(cell.readings or cell.printed for _, cell in curve.points)
    ]
    if any(cell.printed for cell in view.cells()):
        handles.append(
            Line2D(
                *([], []),
                color=style.PRINTED,
                linestyle=(0, (2, 2)),
                linewidth=0.8,
                marker="o",
                markersize=6,
                markerfacecolor="none",
                label="printed in the paper",
            )
        )
    if any(reading.failed_checks for cell in view.cells() for reading in cell.readings):
        handles.append(Line2D([], [], color=style.SUSPICIOUS, linestyle="", marker="x", markersize=7, label="a check failed"))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(4 if figure.get_figwidth() > 5 else 3, len(handles)))


def _value(reading: Reading | None) -> float:
    return reading.value if reading is not None and reading.value is not None else math.nan
