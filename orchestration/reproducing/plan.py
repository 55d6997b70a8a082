"""What a reproduction needs: which rows and columns, which trainings, which evaluations, which readings of the theory."""

from __future__ import annotations

import fnmatch
import functools
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from analysis.evaluation.suites import AttackItem, Suite
from analysis.quantities.quantity import quantity
from analysis.reproduction.papers import ITEMS_LISTED, Cell, Item, get_item, list_items, list_papers
from analysis.reproduction.papers.measures import Clean, Measure, Theory, Timing, TransferAccuracy
from analysis.reproduction.papers.model import Column, Row, Run
from analysis.reproduction.scale import BUDGETS, Scale
from analysis.reproduction.suites import evaluation_suites, measure_at, suite_for, transfer_item, transfer_suite
from models.errors import UserError, unknown_name
from models.weights import with_other_parameters
from orchestration.experiment import ExperimentConfig
from orchestration.home import Home
from orchestration.recipes import load_recipe
from orchestration.reproducing.scaling import scaled
from orchestration.run_folder import RunFolder

ALL = "all"


@dataclass(frozen=True)
class Training:
    """One training of an item.

    Attributes:
        key: of `ItemOutcome.runs`. row: of the item. group: of its columns, empty if all columns share it. run: as the item has it.
        experiment: at the scale.
    """

    key: str
    row: Row
    group: str
    run: Run
    scale: Scale
    experiment: ExperimentConfig

    @property
    def fingerprint(self) -> str:
        """Of its experiment."""
        return self.experiment.fingerprint

    @property
    def overrides(self) -> tuple[str, ...]:
        """What makes its experiment of its recipe, `section.field=value`: the row's changes, and at a reduced scale those of the scale."""
        if self.scale == "paper":
            return self.run.overrides + ((f"seed={self.experiment.seed}",) if self.experiment.seed else ())
        recipe = recipe_experiment(self.run.recipe, ()).flatten()
        values = {name: value for name, value in self.experiment.flatten().items() if name not in recipe or recipe[name] != value}
        return tuple(f"{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in values.items())


class Place(NamedTuple):
    """Which one among an item's evaluations.

    Attributes:
        training: its key. base: the shipped suite that the evaluation is made from. is_transfer: whether its examples are made on other
            networks than the one that answers.
    """

    training: str
    base: str
    is_transfer: bool = False

    @property
    def name(self) -> str:
        """Of its checks in `RunOutcome`."""
        return f"{self.base} transfer" if self.is_transfer else self.base


@dataclass(frozen=True)
class Evaluation:
    """Attacks on one trained network. `training`: whose network answers. `suite`: what is run."""

    place: Place
    training: Training
    suite: Suite

    @property
    def name(self) -> str:
        """Of its checks in `RunOutcome`."""
        return self.place.name


@dataclass(frozen=True)
class ReadingJob:
    """A quantity of the theory or a time to be read from a trained network. `other`: the training of the second network, if there is one.

    Cells that read different fields of one result share a job.
    """

    training: Training
    measure: Theory | Timing
    other: Training | None = None

    @property
    def trainings(self) -> tuple[Training, ...]:
        """Of its networks."""
        return (self.training,) if self.other is None else (self.training, self.other)

    @property
    def place(self) -> tuple[tuple[str, ...], str]:
        """Which it is: equal for jobs that read the same networks in the same way."""
        return tuple(each.fingerprint for each in self.trainings), repr(self.measure.whole)

    @property
    def title(self) -> str:
        """In words."""
        return f"{self.training.key}: {self.measure.title}"

    @property
    def limit(self) -> int | None:
        """At most so many test images; None: the measure's own number."""
        return BUDGETS[self.training.scale].num_samples


@dataclass(frozen=True)
class ItemPlan:
    """What an item needs at a scale.

    Attributes:
        item: as far as the scale has it. seed: of all trainings, 0 that of the recipes.
        rows, columns: keys of those asked for. trainings: by key, those of rows that only lend their networks included.
    """

    item: Item
    scale: Scale
    seed: int
    rows: frozenset[str]
    columns: frozenset[str]
    trainings: Mapping[str, Training]

    @property
    def edition(self) -> str:
        """Under which its outcome is kept: the scale, and the seed where it is not that of the recipes."""
        return f"{self.scale}-seed-{self.seed}" if self.seed else self.scale

    def cells(self) -> Iterator[Cell]:
        """Yield the cells that are asked for and to be measured."""
        return (cell for cell in self.item.cells() if cell.run is not None and self.wants(cell))

    def wants(self, cell: Cell) -> bool:
        """Return whether a cell is asked for."""
        return cell.row.key in self.rows and cell.column.key in self.columns

    def training(self, row: Row, column: Column) -> Training:
        """Return the training that a row's cell in a column rests on."""
        return self.trainings[training_key(row, column)]

    def other(self, cell: Cell, measure: Measure) -> Training | None:
        """Return the training of the second network of a measure."""
        row = self.item.other_row(cell.row, measure)
        return None if row is None else self.training(row, cell.column)

    def transfer(self, cell: Cell) -> tuple[Training, Training]:
        """Return the training whose network answers in a transfer between networks, and the one whose examples it sees."""
        measure, own = cell.column.measure, self.training(cell.row, cell.column)
        other = self.other(cell, measure)
        assert isinstance(measure, TransferAccuracy) and other is not None
        return (own, other) if measure.made_on == "other" else (other, own)

    @functools.cached_property
    def unique(self) -> list[Training]:
        """One training per fingerprint, of those whose trained network some cell needs."""
        needed = {each.key for cell in self.cells() if not is_untrained(cell.column.measure) for each in self.networks(cell)}
        found: dict[str, Training] = {}
        for training in self.trainings.values():
            if training.key in needed:
                found.setdefault(training.fingerprint, training)
        return list(found.values())

    def networks(self, cell: Cell) -> list[Training]:
        """Return the training of a cell's network, and that of its second one."""
        other = self.other(cell, cell.column.measure)
        return [each for each in (self.training(cell.row, cell.column), other) if each is not None]


def is_untrained(measure: Measure) -> bool:
    """Return whether training changes nothing of what is measured."""
    return isinstance(measure, Theory) and not quantity(measure.name).trained


def training_key(row: Row, column: Column) -> str:
    """Return the key of the training of a row's cell in a column: `row`, or `row|group` where columns of a group have their own."""
    return f"{row.key}|{column.group}" if column.group in row.runs else row.key


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
            raise unknown_name("table or figure", name, [*known, *list_papers(), ALL], listed=ITEMS_LISTED)
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
    seed: int = 0,
) -> ItemPlan:
    """Return what an item needs.

    Args:
        rows, columns: keys asked for; None: all.
        gpus_per_worker: instead of the recipes' own. seed: of all trainings.

    Raises:
        UserError: a negative number of GPUs.
    """
    if gpus_per_worker is not None and gpus_per_worker < 0:
        raise UserError(f"--gpus-per-worker {gpus_per_worker:g}: a share of a GPU is 0 or more")
    item = item.at(scale)
    kept_rows = frozenset(row.key for row in item.rows if rows is None or row.key in rows)
    kept_columns = frozenset(column.key for column in item.columns if columns is None or column.key in columns)
    asked = [
        (row, column)
        for row in item.rows
        for column in item.columns
        if row.key in kept_rows and column.key in kept_columns and row.run_for(column) is not None
    ]
    lenders = ((item.other_row(row, column.measure), column) for row, column in asked)
    needed = {training_key(row, column) for row, column in (*asked, *lenders) if row is not None}
    trainings = {each.key: each for each in planned_trainings(item, scale, gpus_per_worker, seed) if each.key in needed}
    return ItemPlan(item, scale, seed, kept_rows, kept_columns, trainings)


