"""What a reproduction needs: which rows and columns, which trainings, which evaluations, which readings of the theory."""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from analysis.evaluation.suites import AttackItem, Suite
from analysis.reproduction.papers import Cell, Item, get_item, list_items, list_papers
from analysis.reproduction.papers.measures import Clean, Measure, Theory, Timing, TransferAccuracy
from analysis.reproduction.papers.model import Column
from analysis.reproduction.scale import Scale
from analysis.reproduction.suites import PlannedRun, evaluation_suites, measure_at, plan, suite_for, transfer_item, transfer_suite
from models.errors import UserError, unknown_name
from orchestration.experiment import ExperimentConfig
from orchestration.home import Home
from orchestration.recipes import load_recipe
from orchestration.run_folder import RunFolder

ALL = "all"
TRANSFER = "transfer"


@dataclass(frozen=True)
class Training:
    """One training of an item. `key`: of `ItemOutcome.runs`."""

    key: str
    planned: PlannedRun
    experiment: ExperimentConfig

    @property
    def fingerprint(self) -> str:
        """Of its experiment."""
        return self.experiment.fingerprint


@dataclass(frozen=True)
class Evaluation:
    """Attacks on one trained network.

    Attributes:
        training: whose network answers. base: name of the checks in `RunOutcome`: the shipped suite, for examples of other networks with
            `transfer` behind it. suite: what is run.
    """

    training: Training
    base: str
    suite: Suite


@dataclass(frozen=True)
class WantedReading:
    """A quantity of the theory or a time that some cell needs. `other`: the training of the second network, if there is one."""

    training: Training
    measure: Theory | Timing
    other: Training | None = None


@dataclass(frozen=True)
class ItemPlan:
    """What an item needs at a scale.

    Attributes:
        rows, columns: keys of those asked for. trainings: by key, those of rows that only lend their networks included.
    """

    item: Item
    scale: Scale
    rows: frozenset[str]
    columns: frozenset[str]
    trainings: Mapping[str, Training]

    def cells(self) -> Iterator[Cell]:
        """Yield the cells that are asked for and to be measured."""
        return (cell for cell in self.item.cells() if cell.run is not None and self.wants(cell))

    def wants(self, cell: Cell) -> bool:
        """Return whether a cell is asked for."""
        return cell.row.key in self.rows and cell.column.key in self.columns

    def training(self, row: str, column: Column) -> Training:
        """Return the training that a row's cell in a column rests on."""
        return self.trainings[training_key(self.item, row, column)]

    def other(self, cell: Cell, measure: Measure) -> Training | None:
        """Return the training of the second network of a measure."""
        row = self.item.other_row(cell.row, measure)
        return None if row is None else self.training(row.key, cell.column)

    def transfer(self, cell: Cell) -> tuple[Training, Training]:
        """Return the training whose network answers in a transfer between networks, and the one whose examples it sees."""
        measure, own = cell.column.measure, self.training(cell.row.key, cell.column)
        other = self.other(cell, measure)
        assert isinstance(measure, TransferAccuracy) and other is not None
        return (own, other) if measure.made_on == "other" else (other, own)

    @property
    def unique(self) -> list[Training]:
        """One training per fingerprint."""
        return list({each.fingerprint: each for each in reversed(self.trainings.values())}.values())[::-1]


def training_key(item: Item, row: str, column: Column) -> str:
    """Return the key of the training of a row's cell in a column: `row`, or `row|group` where columns of a group have their own."""
    return f"{row}|{column.group}" if column.group in item.row(row).runs else row


def find_items(names: Sequence[str]) -> list[Item]:
    """Return the items that names stand for: an item's own, a paper's for all its items, `all`, or a pattern as `ctrw.table*`.

    Raises:
        UserError: an unknown name.
    """
    known = list_items()
    found: dict[str, None] = {}
    for name in names:
        if name == ALL:
            matches = known
        elif name in list_papers():
            matches = [each for each in known if each.startswith(f"{name}.")]
        else:
            matches = fnmatch.filter(known, name)
        if not matches:
            raise unknown_name("table or figure", name, [*known, *list_papers(), ALL])
        found |= dict.fromkeys(matches)
    return [get_item(name) for name in found]


def choose_keys(kind: str, items: Sequence[Item], patterns: Sequence[str]) -> frozenset[str]:
    """Return the keys of all rows (`kind` row) or columns (column) of items that some pattern fits; without patterns all.

    Raises:
        UserError: a pattern fits nothing.
    """
    keys = dict.fromkeys(entry.key for item in items for entry in (item.rows if kind == "row" else item.columns))
    chosen: set[str] = set()
    for pattern in patterns:
        matches = [key for key in keys if key == pattern] or fnmatch.filter(keys, pattern)
        if not matches:
            raise unknown_name(f"{kind} of {', '.join(item.name for item in items)}", pattern, keys)
        chosen |= {*matches}
    return frozenset(chosen if patterns else keys)


def plan_item(
    item: Item,
    scale: Scale,
    rows: Collection[str] | None = None,
    columns: Collection[str] | None = None,
    gpus_per_worker: float | None = None,
) -> ItemPlan:
    """Return what an item needs.

    Args:
        rows, columns: keys asked for; None: all.
        gpus_per_worker: instead of the recipes' own.
    """
    kept_rows = frozenset(row.key for row in item.rows if rows is None or row.key in rows)
    kept_columns = frozenset(column.key for column in item.columns if columns is None or column.key in columns)
    all_runs = {f"{each.row}|{each.group}" if each.group else each.row: each for each in plan(item, scale)}
    needed: dict[str, None] = {}
    for row in item.rows:
        for column in item.columns:
            if row.key not in kept_rows or column.key not in kept_columns or row.run_for(column) is None:
                continue
            needed[training_key(item, row.key, column)] = None
    for row in item.rows:
        for column in item.columns:
            if row.key in kept_rows and column.key in kept_columns and row.run_for(column) is not None:
                other = item.other_row(row, column.measure)
                if other is not None:
                    needed[training_key(item, other.key, column)] = None
    trainings = {
        key: Training(key, planned, resolved_experiment(planned.recipe, planned.overrides, gpus_per_worker))
        for key, planned in all_runs.items()
        if key in needed
    }
    return ItemPlan(item, scale, kept_rows, kept_columns, trainings)


