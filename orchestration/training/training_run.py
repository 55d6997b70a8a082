"""Training one experiment in this process: resumes, reports, and leaves a finished run folder.

The same function runs in the process of `rayndom train`, in a Tune trial, and in each worker of a Ray Train group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.initial_weights import WeightsReport
from models.weights import load_pretrained, read_config, save_pretrained
from orchestration import storage
from orchestration.environment import collect_environment
from orchestration.method_code import method_code
from orchestration.run_folder import RunFolder
from orchestration.training.card import model_card
from orchestration.training.final_measures import cost_metrics
from orchestration.training.job import TrainingJob
from orchestration.training.preparation import PreparedTraining, build_for
from trainers.checkpoint import read_state
from trainers.data import load_data
from trainers.data.description import describe
from trainers.distributed import world
from trainers.fit import FitResult, TrainingDiverged
from trainers.reporting import EpochReport
from trainers.selection import AVERAGE_CHOSEN
from trainers.validation_beside import Beside
from trainers.within_epoch import FOLDER as WITHIN_EPOCH
from trainers.within_epoch import forget_within_epoch

EpochListener = Callable[[EpochReport], None]
StepListener = Callable[[int, int], None]


@dataclass(frozen=True)
class RunResult:
    """A finished run.

    Attributes:
        folder: its folder; `folder.model` is the exported model.
        metrics: of the selected epoch, and what the model costs.
        selected_epoch, num_epochs: selected and trained.
        reused: whether it was finished before.
    """

    folder: RunFolder
    metrics: dict[str, float]
    selected_epoch: int
    num_epochs: int
    reused: bool


class _FolderReporter:
    """Writes the resumable state of each epoch, and of each step once the machine is about to go, then tells the listeners; the first of
    all steps tells them that it goes."""

    def __init__(
        self,
        folder: RunFolder,
        on_epoch: EpochListener,
        on_step: StepListener,
        on_ready: Callable[[], None],
        leaving: Callable[[], bool],
        keep_weights: EpochListener,
    ) -> None:
        self.folder, self.on_epoch, self.on_step, self.leaving, self.keep_weights = folder, on_epoch, on_step, leaving, keep_weights
        self._ready: Callable[[], None] | None = on_ready

    def ready(self) -> None:
        """Tell, once, that it goes."""
        if self._ready is not None:
            on_ready, self._ready = self._ready, None
            on_ready()

    def epoch_finished(self, report: EpochReport, save: Callable[[Path], None]) -> None:
        if world()[0] == 0:
            self.keep_weights(report)  # before the state, after which this epoch is not trained again
            save(self.folder.path)
            if (within := self.folder.path / WITHIN_EPOCH).exists():
                forget_within_epoch(self.folder.path)
                storage.forget(within)
            storage.keep(self.folder.path)
        self.on_epoch(report)

    def step_finished(self, step: int, num_steps: int, save: Callable[[Path], None]) -> None:
        self.ready()
        if self.leaving():
            save(self.folder.path)
            storage.keep(self.folder.path / WITHIN_EPOCH)
        self.on_step(step, num_steps)


def check_initial_weights(job: TrainingJob) -> WeightsReport | None:
    """Put the weights that a job begins with into its network and forget both: what does not fit, names of frozen parts among it, is
    found before any worker starts.

    Raises:
        UserError: they do not fit, or the data that the network is built for are not there.
    """
    if (job.initial is None and not job.experiment.training.freeze) or job.folder.has_state or job.folder.is_finished:
        return None
    network = build_for(job.experiment, load_data(job.experiment.data, job.data_root))
    return None if job.initial is None else job.initial.begin(network)


def train_here(
    job: TrainingJob,
    *,
    on_epoch: EpochListener = lambda report: None,
    on_step: StepListener = lambda step, num_steps: None,
    on_ready: Callable[[], None] = lambda: None,
    leaving: Callable[[], bool] = lambda: False,
    beside: Beside | None = None,
    on_replay: Callable[[Sequence[EpochReport]], None] | None = None,
) -> RunResult:
    """Train in this process, or go on where an earlier process stopped, or reuse a finished run.

    Epochs that were finished earlier are reported again, so that a listener always sees all of them in order.

    Args:
        job: what to train.
        on_epoch, on_step: listeners; called on every worker.
        on_ready: called before anything is reported, once it is known to go: data, network and device are there, and the first step of
            the training (which is when an objective meets them) was taken, now or by an earlier start.
        leaving: asked after every step, by every worker, whether this machine is about to be taken away: from then on the state is written
            after each step, so that at most one is lost.
        beside: where epochs may be validated while the next one trains; None: nowhere.
        on_replay: takes the epochs that were finished earlier, all at once; None: `on_epoch` does, one after the other.

    Raises:
        UserError: something does not fit. TrainingDiverged: the loss is not finite. OSError: a checkpoint could not be written.
    """
    experiment, folder = job.experiment, job.folder
    rank, _ = world()
    environment = collect_environment()  # now: code may be edited while it trains
    storage.fetch(folder.path)
    finished = folder.result()
    if finished is not None:
        on_ready()
        _replay(finished["history"], on_epoch, on_replay)
        return _reused(folder, finished)
    prepared = PreparedTraining(experiment, job.data_root)
    if job.initial is not None and not folder.has_state:
        report = job.initial.begin(prepared.model)
        if rank == 0:
            folder.write_initial_weights(report.to_json())

    def goes() -> None:
        if rank == 0:
            folder.write_config(experiment)
            folder.write_data(describe(experiment.data.name, prepared.splits))
            folder.write_code(method_code(experiment))
        on_ready()

    def keep_weights(report: EpochReport) -> None:
        every = experiment.checkpoints.every
        if every is not None and report.epoch % every == 0:
            _keep_checkpoint(folder, prepared, report, environment)

    reporter = _FolderReporter(folder, on_epoch, on_step, goes, leaving, keep_weights)
    diverged = folder.diverged()
    if diverged is not None:
        on_ready()
        raise TrainingDiverged(f"{diverged} (found by an earlier start; `rayndom train --restart` trains it again)")
    if folder.has_state:
        history = read_state(folder.path)["history"]
        reporter.ready()
        _replay(history, on_epoch, on_replay)
    try:
        outcome = prepared.fit(reporter, folder.path, beside)
    except TrainingDiverged as error:
        reporter.ready()  # that it diverges is its result
        if rank == 0:
            folder.write_diverged(str(error))
            storage.keep(folder.path)
        raise
    record = _record(outcome, folder)
    if rank == 0:
        _finish(folder, prepared, record, environment)
    return as_result(folder, record, reused=False)


def _reused(folder: RunFolder, record: dict[str, Any]) -> RunResult:
    if "model/parameters" not in record["metrics"]:  # trained before costs were measured
        image_shape = tuple(read_config(folder.model)["model"]["image_shape"])
        record["metrics"] |= cost_metrics(load_pretrained(folder.model, resample_on_forward=False), image_shape)
    return as_result(folder, record, reused=True)


def _finish(folder: RunFolder, prepared: PreparedTraining, record: dict[str, Any], environment: dict[str, Any]) -> None:
    """Add to the record what the trained model costs, and leave the model and the record in the folder.

    Args:
        environment: of the process that trained it, when it began.
    """
    record["metrics"] |= cost_metrics(prepared.model, prepared.splits.image_shape)
    _export(folder.model, prepared, record, environment)
    folder.write_result(record)
    storage.keep(folder.path)


def _keep_checkpoint(folder: RunFolder, prepared: PreparedTraining, report: EpochReport, environment: dict[str, Any]) -> None:
    """Leave the weights as they are after an epoch, which are the latest ones, never an average, in the folder as a model."""
    metrics = dict(report.metrics)
    if AVERAGE_CHOSEN in metrics:  # what is measured may be of the average
        latest = {name.replace("/latest/", "/"): value for name, value in metrics.items() if name.startswith("validation/latest/")}
        metrics = {name: value for name, value in metrics.items() if not name.startswith("validation/") and name != AVERAGE_CHOSEN} | latest
    record = {"metrics": metrics, "selected_epoch": report.epoch, "num_epochs": report.epoch}
    begun = folder.initial_weights()
    where = folder.checkpoint(report.epoch)
    _export(where, prepared, record if begun is None else record | {"initial_weights": begun}, environment, "kept on the way")


def _export(
    where: Path, prepared: PreparedTraining, record: dict[str, Any], environment: dict[str, Any], chosen: str | None = None
) -> None:
    """Write the network as it is as a model; `chosen`: see `model_card`."""
    experiment, splits = prepared.experiment, prepared.splits
    save_pretrained(
        prepared.model,
        where,
        card=model_card(experiment, record, splits.class_names, chosen=chosen),
        details={
            "experiment": experiment.model_dump(mode="json"),
            "fingerprint": experiment.fingerprint,
            "class_names": list(splits.class_names),
            "training": {key: record[key] for key in ("metrics", "selected_epoch", "num_epochs", "initial_weights") if key in record},
            "environment": environment,
        },
    )


def _replay(history: list[dict[str, float]], on_epoch: EpochListener, on_replay: Callable[[Sequence[EpochReport]], None] | None) -> None:
    reports = [EpochReport(index + 1, metrics) for index, metrics in enumerate(history)]
    if on_replay is not None:
        on_replay(reports)
        return
    for report in reports:
        on_epoch(report)


def _record(outcome: FitResult, folder: RunFolder) -> dict[str, Any]:
    record: dict[str, Any] = {
        "metrics": outcome.metrics,
        "selected_epoch": outcome.selected_epoch,
        "num_epochs": outcome.num_epochs,
        "stopped_early": outcome.stopped_early,
        "history": outcome.history,
    }
    begun = folder.initial_weights()
    return record if begun is None else record | {"initial_weights": begun}


def as_result(folder: RunFolder, record: dict[str, Any], *, reused: bool) -> RunResult:
    """Return what the record of a finished run says."""
    return RunResult(folder, record["metrics"], record["selected_epoch"], record["num_epochs"], reused)
