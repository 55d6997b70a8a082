"""Papers as data: which training and which measurement fill each cell of each table and figure, and what the paper printed there.

An item is a grid. A row says what is trained (`Run`), a column how the number is measured (`Measure`), and `published` holds what the
paper prints at (row, column). A figure is a grid too: its curves are the rows or the columns, and the other side carries the x axis.

Recipes are named by strings, because analysis knows no recipes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from analysis.reproduction.papers.measures import Accuracy, Clean, Measure, Theory, TransferAccuracy
from analysis.reproduction.scale import Scale
from models.errors import UserError, unknown_name
from models.threat_model import Norm, format_pixel_fraction

_NUMBER = re.compile(r"^(-?\d+(?:\.\d+)?)\**(?:±(\d+(?:\.\d+)?))?$")


@dataclass(frozen=True)
class Published:
    """A number as a paper prints it.

    Attributes:
        value: in the column's unit. plus_minus: what stands behind ±, or None. text: as printed, decimals and stars kept.
    """

    value: float
    plus_minus: float | None
    text: str

    @classmethod
    def parse(cls, text: str) -> Published | None:
        """Read `72.10`, `72.10±2.49` or `58.22*`; `-` is None."""
        if text == "-":
            return None
        match = _NUMBER.match(text)
        if match is None:
            raise ValueError(f"{text!r} is not a published number")
        return cls(float(match[1]), float(match[2]) if match[2] else None, text)


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        recipe: its name. overrides: `section.field=value`, as typed behind `--`.
        norm: of the recipe's threat model, which a small stand-in must keep.
        epochs: of the recipe. in_epochs: fields counted in epochs, with the recipe's values; shorter schedules shrink them.
        evaluated_with: parameters of the defence that differ in evaluation alone: the trained weights answer under them.
    """

    recipe: str
    overrides: tuple[str, ...] = ()
    norm: Norm = field(default="linf", kw_only=True)
    epochs: int = field(default=200, kw_only=True)
    in_epochs: Mapping[str, float] = field(default_factory=dict, kw_only=True)
    evaluated_with: Mapping[str, str] = field(default_factory=dict, kw_only=True)

    @property
    def evaluation_remark(self) -> str:
        """The parameters that differ in evaluation, in words; empty if none do."""
        return ", ".join(f"{name}={value}" for name, value in self.evaluated_with.items())

    def tuned(self, *overrides: str) -> Run:
        """Return the run with further overrides."""
        return replace(self, overrides=self.overrides + overrides)


@dataclass(frozen=True)
class Row:
    """One line of a table, or what is trained for one curve or point of a figure.

    Attributes:
        key: unique in the item. label: as the paper prints it. group: what stands in front of several rows, e.g. the network.
        run: the training of all columns. runs: the training by column group, where columns need different ones.
        quoted: whose numbers these are, where the paper quotes them and nothing is run; else empty.
        extra: Rayndom's own row, which the paper does not have.
        x, y: place on a figure's axes, where rows are points.
    """

    key: str
    label: str
    group: str = ""
    run: Run | None = None
    runs: Mapping[str, Run] = field(default_factory=dict)
    quoted: str = ""
    extra: bool = False
    x: float | None = None
    y: float | None = None

    @property
    def remark(self) -> str:
        """What stands behind its label where it is not simply a row of the paper."""
        if self.quoted:
            return f"quoted from {self.quoted}"
        remarks = ["not in the paper"] if self.extra else []
        if self.run is not None and self.run.evaluated_with:
            remarks.append(f"trained without, evaluated with {self.run.evaluation_remark}")
        return ", ".join(remarks)

    def run_for(self, column: Column) -> Run | None:
        """Return the training that fills this row's cell in `column`; None for quoted rows and for cells that do not exist."""
        return self.runs.get(column.group, self.run)


@dataclass(frozen=True)
class Column:
    """One column: what is measured, and in which unit.

    Attributes:
        key: unique in the item. label: as the paper prints it. measure: how the number is obtained.
        group: what stands above several columns, e.g. the data set; a row may have a training per group.
        unit: `%` for shares, which are printed as percentages. judged: whether published values can be reproduced to a tolerance at all.
        x: place on a figure's axis, where columns are points.
    """

    key: str
    label: str
    measure: Measure
    group: str = ""
    unit: str = "%"
    judged: bool = True
    x: float | None = None