def planned_trainings(item: Item, scale: Scale, gpus_per_worker: float | None = None, seed: int = 0) -> list[Training]:
    """Return the trainings of all rows that an item has at a scale; equal experiments among them have equal fingerprints.

    Args:
        gpus_per_worker, seed: as in `plan_item`.
    """
    item = item.at(scale)
    found: dict[str, Training] = {}
    for row in item.rows:
        for column in item.columns:
            run, key = row.run_for(column), training_key(row, column)
            if run is not None and key not in found:
                group = column.group if column.group in row.runs else ""
                found[key] = Training(key, row, group, run, scale, _experiment(run, scale, gpus_per_worker, seed))
    return list(found.values())


_EXPERIMENTS: dict[str, ExperimentConfig] = {}


def _experiment(run: Run, scale: Scale, gpus_per_worker: float | None, seed: int) -> ExperimentConfig:
    """Return the experiment of a run, made once: rows of many tables share it."""
    key = repr((run, scale, gpus_per_worker, seed))
    if key not in _EXPERIMENTS:
        experiment = scaled(recipe_experiment(run.recipe, run.overrides), run, scale)
        if seed:
            experiment = experiment.changed(seed=seed)
        if gpus_per_worker is not None:
            experiment = experiment.changed(resources=experiment.resources.changed(gpus_per_worker=gpus_per_worker))
        _EXPERIMENTS[key] = experiment
    return _EXPERIMENTS[key]


