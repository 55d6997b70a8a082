"""An item as a table: for every cell the numbers that are shown of it, and what stands around them. The one model of all formats.

Terminal, Markdown, LaTeX, CSV and pages differ in how they arrange and write entries; what stands in an entry is decided here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from string import ascii_lowercase

from analysis.reporting import tables
from analysis.reproduction.outcome import Reading
from analysis.reproduction.papers import get_paper
from analysis.reproduction.scale import SCALE_MARKS, SCALE_SENTENCES, Scale
from analysis.reproduction.view import (
    NOT_RUN,
    Agreement,
    CellView,
    Head,
    ItemView,
    Kind,
    describe_series,
    format_interval,
    format_value,
    kinds_among,
    layout,
    most_common,
)

AGREES, DIFFERS = "✓", "≠"
SAME = "="
"""Stands where the honest number is the paper's: the protocol makes no difference to what is measured."""

_MOST_PLACES = 6
_MOST_WAYS = 4
_MOST_NAMES = 8


@dataclass(frozen=True)
class Entry:
    """One number of a cell.

    Attributes:
        cell: whose. kind: whose number it is. number: as shown; a dash where it is missing, `=` where the paper's is the honest one.
        reading: what was measured, None for printed numbers and where there is none. interval: `52.3, 74.9` or empty.
        reason: why it is missing. samples: `n=32` where it differs from the rest of the table.
    """

    cell: CellView
    kind: Kind
    number: str = ""
    reading: Reading | None = None
    interval: str = ""
    reason: str = ""
    samples: str = ""

    @property
    def scale(self) -> Scale:
        """At which it was measured."""
        return self.cell.scale or "smoke"

    @property
    def scale_mark(self) -> str:
        """`smoke`, `short` or empty, for numbers that were measured."""
        return SCALE_MARKS[self.scale] if self.reading is not None else ""

    @property
    def failed_checks(self) -> tuple[str, ...]:
        """Keys of failed checks of its evaluation: with any it must not be believed."""
        return self.reading.failed_checks if self.reading is not None else ()

    @property
    def agreement(self) -> Agreement | None:
        """With the printed number, where it is judged."""
        return self.cell.agreement if self.kind == "paper" else None

    @property
    def verdict(self) -> str:
        """`✓`, `≠` or empty."""
        return "" if self.agreement is None else AGREES if self.agreement.agrees else DIFFERS


Entries = Mapping[Kind, Entry]
"""Of one cell: printed always (perhaps empty), ours unless it is quoted, the honest one too; empty where the item has no cell."""


@dataclass(frozen=True)
class SheetLine:
    """One row of a table: `group` stands in front of several, `remark` behind the label. `cells`: one per head."""

    label: str
    group: str
    remark: str
    cells: tuple[Entries, ...]


@dataclass(frozen=True)
class TextLine:
    """One line of text: the numbers of one kind in a row. `title`: whose they are, in words; `first`: whether it begins the row."""

    row: SheetLine
    kind: Kind
    title: str
    first: bool
    entries: tuple[Entry | None, ...]

    @property
    def label(self) -> str:
        """Of its row, with the remark."""
        return f"{self.row.label} ({self.row.remark})" if self.row.remark else self.row.label


@dataclass(frozen=True)
class Sheet:
    """An item as a table.

    Attributes:
        view: the item and what was found. corner: what the labels of the lines are. heads: of the columns.
        records: entries by row and column key, in the item's order. lines: the same as laid out.
        legend: sentences below, the scale first. how: in which ways columns were measured. contradictions: of the paper, that touch it.
    """

    view: ItemView
    corner: str
    heads: tuple[Head, ...]
    records: Mapping[tuple[str, str], Entries]
    lines: tuple[SheetLine, ...]
    legend: tuple[str, ...]
    how: tuple[str, ...]
    contradictions: tuple[str, ...]

    @property
    def has_groups(self) -> bool:
        """Whether anything stands in front of the lines."""
        return any(line.group for line in self.lines)

    @property
    def text_lines(self) -> list[TextLine]:
        """Up to three lines per row: printed, ours, ours honest, as far as there is something in them."""
        kinds = self.view.kinds
        found: list[TextLine] = []
        for line in self.lines:
            present = [kind for kind in kinds if _has_content(line.cells, kind, kinds)]
            for kind in present:
                entries = tuple(cell.get(kind) for cell in line.cells)
                found.append(TextLine(line, kind, self.title_of(kind), kind == present[0], entries))
        return found

    def title_of(self, kind: Kind) -> str:
        """Return whose number it is, in words, with the scale."""
        if kind == "printed":
            return "printed"
        whose = "honest" if kind == "honest" else "ours"
        return f"{whose}, {self.view.scale} scale" if self.view.scale is not None else whose


