"""Records: a JSON line per row and seed, with every number of the row and without weights. A row counts once its line is here."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analysis.reproduction.outcome import CellOutcome, ItemOutcome, Reading
from analysis.reproduction.papers import get_item
from analysis.reproduction.scale import Scale
from models.files import write_text
from orchestration.home import Home
from orchestration.reproducing.ledger import outcome_folder, read_outcome
from orchestration.reproducing.plan import plan_item
from orchestration.run_folder import RunFolder

FOLDER = Path(__file__).parent
SCALE: Scale = "small"
FILES = {"common.table2": "fashion_mnist_resnet8.jsonl", "common.table1": "cifar10_jpeg_resnet8.jsonl"}
"""Of each table, in the order of the page."""

CURVE = ("train/loss", "train/robust_accuracy", "validation/clean_accuracy", "validation/robust_accuracy")
"""What of each epoch is kept: it shows whether training had converged."""


@dataclass(frozen=True)
class Record:
    """One row of a table, trained with one seed.

    Attributes:
        curve: the numbers of `CURVE` by name, a value per epoch. outcome: of the table, with this row alone.
    """

    item: str
    row: str
    seed: int
    curve: Mapping[str, Sequence[float | None]]
    outcome: ItemOutcome

    @property
    def place(self) -> tuple[str, int]:
        """Among the records of a table."""
        return self.row, self.seed


def collect(home: Home, folder: Path = FOLDER) -> list[Record]:
    """Add the finished rows of a home to the records in `folder` and return them; a row that is there already is replaced."""
    found = []
    for item in FILES:
        known = {record.place: record for record in read(item, folder)}
        fresh = [record for seed in seeds_in(home, item) for record in finished_rows(home, item, seed)]
        if fresh:
            write(item, (known | {record.place: record for record in fresh}).values(), folder)
        found += fresh
    return found


def seeds_in(home: Home, item: str) -> list[int]:
    """Return the seeds with which a home has reproduced a table."""
    parent = outcome_folder(home, item, SCALE).parent
    names = [path.parent.name for path in parent.glob(f"{SCALE}*/outcome.json")]
    return sorted(int(name.removeprefix(f"{SCALE}-seed-")) if name != SCALE else 0 for name in names)


def finished_rows(home: Home, item: str, seed: int) -> list[Record]:
    """Return the rows of a table in which every number that can exist is there."""
    planned = plan_item(get_item(item), SCALE, seed=seed)
    outcome = read_outcome(home, item, planned.edition)
    found: list[Record] = []
    if outcome is None:
        return found
    for row in planned.item.rows:
        cells = tuple(cell for cell in outcome.cells if cell.row == row.key)
        run = outcome.runs.get(row.key)
        if run is None or run.fingerprint != planned.trainings[row.key].fingerprint:
            continue
        if all(cell.paper is not None or not cell.expected for cell in cells):
            result = RunFolder(home.run(run.fingerprint)).result() or {"history": []}
            curve = {name: [_rounded(epoch.get(name)) for epoch in result["history"]] for name in CURVE}
            found.append(Record(item, row.key, seed, curve, ItemOutcome(item, SCALE, cells, {row.key: _slim(run)})))
    return found


def _slim(run: Any) -> Any:
    """Return a run with what of its environment makes numbers what they are."""
    environment = {name: run.environment.get(name) for name in ("code", "python", "hardware")}
    packages = run.environment.get("packages") or {}
    return dataclasses.replace(run, environment=environment | {"packages": {"torch": packages.get("torch")}}, mlflow_run="")


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def write(item: str, records: Iterable[Record], folder: Path = FOLDER) -> Path:
    """Write the records of a table, its rows in their order."""
    order = {row.key: place for place, row in enumerate(get_item(item).rows)}
    lines = [to_line(record) for record in sorted(records, key=lambda record: (order[record.row], record.seed))]
    return write_text(folder / FILES[item], "".join(f"{line}\n" for line in lines))


def read(item: str, folder: Path = FOLDER) -> list[Record]:
    """Return the records of a table."""
    path = folder / FILES[item]
    return [from_line(line) for line in path.read_text().splitlines()] if path.exists() else []


def to_line(record: Record) -> str:
    """Return a record as a line of JSON. Most cells of a row are of the same images, or of the first of them: their ids stand once."""
    data = json.loads(record.outcome.to_json())
    ids: list[int] = max((series["ids"] for series in _series(data)), key=len, default=[])
    for series in _series(data):
        if series["ids"] == ids[: len(series["ids"])]:
            del series["ids"]
    head = {"item": record.item, "row": record.row, "seed": record.seed, "ids": ids, "curve": record.curve}
    return json.dumps(head | {"outcome": data}, separators=(",", ":"))


def from_line(line: str) -> Record:
    """Read what `to_line` wrote."""
    data = json.loads(line)
    for series in _series(data["outcome"]):
        series.setdefault("ids", data["ids"][: len(series["correct"])])
    outcome = ItemOutcome.from_json(json.dumps(data["outcome"]), f"the record of {data['row']}")
    return Record(data["item"], data["row"], data["seed"], data["curve"], outcome)


def _series(outcome: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    """Yield the series of all readings that say on which images an answer is right."""
    for cell in outcome["cells"]:
        for reading in (cell["paper"], cell["honest"]):
            if reading is not None and "correct" in reading["series"]:
                yield reading["series"]


def together(records: Sequence[Record]) -> ItemOutcome:
    """Return one outcome of all rows, of one table and one seed: what a home would have, for its tables and pages."""
    item = records[0].item
    cells: dict[tuple[str, str], CellOutcome] = {}
    runs: dict[str, Any] = {}
    for record in records:
        cells |= {(cell.row, cell.column): cell for cell in record.outcome.cells}
        runs |= record.outcome.runs
    order = [(cell.row.key, cell.column.key) for cell in get_item(item).at(SCALE).cells()]
    absent = [CellOutcome(row, column, run=row, reason="not measured yet") for row, column in order if (row, column) not in cells]
    cells |= {(cell.row, cell.column): cell for cell in absent}
    return ItemOutcome(item, SCALE, tuple(cells[place] for place in order), runs)


def number(record: Record, column: str) -> Reading | None:
    """Return the number of a row in a column."""
    cell = record.outcome.cell(record.row, column)
    return cell.paper if cell is not None else None
