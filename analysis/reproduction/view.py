"""An item and what was found for it side by side: each cell with all that is shown of it, how cells are laid out and numbers written."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from analysis.reproduction.outcome import CellOutcome, ItemOutcome, Reading, RunOutcome
from analysis.reproduction.papers import get_item
from analysis.reproduction.papers.model import Cell, Item
from analysis.reproduction.scale import Scale
from models.errors import UserError

Kind = Literal["printed", "paper", "honest"]
"""Whose number it is: the paper's as printed, ours under its protocol, ours under the honest one."""

NOT_RUN = "not run at this scale"
MOST_COLUMNS = 7
"""Of a figure's table; wider ones have their curves as columns."""

_SERIES_WORDS = ("values", "grid", "grids")


@dataclass(frozen=True)
class Agreement:
    """Whether a number is the printed one: `difference` (ours minus printed) and what is `allowed`, in the unit of the column."""

    difference: float
    allowed: float

    @property
    def agrees(self) -> bool:
        """Whether the difference is allowed."""
        return abs(self.difference) <= self.allowed + 1e-9


@dataclass(frozen=True)
class CellView:
    """One cell with everything that is shown of it.

    Attributes:
        item: whose cell it is. cell: as the paper has it. scale: at which it was run, None if it was not. found: what was found.
        run: the training that it rests on.
    """

    item: Item
    cell: Cell
    scale: Scale | None
    found: CellOutcome | None
    run: RunOutcome | None

    @property
    def key(self) -> tuple[str, str]:
        """Keys of its row and its column."""
        return self.cell.row.key, self.cell.column.key

    @property
    def unit(self) -> str:
        """Of its column."""
        return self.cell.column.unit

    @property
    def quoted(self) -> bool:
        """Whether the paper quotes the number and nothing is run."""
        return self.cell.run is None

    @property
    def printed(self) -> str:
        """The paper's number as printed, or empty."""
        return self.cell.published.text if self.cell.published is not None else ""

    @property
    def paper(self) -> Reading | None:
        """Ours under the paper's protocol."""
        return self.found.paper if self.found is not None else None

    @property
    def honest(self) -> Reading | None:
        """Ours under the honest protocol; None also where both are one number."""
        return self.found.honest if self.found is not None and self.has_counterpart else None

    @property
    def has_counterpart(self) -> bool:
        """Whether the honest number is another one than the paper's."""
        return self.cell.column.measure.honest not in (None, self.cell.column.measure)

    @property
    def same(self) -> bool:
        """Whether the paper's number is the honest one too."""
        return self.cell.column.measure.honest == self.cell.column.measure

    @property
    def reason(self) -> str:
        """Why there is no number under the paper's protocol; empty if there is one, or if the number is quoted."""
        if self.quoted or self.paper is not None:
            return ""
        if self.found is None or self.scale is None:
            return NOT_RUN
        return self.found.reason or NOT_RUN

    @property
    def honest_reason(self) -> str:
        """Why there is no honest number; empty if there is one, or if both are one."""
        if self.quoted or self.same or self.honest is not None:
            return ""
        missing = self.cell.column.measure.why_no_honest
        if missing:
            return missing
        return self.reason or (self.found.reason if self.found is not None else "") or "its honest counterpart was not measured"

    @property
    def readings(self) -> tuple[Reading, ...]:
        """All that was measured."""
        return tuple(reading for reading in (self.paper, self.honest) if reading is not None)

    @property
    def check_titles(self) -> Mapping[str, str]:
        """Titles of the checks of the evaluations that it rests on, by key."""
        return self.run.check_titles if self.run is not None else {}

    @property
    def agreement(self) -> Agreement | None:
        """Agreement with the printed number; judged at paper scale only, for numbers that may be believed and can be asked for."""
        reading, published = self.paper, self.cell.published
        if self.scale != "paper" or not self.cell.judged or published is None:
            return None
        if reading is None or reading.value is None or reading.failed_checks:
            return None
        return Agreement(reading.value - published.value, self.item.tolerance + (published.plus_minus or 0.0))


@dataclass(frozen=True)
class Progress:
    """How far an item is: cells that can be measured, measured ones, failed checks among them; judged and agreeing at paper scale."""

    wanted: int
    measured: int
    suspicious: int
    judged: int
    agreeing: int