@dataclass(frozen=True)
class Note:
    """Where a known contradiction of the paper touches an item: its key in `Paper.ambiguities`, and the rows and columns (none: all).

    `exempt`: the cells contradict themselves or other tables, so agreement with them is not asked for.
    """

    key: str
    rows: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    exempt: bool = False

    def touches(self, row: Row, column: Column) -> bool:
        """Return whether the note is about a cell."""
        return (not self.rows or row.key in self.rows) and (not self.columns or column.key in self.columns)


FigureKind = Literal["line", "band", "heatmap", "histogram", "distribution", "landscape", "bars", "illustration"]


@dataclass(frozen=True)
class Figure:
    """How an item is drawn.

    Attributes:
        kind: `line`; `band` (mean with minimum and maximum); `heatmap`; `histogram`; `distribution` (a box per row); `landscape`;
            `bars`; `illustration` (nothing is measured).
        curves: whether each row or each column is a curve, a panel or a box.
        x_label, y_label: of the axes. caption: what the text says about it, where it gives no numbers.
    """

    kind: FigureKind
    curves: Literal["rows", "columns"] = "rows"
    x_label: str = ""
    y_label: str = ""
    caption: str = ""


@dataclass(frozen=True)
class Cell:
    """One cell of an item with everything that is known about it."""

    row: Row
    column: Column
    run: Run | None
    published: Published | None
    notes: tuple[Note, ...]

    @property
    def judged(self) -> bool:
        """Whether agreement with the published value is asked for."""
        return self.published is not None and self.column.judged and not any(note.exempt for note in self.notes)


@dataclass(frozen=True)
class Item:
    """One table or figure.

    Attributes:
        name: `<paper>.<item>`, e.g. `ctrw.table1` or `rna.fig5c`. title: in words. kind: table or figure.
        published: by row key and column key. tolerance: in units of the column; a published ± widens it.
        figure: how it is drawn. notes: contradictions that touch it. nothing_to_run: why, where there is nothing.
        small: keys of the rows that it has at scale `small`; empty: all.
    """

    name: str
    title: str
    rows: tuple[Row, ...] = ()
    columns: tuple[Column, ...] = ()
    published: Mapping[tuple[str, str], Published] = field(default_factory=dict)
    tolerance: float = 1.0
    figure: Figure | None = None
    notes: tuple[Note, ...] = ()
    nothing_to_run: str = ""
    small: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        rows, columns = [row.key for row in self.rows], [column.key for column in self.columns]
        if len(set(rows)) < len(rows) or len(set(columns)) < len(columns):
            raise ValueError(f"{self.name}: keys of rows and of columns must be unique")
        for place in self.published:
            if place[0] not in rows or place[1] not in columns:
                raise ValueError(f"{self.name}: published value at {place}, which does not exist")
        for note in self.notes:
            missing = {*note.rows} - {*rows} | {*note.columns} - {*columns}
            if missing:
                raise ValueError(f"{self.name}: note {note.key} is about {', '.join(sorted(missing))}, which does not exist")
        if missing := {*self.small} - {*rows}:
            raise ValueError(f"{self.name}: rows {', '.join(sorted(missing))} of scale small do not exist")
        for row in self.rows:
            if not (row.run or row.runs or row.quoted):
                raise ValueError(f"{self.name}: row {row.key} is neither run nor quoted")

    @property
    def paper(self) -> str:
        """Short name of its paper."""
        return self.name.partition(".")[0]

    @property
    def short_name(self) -> str:
        """Its name within the paper."""
        return self.name.partition(".")[2]

    @property
    def kind(self) -> Literal["table", "figure"]:
        """`figure` if it is drawn."""
        return "table" if self.figure is None else "figure"

    def at(self, scale: Scale | None) -> Item:
        """Return what there is of it at a scale."""
        if scale != "small" or not self.small:
            return self
        rows = tuple(row for row in self.rows if row.key in self.small)
        kept = {row.key for row in rows}
        about = ((note, tuple(key for key in note.rows if key in kept)) for note in self.notes)
        notes = tuple(replace(note, rows=keys) for note, keys in about if keys or not note.rows)
        published = {place: value for place, value in self.published.items() if place[0] in kept}
        return replace(self, rows=rows, notes=notes, published=published, small=())

    def row(self, key: str) -> Row:
        """Return a row by key."""
        return _by_key("row", self.name, self.rows, key)

    def column(self, key: str) -> Column:
        """Return a column by key."""
        return _by_key("column", self.name, self.columns, key)

    def other_row(self, row: Row, measure: Measure) -> Row | None:
        """Return the row with the second network of a measure; None if the measure has none, or this row has no such counterpart."""
        if not isinstance(measure, TransferAccuracy | Theory) or not measure.other:
            return None
        key = measure.other.format(row=row.key)
        return next((candidate for candidate in self.rows if candidate.key == key), None)

    def cell(self, row: Row, column: Column) -> Cell:
        """Return one cell."""
        notes = tuple(note for note in self.notes if note.touches(row, column))
        return Cell(row, column, row.run_for(column), self.published.get((row.key, column.key)), notes)

    def cells(self) -> Iterator[Cell]:
        """Return all cells that are run or published, row by row."""
        for row in self.rows:
            for column in self.columns:
                cell = self.cell(row, column)
                without_other = isinstance(column.measure, TransferAccuracy) and self.other_row(row, column.measure) is None
                if cell.published is not None or (cell.run is not None and not without_other):
                    yield cell