@functools.cache
def recipe_experiment(recipe: str, overrides: tuple[str, ...]) -> ExperimentConfig:
    """Return the experiment of a recipe with a row's changes, as the paper trains it."""
    return load_recipe(recipe, [f"--{override}" for override in overrides]).experiment


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
        training = planned.training(cell.row, cell.column)
        if isinstance(measure, TransferAccuracy):
            answering, attacked = planned.transfer(cell)
            if {answering.key, attacked.key} <= usable:
                attack = transfer_attack(planned, cell, home)
                transfers.setdefault((answering.key, measure.attack.suite), {})[attack.name] = attack
        elif training.key in usable:
            wanted.setdefault(training.key, []).extend(each for each in (measure, measure.honest) if each is not None)
    for key, measures in wanted.items():
        training = planned.trainings[key]
        suites = evaluation_suites(planned.item, training.row, training.run, planned.scale)
        for index, (base, suite) in enumerate(suites.items()):
            # Clean images are scored once, with the first suite.
            needed = suite_for(base, suite, [each for each in measures if index == 0 or not isinstance(each, Clean)])
            if needed is not None:
                found.append(Evaluation(Place(key, base), training, needed))
        if not suites and any(isinstance(each, Clean) for each in measures) and not any(answering == key for answering, _ in transfers):
            transfers.setdefault((key, _transfer_base(planned.item)), {})
    for (key, base), attacks in transfers.items():
        training = planned.trainings[key]
        title = f"{planned.item.name}/{training.row.key} transfer"
        suite = transfer_suite(base, attacks.values(), title, training.run, planned.scale)
        found.append(Evaluation(Place(key, base, is_transfer=True), training, suite))
    return found


def transfer_attack(planned: ItemPlan, cell: Cell, home: Home) -> AttackItem:
    """Return the attack of a transfer between networks, named after the attacked network: several may be attacked for one that answers."""
    measure = cell.column.measure
    assert isinstance(measure, TransferAccuracy)
    answering, attacked = planned.transfer(cell)
    attack = transfer_item(measure, answering.run, planned.scale, model_folder(home, attacked))
    return attack.model_copy(update={"name": f"{measure.attack.row_name} made on {attacked.fingerprint}"})


def _transfer_base(item: Item) -> str:
    return next((c.measure.attack.suite for c in item.columns if isinstance(c.measure, TransferAccuracy)), "quick")


def readings(planned: ItemPlan, trained: Collection[str] | None = None) -> list[ReadingJob]:
    """Return the quantities of the theory, and the times that are not in the history of a training; each once.

    Args:
        trained: as in `evaluations`.
    """
    found: dict[Any, ReadingJob] = {}
    for cell in planned.cells():
        job = reading_of(planned, cell)
        if job is None:
            continue
        if trained is None or is_untrained(job.measure) or all(each.fingerprint in trained for each in job.trainings):
            found.setdefault(job.place, job)
    return list(found.values())


def reading_of(planned: ItemPlan, cell: Cell) -> ReadingJob | None:
    """Return the reading that a cell needs; None for cells that attacks or the history fill."""
    training = planned.training(cell.row, cell.column)
    measure = measure_at(cell.column.measure, training.run, planned.scale)
    if isinstance(measure, Theory):
        return ReadingJob(training, measure, planned.other(cell, measure))
    if isinstance(measure, Timing) and measure.quantity == "test_set_seconds":
        return ReadingJob(training, measure)
    return None


def data_sources(plans: Sequence[ItemPlan]) -> list[tuple[str, str | None]]:
    """Return the data sets of all trainings, each with the folder of images where it is one."""
    sources = (each.experiment.data for planned in plans for each in planned.unique)
    return list(dict.fromkeys((data.name, data.folder) for data in sources))


def check_something_to_do(plans: Sequence[ItemPlan]) -> None:
    """Raise a UserError if no cell of any item is asked for though items have cells."""
    if any(planned.item.rows for planned in plans) and not any(True for planned in plans for _ in planned.cells()):
        raise UserError("no cell of these rows and columns is to be measured: they are quoted from other papers or do not exist")


def model_folder(home: Home, training: Training) -> Path:
    """Return where the exported network of a training is, once it is trained."""
    return RunFolder(home.run(training.fingerprint)).model


def evaluated_folder(home: Home, training: Training) -> Path:
    """Return where the network that a row evaluates is: the training's, or one of its weights with other parameters, which is written.

    Raises:
        UserError: the weights do not fit a network with these parameters.
    """
    folder, changes = model_folder(home, training), training.run.evaluated_with
    if not changes:
        return folder
    name = re.sub(r"[^\w=]+", "-", training.run.evaluation_remark)
    return with_other_parameters(folder, changes, folder.with_name(f"{folder.name}-{name}"))