@dataclass(frozen=True)
class ItemView:
    """An item, as far as its scale has it, and what was found for it, None before it was run.

    Raises:
        UserError: the outcome has cells that the item does not have: it is of another version.
    """

    item: Item
    outcome: ItemOutcome | None
    _cells: Mapping[tuple[str, str], CellView] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        outcome = self.outcome
        object.__setattr__(self, "item", self.item.at(self.scale))
        found = {(cell.row, cell.column): cell for cell in outcome.cells} if outcome is not None else {}
        cells = {}
        for cell in self.item.cells():
            place = cell.row.key, cell.column.key
            known = found.pop(place, None)
            run = outcome.runs.get(known.run) if outcome is not None and known is not None else None
            cells[place] = CellView(self.item, cell, self.scale, known, run)
        if found:
            raise UserError(
                f"the stored outcome of {self.item.name} has a cell {min(found)} that the table does not have: it was written by another "
                "version of Rayndom; run `rayndom reproduce` again"
            )
        object.__setattr__(self, "_cells", cells)

    @property
    def scale(self) -> Scale | None:
        """At which it was run."""
        return self.outcome.scale if self.outcome is not None else None

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """Whose numbers it has: printed ones, ours, and honest ones beside ours."""
        return kinds_among(self.cells(), self.outcome is not None)

    @property
    def progress(self) -> Progress:
        """How far it is."""
        wanted = [cell for cell in self.cells() if not cell.quoted and (cell.found is None or cell.found.expected)]
        agreements = [cell.agreement for cell in wanted if cell.agreement is not None]
        return Progress(
            len(wanted),
            sum(cell.paper is not None for cell in wanted),
            sum(any(reading.failed_checks for reading in cell.readings) for cell in wanted),
            len(agreements),
            sum(agreement.agrees for agreement in agreements),
        )

    def cell(self, row: str, column: str) -> CellView | None:
        """Return a cell by its keys; None if the item has none there."""
        return self._cells.get((row, column))

    def cells(self) -> Iterable[CellView]:
        """Return all cells, row by row."""
        return self._cells.values()


def kinds_among(cells: Iterable[CellView], was_run: bool) -> tuple[Kind, ...]:
    """Return whose numbers some cells have; ours where there is nothing else."""
    present = list(cells)
    kinds: list[Kind] = ["printed"] if any(cell.printed for cell in present) else []
    if was_run and any(not cell.quoted for cell in present):
        kinds.append("paper")
        if any(cell.has_counterpart and not cell.quoted for cell in present):
            kinds.append("honest")
    return tuple(kinds) or ("paper",)


def view_of(outcome: ItemOutcome) -> ItemView:
    """Return the view of an outcome; an unknown item is a `UserError`."""
    return ItemView(get_item(outcome.item), outcome)


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
        return _points_by_group(view, groups, figure.x_label) if len(groups) > 1 else _transposed(view, figure.x_label)
    heads = tuple(Head(column.label, column.group, column.unit) for column in item.columns)
    lines = tuple(
        Line(row.label, row.group, row.remark, tuple(view.cell(row.key, column.key) for column in item.columns)) for row in item.rows
    )
    return Layout(heads, lines)


def _transposed(view: ItemView, x_label: str) -> Layout:
    item = view.item
    heads = tuple(Head(" ".join(filter(None, (row.label, row.remark)))) for row in item.rows)
    lines = tuple(Line(column.label, "", "", tuple(view.cell(row.key, column.key) for row in item.rows)) for column in item.columns)
    return Layout(heads, lines, x_label)


def _points_by_group(view: ItemView, groups: list[str], x_label: str) -> Layout:
    """Return a line per curve and point, a column per group of columns (mean, minimum, maximum)."""
    item = view.item
    points = list(dict.fromkeys(column.x for column in item.columns))
    by_place = {(column.group, column.x): column for column in item.columns}
    lines = []
    for row in item.rows:
        for x in points:
            columns = [by_place.get((group, x)) for group in groups]
            cells = tuple(view.cell(row.key, column.key) if column is not None else None for column in columns)
            lines.append(Line(f"{x:g}", row.label, row.remark, cells))
    return Layout(tuple(Head(group) for group in groups), tuple(lines), x_label)


def format_value(value: float, unit: str, scale: Scale) -> str:
    """Return a number without unit and mark: one decimal for percent (two at paper scale, as papers print), else four digits."""
    if not math.isfinite(value):
        return str(value)
    if unit == "%":
        return f"{value:.{2 if scale == 'paper' else 1}f}"
    if value == int(value) and abs(value) >= 1000:
        return f"{int(value):,}"
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def format_interval(reading: Reading, unit: str, scale: Scale) -> str:
    """Return the interval as `52.3, 74.9`, empty if there is none."""
    if reading.low is None or reading.high is None:
        return ""
    return f"{format_value(reading.low, unit, scale)}, {format_value(reading.high, unit, scale)}"


def describe_series(series: Mapping[str, Any]) -> str:
    """Return in a few words what a figure draws, e.g. `median 0.12 of 512`; empty if there is nothing to draw."""
    if "values" in series:
        values = finite(series["values"])
        return f"median {np.median(values):.3g} of {len(values)}" if len(values) else "no finite value"
    grids = series.get("grids", [series["grid"]] if "grid" in series else [])
    if not grids:
        return ""
    values = finite(grids)
    return f"{values.min():.3g} to {values.max():.3g}" if len(values) else "no finite value"


def finite(values: Any) -> np.ndarray:
    """Return the finite ones of nested lists of numbers, flat."""
    flat = np.asarray(values, dtype=float).reshape(-1)
    return flat[np.isfinite(flat)]


def most_common(values: Iterable[Any]) -> Any:
    """Return the most frequent value, the first of them if several are; None if there is none."""
    counted = Counter(values).most_common(1)
    return counted[0][0] if counted else None


def has_series(reading: Reading | None) -> bool:
    """Return whether a reading has something to draw beside its number."""
    return reading is not None and any(word in reading.series for word in _SERIES_WORDS)
