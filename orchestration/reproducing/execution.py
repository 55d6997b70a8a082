"""Reproducing one item: train what is missing, attack it, read the theory, and store the outcome after every step.

Everything is kept where any other command would look for it: trainings by fingerprint, blocks of evaluations by their records, readings
by the hash of the weights. So a killed reproduction goes on, and a cell that two tables share is computed once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from analysis.fingerprints import json_hash
from analysis.reproduction.outcome import ItemOutcome
from analysis.reproduction.readings import Found
from analysis.result import EvaluationResult
from models.errors import UserError
from orchestration import console
from orchestration.evaluating.evaluation_report import summarize
from orchestration.evaluating.evaluation_run import EvaluationSettings, Job, prepare, run_jobs, test_images
from orchestration.evaluating.stored_evaluation import as_kept
from orchestration.evaluating.tracked_evaluation import names_of
from orchestration.experiment import ExperimentConfig
from orchestration.exporting.export import record_evaluation
from orchestration.home import Home, Workplace
from orchestration.reproducing.ledger import Ledger, outcome_folder
from orchestration.reproducing.plan import Evaluation, ItemPlan, ReadingJob, evaluated_folder, evaluations, readings
from orchestration.reproducing.reading_jobs import run_readings
from orchestration.run_folder import RunFolder
from orchestration.sweeping.listed_experiments import Listed, train_all
from orchestration.tracking.experiment_run import ParentRun
from orchestration.tracking.tracker import FINGERPRINT_TAG, Tracker
from orchestration.trained_models.targets import Target
from orchestration.training import cluster
from orchestration.training.resources import concurrency, trial_resources
from orchestration.training.tracked_outcome import track_model
from trainers.data import load_data

REPRODUCTION_TAG = "rayndom.reproduction"
KIND = "row"

_NOT_IN_NAMES = re.compile(r"[^\w\-. /]")


def check_before_start(plans: Sequence[ItemPlan], workplace: Workplace) -> None:
    """Find out before anything starts whether data sets and resources are there; Ray is not started for what CPUs have trained already.

    Raises:
        UserError: they are not; says what to do.
    """
    experiments = {each.fingerprint: each.experiment for planned in plans for each in planned.unique}
    for data in {json_hash(each.data.model_dump(mode="json")): each.data for each in experiments.values()}.values():
        load_data(data, workplace.data_root)
    if not any(
        each.resources.gpus_per_worker or RunFolder(workplace.home.run(each.fingerprint)).result() is None for each in experiments.values()
    ):
        return
    available = cluster.connect(workplace.address)
    for resources in {each.resources for each in experiments.values()}:
        need = trial_resources(resources)
        if need.gpus > available.get("GPU", 0.0):
            count = sum(each.resources == resources for each in experiments.values())
            raise UserError(
                f"{count} trainings ask for {need.gpus:g} GPUs each, and there are {available.get('GPU', 0.0):g}. `--scale smoke` runs on "
                "a CPU; `--address` joins a Ray cluster that has GPUs; `--gpus-per-worker 0` trains on CPUs, which takes very long."
            )
        concurrency(need, available)


def reproduce_item(planned: ItemPlan, workplace: Workplace) -> tuple[ItemOutcome, list[str], str | None]:
    """Reproduce an item, or go on with it; return its outcome, what failed, and the id of its MLflow run.

    An item that has nothing to run has an outcome without cells and no MLflow run.
    """
    home = workplace.home
    ledger = Ledger(planned, home)
    if not planned.trainings:
        return ledger.write(), [], None
    tracker = Tracker(home, next(iter(planned.trainings.values())).experiment.tracking.experiment)
    title = f"{planned.item.name} {planned.edition}"
    parent = tracker.run("reproduction", {REPRODUCTION_TAG: title}, name=title)
    tracker.set_tags(parent, {"rayndom.title": planned.item.title})
    try:
        _train(planned, ledger, workplace, ParentRun(tracker, parent))
        _evaluate(planned, ledger, workplace, tracker)
        _read(planned, ledger, workplace)
    except BaseException:  # Ctrl-C and SystemExit too: it is raised again
        # Whatever stopped it, what is known stays readable; the next start sets the run to running again.
        ledger.write()
        tracker.finish(parent, "KILLED")
        raise
    outcome = ledger.write()
    tracker.log_metrics(parent, _cell_metrics(outcome))
    tracker.finish(parent, "FAILED" if ledger.problems else "FINISHED")
    return outcome, ledger.problems, parent


def track_folder(planned: ItemPlan, home: Home, parent: str | None) -> None:
    """Store outcome, tables and figures in the item's MLflow run."""
    if parent is not None:
        tracker = Tracker(home, next(iter(planned.trainings.values())).experiment.tracking.experiment)
        tracker.log_folder(parent, outcome_folder(home, planned.item.name, planned.edition), "reproduction")


