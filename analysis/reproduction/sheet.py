"""An item as text: up to three lines per row (printed, ours, ours honest), footnotes for what is missing, and a legend.

Terminal, Markdown and LaTeX differ in how they write an entry; what stands in it is decided here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from string import ascii_lowercase
from typing import Literal

from analysis.reporting import tables
from analysis.reproduction.cells import CellView, ItemView
from analysis.reproduction.formats import (
    NOT_RUN,
    SAME,
    SCALE_MARKS,
    SCALE_SENTENCES,
    describe_series,
    format_interval,
    format_value,
    most_common,
)
from analysis.reproduction.layout import Layout, layout
from analysis.reproduction.outcome import Reading
from analysis.reproduction.scale import Scale

Kind = Literal["printed", "paper", "honest"]

AGREES, DIFFERS = "✓", "≠"
_MOST_PLACES = 6


@dataclass(frozen=True)
class Entry:
    """What stands in a cell of a line.

    Attributes:
        number: as shown, or a dash. interval: `52.3, 74.9` or empty. scale_mark: `smoke`, `short` or empty.
        suspicious: an evaluation with a failed check. agreement: `✓`, `≠` or empty. footnote: its letter. samples: `n=32` where it
            differs from the rest of the table.
    """

    number: str = ""
    interval: str = ""
    scale_mark: str = ""
    suspicious: bool = False
    agreement: str = ""
    footnote: str = ""
    samples: str = ""


@dataclass(frozen=True)
class SheetLine:
    """One line of text. `kind`: whose number it is, `title`: in words; `first`: whether it begins a row."""

    group: str
    label: str
    remark: str
    kind: Kind
    title: str
    first: bool
    entries: tuple[Entry, ...]


@dataclass(frozen=True)
class Sheet:
    """An item as lines. `footnotes`: letter and text. `legend`: sentences below, the scale first."""

    layout: Layout
    lines: tuple[SheetLine, ...]
    footnotes: tuple[tuple[str, str], ...]
    legend: tuple[str, ...]


@dataclass
class Footnotes:
    """Texts below a table by letter, in the order in which they are first needed."""

    letters: dict[str, str] = field(default_factory=dict)

    def letter(self, text: str) -> str:
        """Return the letter of a text: a to z, then aa, ab."""
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
    """Return an item as lines of text."""
    arranged, footnotes = layout(view), Footnotes()
    kinds = kinds_of(view)
    usual = {kind: usual_samples(view, kind) for kind in kinds}
    lines: list[SheetLine] = []
    for line in arranged.lines:
        first = True
        for kind in kinds:
            if not _has_content(line.cells, kind, kinds):
                continue
            entries = tuple(_entry(cell, kind, usual[kind], footnotes) if cell is not None else Entry() for cell in line.cells)
            lines.append(SheetLine(line.group, line.label, line.remark, kind, kind_title(view, kind), first, entries))
            first = False
    return Sheet(arranged, tuple(lines), footnotes.listed, tuple(legend(view)))


def kinds_of(view: ItemView) -> tuple[Kind, ...]:
    """Return whose numbers an item has: printed ones, ours, and honest ones beside ours."""
    cells = list(view.cells())
    kinds: list[Kind] = []
    if any(cell.printed for cell in cells):
        kinds.append("printed")
    if view.outcome is not None:
        kinds.append("paper")
        if any(cell.has_counterpart and not cell.quoted for cell in cells):
            kinds.append("honest")
    return tuple(kinds) or ("paper",)


def kind_title(view: ItemView, kind: Kind) -> str:
    """Return whose number it is, in words, with the scale."""
    if kind == "printed":
        return "printed"
    whose = "honest" if kind == "honest" else "ours"
    return f"{whose}, {view.scale} scale" if view.scale is not None else whose


def usual_samples(view: ItemView, kind: Kind) -> int | None:
    """Return how many images most numbers of a kind were measured on."""
    return most_common(reading.num_samples for reading in readings_of(view, kind) if reading.num_samples is not None)


def readings_of(view: ItemView, kind: Kind) -> list[Reading]:
    """Return all readings of a kind."""
    found = [getattr(cell, kind) for cell in view.cells()] if kind != "printed" else []
    return [reading for reading in found if reading is not None]


def legend(view: ItemView) -> Iterable[str]:
    """Return what a reader needs below a table: the scale first, then samples, marks and rows that are not run."""
    cells = list(view.cells())
    if not cells:
        return
    if view.scale is None:
        yield f"{NOT_RUN[0].upper()}{NOT_RUN[1:]}{': printed values only' if any(cell.printed for cell in cells) else ''}."
    else:
        yield SCALE_SENTENCES[view.scale]
        yield from _samples(view)
    if any(reading.low is not None for cell in cells for reading in cell.readings):
        yield "Brackets: 95 % interval."
    if "honest" in kinds_of(view):
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


def _samples(view: ItemView) -> Iterable[str]:
    usual = {kind: usual_samples(view, kind) for kind in kinds_of(view) if kind != "printed"}
    counts = {kind: count for kind, count in usual.items() if count is not None}
    if len(set(counts.values())) == 1:
        yield f"n = {next(iter(counts.values()))} images, where a cell does not say otherwise."
    elif counts:
        parts = ", ".join(f"{count} for {'ours' if kind == 'paper' else kind}" for kind, count in counts.items())
        yield f"Images, where a cell does not say otherwise: n = {parts}."


def _failed_places(cells: Iterable[CellView]) -> dict[str, list[str]]:
    places: dict[str, list[str]] = {}
    for cell in cells:
        titles = check_titles(cell)
        for key in dict.fromkeys(key for reading in cell.readings for key in reading.failed_checks):
            name = f"{key} ({titles[key]})" if key in titles else key
            group = f"{cell.cell.row.group}, " if cell.cell.row.group else ""
            places.setdefault(name, []).append(f"{group}{cell.cell.row.label}, {cell.cell.column.label}")
    return places


def check_titles(cell: CellView) -> dict[str, str]:
    """Return the titles of the checks of the evaluations that a cell rests on, by key."""
    checks = [check for found in cell.run.checks.values() for check in found] if cell.run is not None else []
    return {check.key: check.title for check in checks}


def _has_content(cells: Iterable[CellView | None], kind: Kind, kinds: tuple[Kind, ...]) -> bool:
    present = [cell for cell in cells if cell is not None]
    if kind == "printed":
        return any(cell.printed for cell in present) or len(kinds) == 1
    if kind == "paper":
        return any(not cell.quoted for cell in present)
    # With a reason alone, a line would only repeat that nothing was run.
    return any(cell.has_counterpart and not cell.quoted and cell.paper is not None for cell in present)


def _entry(cell: CellView, kind: Kind, usual: int | None, footnotes: Footnotes) -> Entry:
    if kind == "printed":
        return Entry(cell.printed)
    if cell.quoted:
        return Entry()
    if kind == "honest" and cell.same and cell.paper is not None:
        return Entry(SAME)
    reading, reason = (cell.paper, cell.reason) if kind == "paper" else (cell.honest, cell.honest_reason)
    if reading is None:
        return Entry(tables.MISSING, footnote=footnotes.letter(reason) if reason else "")
    scale: Scale = cell.scale or "smoke"
    number = format_value(reading.value, cell.unit, scale) if reading.value is not None else describe_series(reading.series)
    agreement = ""
    if kind == "paper" and cell.agreement is not None:
        agreement = AGREES if cell.agreement.agrees else DIFFERS
    return Entry(
        number or tables.MISSING,
        format_interval(reading, cell.unit, scale),
        SCALE_MARKS[scale],
        bool(reading.failed_checks),
        agreement,
        "",
        f"n={reading.num_samples}" if reading.num_samples is not None and reading.num_samples != usual else "",
    )
