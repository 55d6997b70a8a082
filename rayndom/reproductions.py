"""`reproduce`: a table or figure of a paper, from Python."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pandas

from rayndom.notebook import as_html

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from analysis.reproduction.outcome import ItemOutcome


@dataclass(frozen=True)
class Reproduced:
    """What was found for a table or figure.

    Attributes:
        outcome: each cell, with what was printed. files: its tables and figures by kind. problems: why cells are empty.
    """

    outcome: ItemOutcome
    files: dict[str, Path]
    problems: tuple[str, ...]

    @property
    def frame(self) -> pandas.DataFrame:
        """A row for each cell and kind of number, as in the CSV file."""
        from analysis.reproduction.sheet import Sheet
        from analysis.reproduction.tables import tidy
        from analysis.reproduction.view import view_of

        return pandas.DataFrame(list(tidy(Sheet(view_of(self.outcome)))))

    @property
    def figures(self) -> dict[str, Figure]:
        """The panels of a figure by name; none of a table."""
        from analysis.reproduction.figures import draw
        from analysis.reproduction.view import view_of

        return draw(view_of(self.outcome))

    def _repr_html_(self) -> str:
        from analysis.reproduction.sheet import Sheet
        from analysis.reproduction.tables import terminal_rows
        from analysis.reproduction.view import view_of

        header, rows, below = terminal_rows(Sheet(view_of(self.outcome)))
        table = pandas.DataFrame(rows, columns=pandas.Index(header))
        notes = {str(number): note for number, note in enumerate(below, start=1)}
        return as_html(f"{self.outcome.item} at scale {self.outcome.scale}", notes, table)


def reproduce(
    item: str,
    *,
    scale: str = "smoke",
    home: str | Path | None = None,
    data_root: str | Path | None = None,
    address: str | None = None,
) -> Reproduced:
    """Train what is missing, evaluate what is missing, and return a table or figure of a paper, as `rayndom reproduce` does.

    Args:
        item: e.g. `ctrw.table4`. scale: `smoke`, `small`, `short` or `paper`. home, data_root, address: see `train`.

    Raises:
        UserError: no such item, or a mistake found before anything starts.
    """
    from analysis.reproduction.report import write_item
    from analysis.reproduction.scale import parse_scale
    from orchestration.home import Workplace
    from orchestration.reproducing.execution import check_before_start, reproduce_item, track_folder
    from orchestration.reproducing.ledger import outcome_folder
    from orchestration.reproducing.plan import check_something_to_do, find_items, plan_item
    from orchestration.single_process import only_process

    place = Workplace.locate(home, data_root, address)
    (found,) = find_items([item])
    planned = plan_item(found, parse_scale(scale))
    check_something_to_do([planned])
    check_before_start([planned], place)
    folder = outcome_folder(place.home, found.name, planned.scale)
    with only_process(folder / "lock", f"the reproduction of {found.name}", patience_s=None):
        outcome, problems, run_id = reproduce_item(planned, place)
        files = write_item(outcome, folder)
        track_folder(planned, place.home, run_id)
    return Reproduced(outcome, dict(files), tuple(problems))
