"""What is known of an item while it is reproduced, and the outcome that follows from it; the file on disk is renewed as more is known."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from analysis.evaluation.measurements import measurements
from analysis.reporting.conclusion import conclusion
from analysis.reproduction.outcome import CellOutcome, CheckOutcome, ItemOutcome, Reading, RunOutcome
from analysis.reproduction.papers import Cell, get_paper
from analysis.reproduction.papers.measures import Accuracy, Clean, Measure, Theory, Timing, TransferAccuracy, WorstCase
from analysis.reproduction.readings import Found
from analysis.reproduction.suites import attack_item, read_row
from analysis.result import EvaluationResult, Row
from analysis.statistics import Estimate
from models.errors import UserError
from models.files import write_text
from models.json_text import read_json
from models.weights import read_config
from orchestration.environment import cpu_model
from orchestration.home import Home
from orchestration.reproducing.plan import (
    Evaluation,
    ItemPlan,
    Place,
    ReadingJob,
    Training,
    is_untrained,
    model_folder,
    plan_item,
    reading_of,
    training_key,
    transfer_attack,
)
from orchestration.run_folder import RunFolder
from trainers.hardware import GPU_METRIC, PROCESS_METRIC

NOT_ASKED = "not asked for"
EPOCH_SECONDS = "time/epoch_seconds"
NOT_EVALUATED = "not evaluated yet"
NOT_MEASURED = "not measured yet"


def outcome_folder(home: Home, item: str, edition: str) -> Path:
    """Return where the outcome of an item and what is drawn from it are kept; `edition`: `ItemPlan.edition`."""
    return home.root / "reproductions" / item / edition


def read_outcome(home: Home, item: str, edition: str) -> ItemOutcome | None:
    """Return the outcome that is on disk, None if there is none; `edition`: as above.

    Raises:
        UserError: it is damaged.
    """
    path = outcome_folder(home, item, edition) / "outcome.json"
    if not os.path.lexists(path):
        return None
    outcome = ItemOutcome.from_content(read_json(path), path)
    if outcome.item != item or outcome.scale != edition.partition("-")[0]:
        raise UserError(f"{path} is the outcome of {outcome.item} at scale {outcome.scale}; delete it, `rayndom reproduce` writes it again")
    return outcome


@dataclass(frozen=True)
class _Missing:
    """Why there is no number; `expected`: whether there could be one."""

    reason: str
    expected: bool = True


class Ledger:
    """Collects what is found for one item.

    Attributes:
        failures: why trainings failed, by fingerprint. problems: everything that failed, in words.
    """

    def __init__(self, planned: ItemPlan, home: Home) -> None:
        self.planned, self.home = planned, home
        self.everything = plan_item(planned.item, planned.scale, seed=planned.seed).trainings
        self.before = read_outcome(home, planned.item.name, planned.edition)
        self.failures: dict[str, str] = {}
        self.mlflow_runs: dict[str, str] = {}
        self.problems: list[str] = []
        self._results: dict[Place, EvaluationResult] = {}
        self._not_evaluated: dict[Place, str] = {}
        self._found: dict[Any, Found] = {}
        self._finished: dict[str, dict[str, Any]] = {}
        self._environments: dict[str, Mapping[str, Any]] = {}

    def trained(self) -> set[str]:
        """Return the fingerprints of finished trainings."""
        return {each.fingerprint for each in self.planned.unique if self._trained(each) is not None}

    def _trained(self, training: Training) -> dict[str, Any] | None:
        """Return the result of a finished training, None for others."""
        if training.fingerprint not in self._finished:
            result = RunFolder(self.home.run(training.fingerprint)).result()
            if result is None:
                return None
            self._finished[training.fingerprint] = result
        return self._finished[training.fingerprint]

    def training_failed(self, training: Training, reason: str) -> None:
        """Note why a training has no network."""
        self.failures[training.fingerprint] = reason
        self.problems.append(f"{training.key}: training failed: {reason}")

    def evaluated(self, evaluation: Evaluation, result: EvaluationResult) -> None:
        """Take the result of a finished evaluation."""
        self._results[evaluation.place] = result

    def evaluation_failed(self, evaluation: Evaluation, reason: str) -> None:
        """Note why an evaluation has no result."""
        self._not_evaluated[evaluation.place] = f"evaluation failed: {reason}"
        self.problems.append(f"{evaluation.training.key} under {evaluation.name}: {reason}")

    def read(self, job: ReadingJob, found: Found) -> None:
        """Take what a reading found."""
        self._found[job.place] = found

    def reading_failed(self, job: ReadingJob, reason: str) -> None:
        """Note why a reading has no number."""
        self.read(job, Found(reason=f"failed: {reason}"))
        self.problems.append(f"{job.title}: {reason}")

    def write(self) -> ItemOutcome:
        """Renew the outcome on disk and return it."""
        outcome = self.outcome()
        folder = outcome_folder(self.home, outcome.item, self.planned.edition)
        write_text(folder / "outcome.json", outcome.to_json())
        return outcome

    def outcome(self) -> ItemOutcome:
        """Return all that is known, cells that were found earlier and not asked for this time included."""
        item = self.planned.item
        cells, keys = [], set(self.planned.trainings)
        for cell in item.cells():
            if cell.run is None:
                cells.append(CellOutcome(cell.row.key, cell.column.key, reason=f"quoted by the paper from {cell.row.quoted}"))
            elif self.planned.wants(cell):
                found = self._cell(cell)
                if found.reason in (NOT_EVALUATED, NOT_MEASURED):
                    earlier = self._earlier(cell)
                    found = earlier if earlier.paper is not None else found
                cells.append(found)
            else:
                cells.append(self._earlier(cell))
                keys.add(cells[-1].run)
        runs = {key: self._run(training) for key, training in self.everything.items() if key in keys}
        return ItemOutcome(item.name, self.planned.scale, tuple(cells), runs)

    def _earlier(self, cell: Cell) -> CellOutcome:
        """Return what an earlier reproduction found for a cell, if its training is still the same one."""
        key = training_key(cell.row, cell.column)
        run = self._earlier_run(key)
        found = self.before.cell(cell.row.key, cell.column.key) if self.before is not None else None
        return CellOutcome(cell.row.key, cell.column.key, run=key, reason=NOT_ASKED) if run is None or found is None else found

    def _earlier_run(self, key: str) -> RunOutcome | None:
        run = self.before.runs.get(key) if self.before is not None else None
        return run if run is not None and run.fingerprint == self.everything[key].fingerprint else None

    def _cell(self, cell: Cell) -> CellOutcome:
        training = self.planned.training(cell.row, cell.column)
        empty = CellOutcome(cell.row.key, cell.column.key, run=training.key)
        measure = cell.column.measure
        for needed in () if is_untrained(measure) else self.planned.networks(cell):
            if (state := self._state(needed)) != "finished":
                return replace(empty, reason=state if needed is training else f"its second network, {needed.key}: {state}")
        if isinstance(measure, Theory | Timing):
            found = self._measured(cell, training)
        else:
            found = self._attacked(cell, measure)
        if isinstance(found, _Missing):
            return replace(empty, reason=found.reason, expected=found.expected)
        honest = self._attacked(cell, measure.honest) if measure.honest not in (None, measure) else None
        return replace(empty, paper=found, honest=honest if isinstance(honest, Reading) else None)

    def _attacked(self, cell: Cell, measure: Measure) -> Reading | _Missing:
        """Return the number of an attack or of clean images."""
        training = self.planned.training(cell.row, cell.column)
        name = None
        if isinstance(measure, TransferAccuracy):
            training, attacked = self.planned.transfer(cell)
            name = transfer_attack(self.planned, cell, self.home).name
            places = [Place(training.key, measure.attack.suite, is_transfer=True)]
        elif isinstance(measure, Clean):
            known = [place for place in dict.fromkeys((*self._results, *self._not_evaluated)) if place.training == training.key]
            places = sorted(known, key=lambda place: place.is_transfer)
        elif isinstance(measure, Accuracy | WorstCase):
            places = [Place(training.key, measure.suite)]
        else:
            raise TypeError(f"{measure} is no attack")
        result = next((self._results[place] for place in places if place in self._results), None)
        if result is None:
            reasons = [self._not_evaluated.get(place) for place in places]
            return _Missing(next((reason for reason in reasons if reason), NOT_EVALUATED))
        if isinstance(measure, Clean):
            failed = failed_checks(result, ())
            clean = next(row for row in result.rows if row.attack == "clean" and row.protocol != "T4")
            images = self._images(cell, result, clean)
            return _reading(result.clean or clean.estimate, f"clean images, {clean.caption}", "", failed, images)
        if isinstance(measure, WorstCase):
            found = result.headline
            if found is None:
                return _Missing("no bounded attack of the suite ran against an unknown draw")
            how = f"worst of {len(result.headline_attacks)} attacks for each image, R={found.num_draws}, n={found.num_samples}"
            failed = failed_checks(result, result.headline_attacks)
            images = per_image(result.worst.ids, result.worst.correct_SR) if result.worst is not None and self._in_a_gain(cell) else {}
            return _reading(found, how, "T1", failed, images)
        assert isinstance(measure, Accuracy | TransferAccuracy)
        row = read_row(measure, result, name)
        if row is not None:
            attack = measure.attack if isinstance(measure, TransferAccuracy) else measure
            source = f" made on {attacked.key}, answered by {training.key}" if isinstance(measure, TransferAccuracy) else ""
            images = self._images(cell, result, row)
            failed = failed_checks(result, (row.attack,))
            return _reading(row.estimate, f"{attack.row_name}{source}, {row.caption}", attack.protocol, failed, images)
        if isinstance(measure, Accuracy):
            randomized = result.header["num_configurations"] != 1
            if not attack_item(measure, training.run, self.planned.scale).is_for(randomized):
                kind = "randomized" if randomized else "deterministic"
                return _Missing(f"{measure.attack} is not for {kind} networks", expected=False)
        return _Missing("the evaluation has no such row")

    def _in_a_gain(self, cell: Cell) -> bool:
        """Return whether a claimed gain rests on the cell's row, so that it will be compared with another row image by image."""
        gains = get_paper(self.planned.item.paper).gains
        return any(cell.row.key in (gain.row, gain.baseline) for gain in gains if gain.item == self.planned.item.name)

    def _images(self, cell: Cell, result: EvaluationResult, row: Row) -> Mapping[str, Any]:
        """Return on which images a row is right, where it will be compared image by image; of T3, which is no mean over draws, nothing."""
        if not self._in_a_gain(cell) or row.protocol == "T3":
            return {}
        for measured in measurements(result.records):
            if (measured.kind, measured.name) != ("clean" if row.attack == "clean" else "attack", row.attack):
                continue
            if measured.protocol in row.protocols:
                return per_image(measured.ids, measured.matrix())
        return {}

    def _measured(self, cell: Cell, training: Training) -> Reading | _Missing:
        """Return a quantity of the theory, a time or a size of memory."""
        measure = cell.column.measure
        job = reading_of(self.planned, cell)
        if job is None:
            assert isinstance(measure, Timing)
            return self._from_history(training, measure)
        found = self._found.get(job.place)
        if found is None:
            return _Missing(NOT_MEASURED)
        if found.reason:
            return _Missing(found.reason, expected=found.reason.startswith("failed"))
        reading = found.reading(measure.field if isinstance(measure, Theory) else "", cell.column.unit)
        if reading is None:
            return _Missing("it is not a finite number for this network", expected=False)
        where = f", {_hardware(self._environment(training))}" if isinstance(measure, Timing) else ""
        return replace(reading, how=reading.how + where)

    def _from_history(self, training: Training, measure: Timing) -> Reading | _Missing:
        """Return a time or a peak of memory from the epochs of a training, or why there is none."""
        history = (self._trained(training) or {})["history"]
        where = _hardware(self._environment(training))
        seconds = [epoch[EPOCH_SECONDS] for epoch in history if EPOCH_SECONDS in epoch]
        if not seconds and measure.quantity in ("training_minutes", "epoch_seconds"):
            return _Missing("times were not recorded when it was trained", expected=False)
        if measure.quantity == "training_minutes":
            return Reading(sum(seconds) / 60, how=f"{len(seconds)} epochs, validation apart, {where}")
        if measure.quantity == "epoch_seconds":
            return Reading(statistics.median(seconds), how=f"median of {len(seconds)} epochs, validation apart, {where}")
        for metric, what in ((GPU_METRIC, "largest sum of tensors on the GPU"), (PROCESS_METRIC, "resident memory of the whole process")):
            peaks = [epoch[metric] for epoch in history if metric in epoch]
            if peaks:
                return Reading(max(peaks), how=f"{what}, {where}")
        return _Missing("the peak of memory was not recorded when it was trained", expected=False)

    def _state(self, training: Training) -> str:
        if self._trained(training) is not None:
            return "finished"
        reason = self.failures.get(training.fingerprint)
        needed = training.key not in self.planned.trainings or any(each.fingerprint == training.fingerprint for each in self.planned.unique)
        return f"failed: {reason}" if reason else "not run" if needed else "not trained: what is measured does not need it"

    def _environment(self, training: Training) -> Mapping[str, Any]:
        if training.fingerprint not in self._environments:
            details = read_config(model_folder(self.home, training)).get("details", {})
            self._environments[training.fingerprint] = details.get("environment", {})
        return self._environments[training.fingerprint]

    def _run(self, training: Training) -> RunOutcome:
        result = self._trained(training)
        results = {place.name: found for place, found in self._results.items() if place.training == training.key}
        before = self._earlier_run(training.key)
        return RunOutcome(
            fingerprint=training.fingerprint,
            recipe=training.run.recipe,
            overrides=training.overrides,
            row=training.row.key,
            group=training.group,
            state=self._state(training),
            epochs=result["num_epochs"] if result else None,
            seconds=sum(epoch.get(EPOCH_SECONDS, 0.0) for epoch in result["history"]) if result else None,
            mlflow_run=self.mlflow_runs.get(training.fingerprint) or (before.mlflow_run if before else ""),
            environment=self._environment(training) if result else {},
            checks=dict(before.checks if before else {}) | {base: _checks(found) for base, found in results.items()},
            conclusion=dict(before.conclusion if before else {})
            | {base: conclusion(training.key, found) for base, found in results.items()},
            configuration=training.experiment.flatten(),
            evaluation_seconds=dict(before.evaluation_seconds if before else {})
            | {base: _seconds(found) for base, found in results.items()},
        )


