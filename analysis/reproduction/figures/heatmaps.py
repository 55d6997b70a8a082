"""Heat-maps: transfer between networks (sources over targets), and accuracy over two parameters of a defence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from analysis.reporting import figure_style as style
from analysis.reproduction.figures.curves import panels_of, reading_for
from analysis.reproduction.papers.model import Column
from analysis.reproduction.sheet import Kind
from analysis.reproduction.view import CellView, ItemView, format_value

_MAP = "cividis"


@dataclass(frozen=True)
class _Grid:
    """Cells by place: `cells[y][x]`, None where the item has none."""

    title: str
    x_labels: tuple[str, ...]
    y_labels: tuple[str, ...]
    cells: tuple[tuple[CellView | None, ...], ...]


def draw_heatmaps(view: ItemView) -> Figure:
    """Draw a map per kind of number, and per column where rows are points of a plane."""
    item = view.item
    assert item.figure is not None
    kinds = panels_of(view)
    grids = [_matrix(view)] if item.figure.curves == "rows" else [_plane(view, column) for column in item.columns]
    wide, high = len(grids[0].x_labels), len(grids[0].y_labels)
    count = len(kinds) * len(grids)
    figure = style.new_figure(min(count * (0.9 + 0.55 * wide), style.PAGE_WIDTH) + 0.5, 1.1 + 0.42 * high)
    panels = figure.subplots(len(grids), len(kinds), squeeze=False)
    values = [reading.value for cell in view.cells() for reading in cell.readings if reading.value is not None]
    values += [cell.cell.published.value for cell in view.cells() if cell.cell.published is not None]
    low, top = (min(values), max(values)) if values else (0.0, 100.0)
    for grid, row in zip(grids, panels, strict=True):
        for kind, axes in zip(kinds, row, strict=True):
            image = _map(axes, grid, kind, low, max(top, low + 1e-9))
            title = {"paper": "paper's protocol", "honest": "honest protocol"}[kind] if len(kinds) > 1 else ""
            axes.set_title(": ".join(filter(None, (grid.title, title))), loc="left", color="#333333")
            axes.set_xlabel(item.figure.x_label)
        row[0].set_ylabel(item.figure.y_label)
    if view.outcome is not None:
        bar = figure.colorbar(image, ax=panels.ravel().tolist(), shrink=0.9, pad=0.02)
        bar.set_label("accuracy in %" if all(column.unit == "%" for column in item.columns) else "")
        bar.outline.set_linewidth(0.5)
    if any(cell.printed for cell in view.cells()):
        figure.supxlabel("in parentheses: printed in the paper", fontsize=7, color=style.PRINTED)
    return figure


def _matrix(view: ItemView) -> _Grid:
    item = view.item
    cells = tuple(tuple(view.cell(row.key, column.key) for column in item.columns) for row in item.rows)
    return _Grid("", tuple(column.label for column in item.columns), tuple(row.label for row in item.rows), cells)


def _plane(view: ItemView, column: Column) -> _Grid:
    item = view.item
    rows = {(row.x, row.y): row for row in item.rows}
    x_values = sorted({row.x for row in item.rows if row.x is not None})
    y_values = sorted({row.y for row in item.rows if row.y is not None}, reverse=True)
    cells = tuple(
        tuple(view.cell(row.key, column.key) if (row := rows.get((x, y))) is not None else None for x in x_values) for y in y_values
    )
    title = column.label if len(item.columns) > 1 else ""
    return _Grid(title, tuple(f"{x:g}" for x in x_values), tuple(f"{y:g}" for y in y_values), cells)


def _map(axes: Any, grid: _Grid, kind: Kind, low: float, top: float) -> Any:
    values = np.full((len(grid.y_labels), len(grid.x_labels)), np.nan)
    for y, line in enumerate(grid.cells):
        for x, cell in enumerate(line):
            reading = reading_for(cell, kind) if cell is not None else None
            if reading is not None and reading.value is not None:
                values[y, x] = reading.value
    image = axes.imshow(np.ma.masked_invalid(values), cmap=_MAP, vmin=low, vmax=top, aspect="auto")
    axes.set_facecolor("#F2F2F2")
    axes.set_xticks(range(len(grid.x_labels)), grid.x_labels)
    axes.set_yticks(range(len(grid.y_labels)), grid.y_labels)
    axes.grid(False)
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    for y, line in enumerate(grid.cells):
        for x, cell in enumerate(line):
            _number(axes, x, y, cell, kind, (values[y, x] - low) / (top - low))
    return image


def _number(axes: Any, x: int, y: int, cell: CellView | None, kind: Kind, shade: float) -> None:
    if cell is None:
        axes.text(x, y, "·", ha="center", va="center", color="#999999", fontsize=7)
        return
    reading = reading_for(cell, kind)
    printed = f"({cell.printed})" if cell.printed and kind == "paper" else ""
    if reading is None or reading.value is None:
        axes.text(
            x,
            y,
            printed if cell.scale is None else "\n".join(filter(None, ("–", printed))),
            ha="center",
            va="center",
            color="#777777",
            fontsize=6.5,
        )
        return
    text = format_value(reading.value, cell.unit, cell.scale or "smoke") + (" (!)" if reading.failed_checks else "")
    color = "black" if shade > 0.55 else "white"
    axes.text(x, y, "\n".join(filter(None, (text, printed))), ha="center", va="center", color=color, fontsize=6.5, zorder=6)
