"""An item as a table: for every cell the numbers that are shown of it, and what stands around them. The one model of all formats.

Terminal, Markdown, LaTeX, CSV and pages differ in how they arrange and write entries; what stands in an entry is decided here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
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
    Layout,
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
        view: the item and what was found.
    """

    view: ItemView

    @cached_property
    def records(self) -> Mapping[tuple[str, str], Entries]:
        """Entries by row and column key, in the item's order."""
        return {cell.key: _entries(cell, self._usual_samples) for cell in self.view.cells()}

    @cached_property
    def _layout(self) -> Layout:
        return layout(self.view)

    @property
    def corner(self) -> str:
        """What the labels of the lines are."""
        return self._layout.corner

    @property
    def heads(self) -> tuple[Head, ...]:
        """Of the columns."""
        return self._layout.heads

    @cached_property
    def lines(self) -> tuple[SheetLine, ...]:
        """The entries as laid out."""
        return tuple(
            SheetLine(line.label, line.group, line.remark, tuple(self.records[cell.key] if cell is not None else {} for cell in line.cells))
            for line in self._layout.lines
        )

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

    @cached_property
    def legend(self) -> tuple[str, ...]:
        """What a reader needs below the table: the scale first, then samples, marks and rows that are not run."""
        return tuple(self._legend())

    def _legend(self) -> Iterable[str]:
        view, cells = self.view, list(self.view.cells())
        if not cells:
            return
        if view.scale is None:
            yield f"{NOT_RUN[0].upper()}{NOT_RUN[1:]}{': printed values only' if any(cell.printed for cell in cells) else ''}."
        else:
            yield SCALE_SENTENCES[view.scale]
            yield from _samples(self._usual_samples)
        if any(reading.low is not None for cell in cells for reading in cell.readings):
            yield "Brackets: 95 % interval."
        if "honest" in view.kinds:
            yield (
                "Ours: under the paper's own protocol. Honest: gradients averaged over draws, scored on draws the attack has not seen "
                f"(T1); beside AutoAttack the worst attack per image of a stronger suite. Where both are one number, {SAME} stands."
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

    @cached_property
    def _usual_samples(self) -> Mapping[Kind, int | None]:
        """How many images most numbers of a kind were measured on."""
        usual: dict[Kind, int | None] = {}
        for kind in self.view.kinds:
            if kind != "printed":
                readings = (cell.honest if kind == "honest" else cell.paper for cell in self.view.cells())
                counts = (reading.num_samples for reading in readings if reading is not None)
                usual[kind] = most_common(count for count in counts if count is not None)
        return usual

    @cached_property
    def how(self) -> tuple[str, ...]:
        """In which ways the columns were measured, the most frequent way first; columns that share all their ways share a line."""
        columns_by_ways: dict[tuple[str, ...], list[str]] = {}
        for whose in ("ours", "honest"):
            for column in self.view.item.columns:
                cells = [cell for row in self.view.item.rows if (cell := self.view.cell(row.key, column.key)) is not None]
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
        return tuple(found)

    @cached_property
    def contradictions(self) -> tuple[str, ...]:
        """Of the paper, as far as they touch the item: key, which rows and columns, what it is, and whether agreement is not asked for."""
        item, found = self.view.item, []
        ambiguities = get_paper(item.paper).ambiguities if item.notes else {}
        for note in item.notes:
            rows = ", ".join(" ".join(filter(None, (item.row(key).group, item.row(key).label))) for key in note.rows)
            columns = ", ".join(item.column(key).label for key in note.columns)
            where = "; ".join(filter(None, (rows, columns)))
            exempt = " Not judged." if note.exempt else ""
            found.append(f"{note.key}{f' ({where})' if where else ''}: {ambiguities[note.key]}{exempt}")
        return tuple(found)


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