def failed_checks(result: EvaluationResult, attacks: Iterable[str]) -> tuple[str, ...]:
    """Return the keys of the failed checks that forbid to believe a number: those about the whole evaluation, or about one of `attacks`."""
    behind = set(attacks)
    return tuple(verdict.id for verdict in result.failed if not verdict.attacks or behind & set(verdict.attacks))


def per_image(ids_S: Any, correct_SR: Any) -> Mapping[str, Any]:
    """Return the series of a reading that says on which images (S) an answer is right: the share of draws (R) on which it is."""
    return {"ids": [int(each) for each in ids_S], "correct": [round(float(share), 4) for share in correct_SR.mean(1)]}


def _reading(estimate: Estimate, how: str, protocol: str, failed: tuple[str, ...], images: Mapping[str, Any]) -> Reading:
    return Reading(
        100 * estimate.value,
        100 * estimate.low,
        100 * estimate.high,
        how,
        protocol,
        estimate.num_samples,
        estimate.num_draws,
        images,
        failed_checks=failed,
    )


def _checks(result: EvaluationResult) -> tuple[CheckOutcome, ...]:
    return tuple(CheckOutcome(each.id, each.title, each.status.value, each.explanation, each.advice) for each in result.verdicts)


def _seconds(result: EvaluationResult) -> float:
    return round(sum(record["measured"]["seconds"] for record in result.records), 1)


def _hardware(environment: Mapping[str, Any]) -> str:
    hardware = environment.get("hardware", {})
    gpus = [gpu["name"] for gpu in hardware.get("gpus", [])]
    return f"{len(gpus)}x {gpus[0]}" if gpus else str(hardware.get("cpu") or cpu_model())
