"""How the cells of an item are laid out as lines and columns: as in the paper for tables, along the x axis for curves."""

from __future__ import annotations

from dataclasses import dataclass

from analysis.reproduction.cells import CellView, ItemView
from analysis.reproduction.papers.model import Item

MOST_COLUMNS = 7
"""Of a figure's table; wider ones have their curves as columns."""


@dataclass(frozen=True)
class Head:
    """Head of a column: `group` stands above several."""

    label: str
    group: str = ""
    unit: str = ""

    @property
    def title(self) -> str:
        """Label with its unit."""
        return f"{self.label} ({self.unit})" if self.unit and self.unit not in ("%",) else self.label


@dataclass(frozen=True)
class Line:
    """One line: `group` stands in front of several, `remark` behind the label. `cells`: one per head, None where there is none."""

    label: str
    group: str
    remark: str
    cells: tuple[CellView | None, ...]


@dataclass(frozen=True)
class Layout:
    """Lines and columns of an item. `corner`: what the labels of the lines are."""

    heads: tuple[Head, ...]
    lines: tuple[Line, ...]
    corner: str = ""

    @property
    def has_groups(self) -> bool:
        """Whether anything stands in front of the lines."""
        return any(line.group for line in self.lines)


def layout(view: ItemView) -> Layout:
    """Return the layout of an item: rows and columns as they are, unless a figure has its x axis in too many columns."""
    item = view.item
    figure = item.figure
    if figure is not None and figure.curves == "rows" and figure.kind in ("line", "band") and len(item.columns) > MOST_COLUMNS:
        groups = list(dict.fromkeys(column.group for column in item.columns))
        return _points_by_group(view, groups) if len(groups) > 1 else _transposed(view)
    heads = tuple(Head(column.label, column.group, column.unit) for column in item.columns)
    lines = tuple(
        Line(row.label, row.group, _remark(item, row.key), tuple(view.cell(row.key, column.key) for column in item.columns))
        for row in item.rows
    )
    return Layout(heads, lines)


def _transposed(view: ItemView) -> Layout:
    item = view.item
    heads = tuple(Head(" ".join(filter(None, (row.label, _remark(item, row.key))))) for row in item.rows)
    lines = tuple(Line(column.label, "", "", tuple(view.cell(row.key, column.key) for row in item.rows)) for column in item.columns)
    return Layout(heads, lines, item.figure.x_label if item.figure is not None else "")


def _points_by_group(view: ItemView, groups: list[str]) -> Layout:
    """Return a line per curve and point, a column per group of columns (mean, minimum, maximum)."""
    item = view.item
    points = list(dict.fromkeys(column.x for column in item.columns))
    by_place = {(column.group, column.x): column for column in item.columns}
    lines = []
    for row in item.rows:
        for x in points:
            columns = [by_place.get((group, x)) for group in groups]
            cells = tuple(view.cell(row.key, column.key) if column is not None else None for column in columns)
            lines.append(Line(f"{x:g}", row.label, _remark(item, row.key), cells))
    return Layout(tuple(Head(group) for group in groups), tuple(lines), item.figure.x_label if item.figure is not None else "")


def _remark(item: Item, key: str) -> str:
    row = item.row(key)
    if row.quoted:
        return f"quoted from {row.quoted}"
    return "not in the paper" if row.extra else ""