@functools.cache
def resolved_experiment(recipe: str, overrides: tuple[str, ...], gpus_per_worker: float | None = None) -> ExperimentConfig:
    """Return the experiment of a planned run, read once. Rows of many tables share it."""
    experiment = load_recipe(recipe, [f"--{override}" for override in overrides]).experiment
    if gpus_per_worker is None:
        return experiment
    resources = experiment.resources.model_copy(update={"gpus_per_worker": gpus_per_worker})
    return experiment.model_copy(update={"resources": resources})


def evaluations(planned: ItemPlan, home: Home, trained: Collection[str] | None = None) -> list[Evaluation]:
    """Return what to attack.

    Args:
        trained: fingerprints of networks that exist; None: all will.
    """
    usable = {key for key, each in planned.trainings.items() if trained is None or each.fingerprint in trained}
    found: list[Evaluation] = []
    wanted: dict[str, list[Measure]] = {}
    transfers: dict[tuple[str, str], dict[str, AttackItem]] = {}
    for cell in planned.cells():
        measure = cell.column.measure
        training = planned.training(cell.row.key, cell.column)
        if isinstance(measure, TransferAccuracy):
            answering, attacked = planned.transfer(cell)
            if {answering.key, attacked.key} <= usable:
                attack = transfer_attack(planned, cell, home)
                transfers.setdefault((answering.key, measure.attack.suite), {})[attack.name] = attack
        elif training.key in usable:
            wanted.setdefault(training.key, []).extend(each for each in (measure, measure.honest) if each is not None)
    for key, measures in wanted.items():
        training = planned.trainings[key]
        suites = evaluation_suites(planned.item, training.planned)
        for index, suite in enumerate(suites):
            # Clean images are scored once, with the first suite.
            needed = suite_for(suite, [each for each in measures if index == 0 or not isinstance(each, Clean)])
            if needed is not None:
                found.append(Evaluation(training, suite.name.split()[-1], needed))
        if not suites and any(isinstance(each, Clean) for each in measures) and not any(answering == key for answering, _ in transfers):
            transfers.setdefault((key, _transfer_base(planned.item)), {})
    for (key, base), attacks in transfers.items():
        training = planned.trainings[key]
        found.append(Evaluation(training, f"{base} {TRANSFER}", transfer_suite(base, attacks.values(), training.planned)))
    return found


def transfer_attack(planned: ItemPlan, cell: Cell, home: Home) -> AttackItem:
    """Return the attack of a transfer between networks, named after the attacked network: several may be attacked for one that answers."""
    measure = cell.column.measure
    assert isinstance(measure, TransferAccuracy)
    answering, attacked = planned.transfer(cell)
    attack = transfer_item(measure, answering.planned.run, planned.scale, RunFolder(home.run(attacked.fingerprint)).model)
    return attack.model_copy(update={"name": f"{measure.attack.row_name} made on {attacked.fingerprint}"})


def _transfer_base(item: Item) -> str:
    return next((c.measure.attack.suite for c in item.columns if isinstance(c.measure, TransferAccuracy)), "quick")


def readings(planned: ItemPlan, trained: Collection[str] | None = None) -> list[WantedReading]:
    """Return the quantities of the theory, and the times that are not in the history of a training; each once.

    Args:
        trained: as in `evaluations`.
    """
    found: dict[str, WantedReading] = {}
    for cell in planned.cells():
        reading = reading_of(planned, cell)
        if reading is None:
            continue
        fingerprints = [each.fingerprint for each in (reading.training, reading.other) if each is not None]
        if trained is None or all(each in trained for each in fingerprints):
            # Cells that read different fields of one result share it.
            whole = replace(reading.measure, field="") if isinstance(reading.measure, Theory) else reading.measure
            found.setdefault(f"{fingerprints} {whole}", reading)
    return list(found.values())


def reading_of(planned: ItemPlan, cell: Cell) -> WantedReading | None:
    """Return the reading that a cell needs; None for cells that attacks or the history fill."""
    training = planned.training(cell.row.key, cell.column)
    measure = measure_at(cell.column.measure, training.planned.run, planned.scale)
    if isinstance(measure, Theory):
        return WantedReading(training, measure, planned.other(cell, measure))
    if isinstance(measure, Timing) and measure.quantity == "test_set_seconds":
        return WantedReading(training, measure)
    return None


def dataset_names(plans: Sequence[ItemPlan]) -> list[str]:
    """Return the data sets of all trainings."""
    return list(dict.fromkeys(each.experiment.data.name for planned in plans for each in planned.trainings.values()))


def check_something_to_do(plans: Sequence[ItemPlan]) -> None:
    """Raise a UserError if no cell of any item is asked for though items have cells."""
    if any(planned.item.rows for planned in plans) and not any(True for planned in plans for _ in planned.cells()):
        raise UserError("no cell of these rows and columns is to be measured: they are quoted from other papers or do not exist")


def model_folder(home: Home, training: Training) -> Path:
    """Return where the exported network of a training is, once it is trained."""
    return RunFolder(home.run(training.fingerprint)).model