@dataclass(frozen=True)
class Gain:
    """What a defence is said to add: a row minus the row of its baseline.

    Attributes:
        item: name of the table. row, baseline: keys of its rows. claimed_by: short name of the paper whose defence the row is, where the
            table is of another paper.
    """

    item: str
    row: str
    baseline: str
    claimed_by: str = ""


@dataclass(frozen=True)
class Paper:
    """One paper.

    Attributes:
        name: short name. title, authors, venue: of the paper. items: all its tables and figures, in its order.
        ambiguities: contradictions and gaps, by the keys that notes use: what they are and how they are resolved. One whose text speaks
            of no measurement gets the words "Not measured.", so that a reader knows what a resolution rests on.
        protocol: what its own scripts evaluate, in words.
        gains: rows and their baselines, whose difference its claim is.
    """

    name: str
    title: str
    authors: str
    venue: str
    items: tuple[Item, ...]
    ambiguities: Mapping[str, str] = field(default_factory=dict)
    protocol: str = ""
    gains: tuple[Gain, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "ambiguities", {key: _with_its_ground(text) for key, text in self.ambiguities.items()})
        items = {item.name: item for item in self.items}
        for gain in self.gains:
            rows = [row.key for row in items[gain.item].rows] if gain.item in items else []
            if not {gain.row, gain.baseline} <= set(rows):
                raise ValueError(f"{self.name}: gain of {gain.row} over {gain.baseline} in {gain.item}, which does not exist")
        for item in self.items:
            if not item.name.startswith(f"{self.name}."):
                raise ValueError(f"item {item.name} is not named after its paper {self.name}")
            for note in item.notes:
                if note.key not in self.ambiguities:
                    raise ValueError(f"{item.name}: {unknown_name('ambiguity', note.key, self.ambiguities)}")


def _with_its_ground(text: str) -> str:
    return text if "measured" in text.lower() else f"{text} Not measured."


def grid(columns: tuple[Column, ...], text: str) -> dict[tuple[str, str], Published]:
    """Read published values: a line per row, its key first, then a number or `-` per column.

    Raises:
        ValueError: a line has not one entry per column.
    """
    found: dict[tuple[str, str], Published] = {}
    for line in text.strip().splitlines():
        key, *entries = line.split()
        if len(entries) != len(columns):
            raise ValueError(f"row {key} has {len(entries)} entries for {len(columns)} columns")
        for column, entry in zip(columns, entries, strict=True):
            published = Published.parse(entry)
            if published is not None:
                found[key, column.key] = published
    return found


def steps_axis(suite: str, attack: str, steps: range) -> tuple[Column, ...]:
    """Return the columns of a figure over the number of attack steps; 0 steps are clean images."""
    return tuple(
        Column(f"steps_{count}", str(count), Accuracy(suite, attack, {"steps": count}) if count else Clean(), x=count) for count in steps
    )


def epsilon_axis(suite: str, attack: str, numerators: range) -> tuple[Column, ...]:
    """Return the columns of a figure over the radius, in 255ths; 0 is clean images."""
    return tuple(
        Column(
            f"epsilon_{numerator}",
            f"{numerator}/255",
            Accuracy(suite, attack, epsilon=str(format_pixel_fraction(numerator / 255))) if numerator else Clean(),
            x=numerator,
        )
        for numerator in numerators
    )


def illustration(name: str, title: str) -> Item:
    """Return an item that only draws an idea."""
    return Item(name, title, figure=Figure("illustration"), nothing_to_run="it draws an idea; nothing in it is measured")


def _by_key(kind: str, item: str, entries: tuple[Any, ...], key: str) -> Any:
    for entry in entries:
        if entry.key == key:
            return entry
    error = unknown_name(kind, key, [entry.key for entry in entries])
    raise UserError(f"{item}: {error}")
