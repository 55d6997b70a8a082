"""Bars: rows beside one another, a bar per column; quantities of another unit have a panel of their own."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from analysis.reporting import figure_style as style
from analysis.reproduction.figures.curves import panels_of
from analysis.reproduction.papers.model import Column
from analysis.reproduction.view import CellView, ItemView

_WIDTH = 0.8


def draw_bars(view: ItemView) -> Figure:
    """Draw a group of bars per row; hatched: the honest counterpart, hollow: printed in the paper."""
    item = view.item
    by_unit: dict[str, list[Column]] = {}
    for column in item.columns:
        by_unit.setdefault(column.unit, []).append(column)
    widths = [len(columns) for columns in by_unit.values()]
    figure = style.new_figure(min(style.PAGE_WIDTH, 1.2 + 0.55 * len(item.rows) * sum(widths)), 2.6)
    panels = figure.subplots(1, len(by_unit), squeeze=False, width_ratios=[0.5 + width for width in widths])[0]
    honest = "honest" in panels_of(view)
    for axes, (unit, columns) in zip(panels, by_unit.items(), strict=True):
        _panel(axes, view, columns, honest)
        axes.set_ylabel("accuracy in %" if unit == "%" else ", ".join(column.label for column in columns) + (f" in {unit}" if unit else ""))
        axes.axhline(0, color="black", linewidth=0.6)
        if unit == "%":
            axes.set_ylim(0, 102)
    handles = [
        Patch(facecolor=style.color_of(place), alpha=0.75, label=column.label)
        for place, column in enumerate(item.columns)
        if len(item.columns) > 1
    ]
    if honest:
        handles.append(Patch(facecolor="white", edgecolor="#444444", hatch="////", label="honest protocol"))
    if any(cell.printed for cell in view.cells()):
        handles.append(Patch(facecolor="white", edgecolor=style.PRINTED, linestyle="--", label="printed in the paper"))
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 4))
    return figure


def _panel(axes: Any, view: ItemView, columns: list[Column], honest: bool) -> None:
    item = view.item
    slots = [(column, kind) for column in columns for kind in (("paper", "honest") if honest and _has_honest(view, column) else ("paper",))]
    width = _WIDTH / len(slots)
    for group, row in enumerate(item.rows):
        for slot, (column, kind) in enumerate(slots):
            cell = view.cell(row.key, column.key)
            if cell is not None:
                color = style.color_of(item.columns.index(column))
                _bar(axes, cell, kind, group + (slot + 0.5) * width - _WIDTH / 2, width, color)
    axes.set_xticks(range(len(item.rows)), [row.label for row in item.rows])
    axes.grid(axis="x", visible=False)


def _bar(axes: Any, cell: CellView, kind: str, x: float, width: float, color: str) -> None:
    reading = cell.honest if kind == "honest" else cell.paper
    if reading is not None and reading.value is not None:
        look = {"facecolor": "white", "edgecolor": color, "hatch": "////"} if kind == "honest" else {"facecolor": color, "alpha": 0.75}
        axes.bar([x], [reading.value], width=0.92 * width, linewidth=0.9, **look)
        if reading.low is not None and reading.high is not None:
            whiskers = [[max(reading.value - reading.low, 0)], [max(reading.high - reading.value, 0)]]
            axes.errorbar([x], [reading.value], yerr=whiskers, color="#222222", linewidth=0.9, capsize=1.5)
        if reading.failed_checks:
            axes.annotate("(!)", (x, reading.value), ha="center", va="bottom", color=style.SUSPICIOUS, fontsize=7)
    elif kind == "paper":
        axes.annotate("–", (x, 0), ha="center", va="bottom", color=style.PRINTED)
    if kind == "paper" and cell.cell.published is not None:
        axes.bar([x], [cell.cell.published.value], width=0.92 * width, facecolor="none", edgecolor=style.PRINTED, linestyle="--", zorder=4)


def _has_honest(view: ItemView, column: Column) -> bool:
    cells = [view.cell(row.key, column.key) for row in view.item.rows]
    return any(cell is not None and cell.honest is not None for cell in cells)