def _train(planned: ItemPlan, ledger: Ledger, workplace: Workplace, parent: ParentRun) -> None:
    tracker = parent.tracker

    def ended(experiment: ExperimentConfig) -> None:
        ledger.write()

    if not planned.unique:
        return
    listed = [Listed(f"{planned.item.name} {each.key}", each.experiment) for each in planned.unique]
    failures = train_all(KIND, listed, workplace, parent, on_end=ended)
    children = {run.data.tags[FINGERPRINT_TAG]: run.info.run_id for run in tracker.children(parent.run_id, KIND)}
    for training in planned.unique:
        if training.fingerprint in failures:
            ledger.training_failed(training, failures[training.fingerprint])
            continue
        run_id = children[training.fingerprint]
        ledger.mlflow_runs[training.fingerprint] = run_id
        track_model(tracker, run_id, training.experiment)


class _Images:
    """Test images, read once for all jobs that share them."""

    def __init__(self, data_root: Path | None) -> None:
        self.data_root = data_root
        self._known: dict[str, tuple[Tensor, Tensor]] = {}

    def of(self, evaluation: Evaluation) -> tuple[Tensor, Tensor]:
        """Return the images of an evaluation."""
        data, count = evaluation.training.experiment.data, evaluation.suite.num_samples
        key = json_hash([data.model_dump(mode="json"), count])
        if key not in self._known:
            self._known[key] = test_images(data, self.data_root, count)
        return self._known[key]


def _evaluate(planned: ItemPlan, ledger: Ledger, workplace: Workplace, tracker: Tracker) -> None:
    home, images = workplace.home, _Images(workplace.data_root)
    # Rows that are one experiment at this scale are evaluated once.
    jobs: dict[str, Job] = {}
    owners: dict[str, list[Evaluation]] = {}
    for evaluation in evaluations(planned, home, ledger.trained()):
        training = evaluation.training
        content = evaluation.suite.model_dump(mode="json", exclude={"name", "description"})
        key = json_hash([training.fingerprint, dict(training.run.evaluated_with), evaluation.name, content])
        owners.setdefault(key, []).append(evaluation)
        if len(owners[key]) > 1:
            continue
        settings = EvaluationSettings(suite=evaluation.suite)
        try:
            target = Target(evaluated_folder(home, training), training.experiment)
            jobs[key] = prepare(f"{training.key} {evaluation.name}", target, settings, workplace, images.of(evaluation))
        except UserError as error:
            ledger.evaluation_failed(evaluation, str(error))
    owned = {id(job): owners[key] for key, job in jobs.items()}

    def done(job: Job) -> None:
        result = job.result()
        for evaluation in owned[id(job)]:
            ledger.evaluated(evaluation, result)
        first = owned[id(job)][0]
        _track(job, result, first, ledger.mlflow_runs.get(first.training.fingerprint), tracker)
        ledger.write()

    def failed(job: Job, error: Exception) -> None:
        console.warn(f"{job.name}: {_last_line(error)}")
        for evaluation in owned[id(job)]:
            ledger.evaluation_failed(evaluation, _last_line(error))
        ledger.write()

    pending = [job for job in jobs.values() if job.pending]
    for job in jobs.values():
        if not job.pending:
            for evaluation in owned[id(job)]:
                ledger.evaluated(evaluation, job.result())
    needs = [trial_resources(each.experiment.resources) for each in planned.unique]
    gpus = max((need.gpus / need.workers for need in needs), default=0.0)
    if pending:
        run_jobs(pending, workers=None, gpus_per_worker=gpus, address=workplace.address, on_done=done, on_failure=failed)


def _track(job: Job, result: EvaluationResult, evaluation: Evaluation, run_id: str | None, tracker: Tracker) -> None:
    """Write an evaluation to the model's card and to its MLflow run."""
    base = " ".join(filter(None, (evaluation.name, evaluation.training.run.evaluation_remark)))
    summary = as_kept(job, summarize(result, base))
    if not evaluation.place.is_transfer:
        record_evaluation(job.target.folder, job.target, summary)
    if run_id is None:
        return
    found = {name.removeprefix("test/"): row.estimate.value for row in result.rows for name in names_of(row)}
    tracker.log_metrics(run_id, {_metric_name(f"test/{base}/{name}"): value for name, value in found.items()})
    tracker.set_tags(run_id, {f"rayndom.marked.{base.replace(' ', '_')}": result.marked})
    tracker.log_json(run_id, summary, f"evaluation/{base.replace(' ', '_')}.json")


def _read(planned: ItemPlan, ledger: Ledger, workplace: Workplace) -> None:
    def done(job: ReadingJob, found: Found) -> None:
        ledger.read(job, found)
        ledger.write()

    def failed(job: ReadingJob, error: Exception) -> None:
        console.warn(f"{job.title}: {_last_line(error)}")
        ledger.reading_failed(job, _last_line(error))
        ledger.write()

    jobs = readings(planned, ledger.trained())
    run_readings(jobs, workplace, on_done=done, on_failure=failed)


def _last_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__


def _cell_metrics(outcome: ItemOutcome) -> Mapping[str, float]:
    metrics: dict[str, Any] = {}
    for cell in outcome.cells:
        for name, reading in (("paper", cell.paper), ("honest", cell.honest)):
            if reading is not None and reading.value is not None:
                metrics[_metric_name(f"{name}/{cell.row}/{cell.column}")] = reading.value
    return metrics


def _metric_name(name: str) -> str:
    return _NOT_IN_NAMES.sub(".", name)
