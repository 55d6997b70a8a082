"""A cell as it is shown: what the paper printed, what was found under its protocol and under the honest one, why something is missing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from analysis.reproduction.formats import NOT_RUN, without_honest
from analysis.reproduction.outcome import CellOutcome, ItemOutcome, Reading, RunOutcome
from analysis.reproduction.papers import get_item
from analysis.reproduction.papers.model import Cell, Item
from analysis.reproduction.scale import Scale
from models.errors import UserError


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
        missing = without_honest(self.cell.column.measure)
        if missing:
            return missing
        return self.reason or (self.found.reason if self.found is not None else "") or "its honest counterpart was not measured"

    @property
    def readings(self) -> tuple[Reading, ...]:
        """All that was measured."""
        return tuple(reading for reading in (self.paper, self.honest) if reading is not None)

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
class ItemView:
    """An item and what was found for it, None before it was run.

    Raises:
        UserError: the outcome has cells that the item does not have: it is of another version.
    """

    item: Item
    outcome: ItemOutcome | None
    _found: Mapping[tuple[str, str], CellOutcome] = field(init=False, repr=False, compare=False)
    _existing: frozenset[tuple[str, str]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        found = {(cell.row, cell.column): cell for cell in self.outcome.cells} if self.outcome is not None else {}
        existing = frozenset((cell.row.key, cell.column.key) for cell in self.item.cells())
        unknown = sorted(set(found) - existing)
        if unknown:
            raise UserError(
                f"the stored outcome of {self.item.name} has a cell {unknown[0]} that the table does not have: it was written by another "
                "version of Rayndom; run `rayndom reproduce` again"
            )
        object.__setattr__(self, "_found", found)
        object.__setattr__(self, "_existing", existing)

    @property
    def scale(self) -> Scale | None:
        """At which it was run."""
        return self.outcome.scale if self.outcome is not None else None

    def cell(self, row: str, column: str) -> CellView | None:
        """Return a cell by its keys; None if the item has none there."""
        if (row, column) not in self._existing:
            return None
        cell = self.item.cell(self.item.row(row), self.item.column(column))
        found = self._found.get((row, column))
        run = self.outcome.runs.get(found.run) if self.outcome is not None and found is not None else None
        return CellView(self.item, cell, self.scale, found, run)

    def cells(self) -> Iterator[CellView]:
        """Return all cells, row by row."""
        for row in self.item.rows:
            for column in self.item.columns:
                view = self.cell(row.key, column.key)
                if view is not None:
                    yield view


def view_of(outcome: ItemOutcome) -> ItemView:
    """Return the view of an outcome; an unknown item is a `UserError`."""
    return ItemView(get_item(outcome.item), outcome)


@dataclass(frozen=True)
class Progress:
    """How far an item is: cells that can be measured, measured ones, failed checks among them; judged and agreeing at paper scale."""

    wanted: int
    measured: int
    suspicious: int
    judged: int
    agreeing: int


def progress(view: ItemView) -> Progress:
    """Return how far an item is."""
    wanted = [cell for cell in view.cells() if not cell.quoted and (cell.found is None or cell.found.expected)]
    agreements = [cell.agreement for cell in wanted if cell.agreement is not None]
    return Progress(
        len(wanted),
        sum(cell.paper is not None for cell in wanted),
        sum(any(reading.failed_checks for reading in cell.readings) for cell in wanted),
        len(agreements),
        sum(agreement.agrees for agreement in agreements),
    )