@dataclass
class Footnotes:
    """Texts below a table by letter, in the order in which they are first needed."""

    letters: dict[str, str] = field(default_factory=dict)

    def letter(self, text: str) -> str:
        """Return the letter of a text: a to z, then aa, ab; of no text none."""
        if not text:
            return ""
        if text not in self.letters:
            count = len(self.letters)
            first = ascii_lowercase[count // 26 - 1] if count >= 26 else ""
            self.letters[text] = first + ascii_lowercase[count % 26]
        return self.letters[text]

    @property
    def listed(self) -> tuple[tuple[str, str], ...]:
        """Letters with their texts."""
        return tuple((letter, text) for text, letter in self.letters.items())


def sheet_of(view: ItemView) -> Sheet:
    """Return an item as a table."""
    usual: dict[Kind, int | None] = {kind: _usual_samples(view, kind) for kind in view.kinds if kind != "printed"}
    records = {cell.key: _entries(cell, usual) for cell in view.cells()}
    arranged = layout(view)
    lines = tuple(
        SheetLine(line.label, line.group, line.remark, tuple(records[cell.key] if cell is not None else {} for cell in line.cells))
        for line in arranged.lines
    )
    return Sheet(
        view,
        arranged.corner,
        arranged.heads,
        records,
        lines,
        tuple(_legend(view, usual)),
        tuple(_how_measured(view)),
        tuple(_contradictions(view)),
    )


def column_kinds(cells: Iterable[Entries], was_run: bool) -> tuple[Kind, ...]:
    """Return whose numbers a column of a table has."""
    return kinds_among((entries["printed"].cell for entries in cells if entries), was_run)


def _entries(cell: CellView, usual: Mapping[Kind, int | None]) -> Entries:
    entries: dict[Kind, Entry] = {"printed": Entry(cell, "printed", cell.printed)}
    if not cell.quoted:
        entries["paper"] = _entry(cell, "paper", cell.paper, cell.reason, usual.get("paper"))
        if cell.same and cell.paper is not None:
            entries["honest"] = Entry(cell, "honest", SAME)
        else:
            entries["honest"] = _entry(cell, "honest", cell.honest, cell.honest_reason, usual.get("honest"))
    return entries


def _entry(cell: CellView, kind: Kind, reading: Reading | None, reason: str, usual: int | None) -> Entry:
    if reading is None:
        return Entry(cell, kind, tables.MISSING, reason=reason)
    scale: Scale = cell.scale or "smoke"
    number = format_value(reading.value, cell.unit, scale) if reading.value is not None else describe_series(reading.series)
    samples = f"n={reading.num_samples}" if reading.num_samples is not None and reading.num_samples != usual else ""
    return Entry(cell, kind, number or tables.MISSING, reading, format_interval(reading, cell.unit, scale), samples=samples)


def _has_content(cells: Iterable[Entries], kind: Kind, kinds: tuple[Kind, ...]) -> bool:
    if kind == "printed":
        return any(entries["printed"].number for entries in cells if entries) or len(kinds) == 1
    if kind == "paper":
        return any("paper" in entries for entries in cells)
    # With a reason alone, a line would only repeat that nothing was run.
    return any(entries["honest"].cell.has_counterpart and entries["paper"].reading is not None for entries in cells if "honest" in entries)


def _usual_samples(view: ItemView, kind: Kind) -> int | None:
    """Return how many images most numbers of a kind were measured on."""
    return most_common(reading.num_samples for reading in _readings(view, kind) if reading.num_samples is not None)


def _readings(view: ItemView, kind: Kind) -> list[Reading]:
    found = [cell.honest if kind == "honest" else cell.paper for cell in view.cells()]
    return [reading for reading in found if reading is not None]


def _legend(view: ItemView, usual: Mapping[Kind, int | None]) -> Iterable[str]:
    """Return what a reader needs below a table: the scale first, then samples, marks and rows that are not run."""
    cells = list(view.cells())
    if not cells:
        return
    if view.scale is None:
        yield f"{NOT_RUN[0].upper()}{NOT_RUN[1:]}{': printed values only' if any(cell.printed for cell in cells) else ''}."
    else:
        yield SCALE_SENTENCES[view.scale]
        yield from _samples(usual)
    if any(reading.low is not None for cell in cells for reading in cell.readings):
        yield "Brackets: 95 % interval."
    if "honest" in view.kinds:
        yield (
            "Ours: under the paper's own protocol. Honest: gradients averaged over draws, scored on draws the attack has not seen (T1); "
            f"beside AutoAttack the worst attack per image of a stronger suite. Where both are one number, {SAME} stands."
        )
    suspicious = sorted(_failed_places(cells).items(), key=lambda place: (len(place[0]), place[0]))
    for check, places in suspicious:
        shown = ", ".join(places[:_MOST_PLACES]) + (f" and {len(places) - _MOST_PLACES} more" if len(places) > _MOST_PLACES else "")
        yield f"{tables.MARK} must not be believed, {check} failed: {shown}."
    if any(cell.agreement is not None for cell in cells):
        yield (
            f"{AGREES} within {view.item.tolerance:g} of the printed number (a printed ± widens it), {DIFFERS} not; "
            "numbers without either are not judged."
        )
    if any(row.quoted for row in view.item.rows):
        yield "Quoted rows are other people's numbers; nothing is run for them."


def _samples(usual: Mapping[Kind, int | None]) -> Iterable[str]:
    counts = {kind: count for kind, count in usual.items() if count is not None}
    if len(set(counts.values())) == 1:
        yield f"n = {next(iter(counts.values()))} images, where a cell does not say otherwise."
    elif counts:
        parts = ", ".join(f"{count} for {'ours' if kind == 'paper' else kind}" for kind, count in counts.items())
        yield f"Images, where a cell does not say otherwise: n = {parts}."


def _failed_places(cells: Iterable[CellView]) -> dict[str, list[str]]:
    places: dict[str, list[str]] = {}
    for cell in cells:
        titles = cell.check_titles
        for key in dict.fromkeys(key for reading in cell.readings for key in reading.failed_checks):
            name = f"{key} ({titles[key]})" if key in titles else key
            group = f"{cell.cell.row.group}, " if cell.cell.row.group else ""
            places.setdefault(name, []).append(f"{group}{cell.cell.row.label}, {cell.cell.column.label}")
    return places


def _how_measured(view: ItemView) -> list[str]:
    """Return in which ways the columns were measured, the most frequent way first; columns that share all their ways share a line."""
    columns_by_ways: dict[tuple[str, ...], list[str]] = {}
    for whose in ("ours", "honest"):
        for column in view.item.columns:
            cells = [cell for row in view.item.rows if (cell := view.cell(row.key, column.key)) is not None]
            readings = [cell.paper if whose == "ours" else cell.honest for cell in cells]
            ways = [reading.how for reading in readings if reading is not None and reading.how]
            distinct = tuple(sorted(dict.fromkeys(ways), key=lambda way: -ways.count(way)))
            if distinct:
                columns_by_ways.setdefault((whose, *distinct), []).append(" ".join(filter(None, (column.group, column.label))))
    found = []
    for (whose, *ways), columns in columns_by_ways.items():
        more = f"; and {len(ways) - _MOST_WAYS} more, in table.csv" if len(ways) > _MOST_WAYS else ""
        names = ", ".join(columns) if len(columns) <= _MOST_NAMES else f"{columns[0]} to {columns[-1]} ({len(columns)} columns)"
        found.append(f"{names}, {whose}: {'; '.join(ways[:_MOST_WAYS])}{more}")
    return found


def _contradictions(view: ItemView) -> list[str]:
    """Return the notes on an item: key, which rows and columns, what it is, and whether agreement is not asked for."""
    ambiguities = get_paper(view.item.name.partition(".")[0]).ambiguities
    found = []
    for note in view.item.notes:
        rows = ", ".join(" ".join(filter(None, (view.item.row(key).group, view.item.row(key).label))) for key in note.rows)
        columns = ", ".join(view.item.column(key).label for key in note.columns)
        where = "; ".join(filter(None, (rows, columns)))
        exempt = " Not judged." if note.exempt else ""
        found.append(f"{note.key}{f' ({where})' if where else ''}: {ambiguities[note.key]}{exempt}")
    return found
