"""One training run with its MLflow record: in this process with one worker, in a Ray Train group with several."""

from __future__ import annotations

import time
from pathlib import Path

from orchestration import console
from orchestration.environment import collect_environment
from orchestration.experiment import ExperimentConfig
from orchestration.home import Home
from orchestration.run_folder import RunFolder
from orchestration.tracking.background_writer import BackgroundWriter
from orchestration.tracking.tracker import FINGERPRINT_TAG, Tracker
from orchestration.training.training_run import RunResult, train_here
from trainers.reporting import EpochReport


class _Progress:
    """A line per epoch, and on a terminal a line that moves with the steps."""

    def __init__(self, experiment: ExperimentConfig) -> None:
        self.name, self.epochs = experiment.name, experiment.training.epochs
        self.board = console.Board(experiment.name, ["epoch", "step", "loss", "clean %", "robust %", "images/s"])
        self.started = time.monotonic()
        self.first_epoch: int | None = None
        self.rows: list[list[object]] = []

    def step(self, step: int, num_steps: int) -> None:
        """Move the running line."""
        if console.is_terminal():
            epoch = len(self.rows) + 1
            self.board.show(
                [*self.rows[-5:], [f"{epoch}/{self.epochs}", f"{step}/{num_steps}", "", "", "", ""]],
                self._left(epoch - 1),
            )

    def epoch(self, report: EpochReport, *, replayed: bool) -> None:
        """Add an epoch's line."""
        metrics = report.metrics
        clean, robust = metrics.get("validation/clean_accuracy"), metrics.get("validation/robust_accuracy")
        row = [
            f"{report.epoch}/{self.epochs}",
            "",
            f"{metrics['train/loss']:.3f}",
            "" if clean is None else f"{100 * clean:.1f}",
            "" if robust is None else f"{100 * robust:.1f}",
            f"{metrics['time/examples_per_second']:.0f}",
        ]
        self.rows.append(row)
        if replayed:
            return
        if self.first_epoch is None:
            self.first_epoch = report.epoch - 1
        accuracies = "" if clean is None else f", clean {100 * clean:.1f} %, robust {100 * robust:.1f} %"
        self.board.show(
            self.rows[-6:],
            self._left(report.epoch),
            f"epoch {report.epoch}/{self.epochs}, loss {metrics['train/loss']:.3f}{accuracies}, "
            f"{metrics['time/examples_per_second']:.0f} images/s, {self._left(report.epoch)}",
        )

    def _left(self, epoch: int) -> str:
        trained = epoch - (self.first_epoch or 0)
        if trained < 1:
            return "time left unknown"
        return f"{console.duration((time.monotonic() - self.started) / trained * (self.epochs - epoch))} left"


def run_single(
    experiment: ExperimentConfig,
    home: Home,
    data_root: Path | None,
    *,
    address: str | None = None,
    restart: bool = False,
) -> tuple[RunResult, str]:
    """Train, resume or reuse one experiment; return its result and the id of its MLflow run.

    Raises:
        UserError: a mistake, found before any worker starts. TrainingDiverged, OSError: while running; finished epochs are kept.
        StoreAway: trained, but the MLflow store stayed away; the same call logs the rest.
    """
    folder = RunFolder(home.run(experiment.fingerprint))
    tracker = Tracker(home, experiment.tracking.experiment)
    if restart:
        with folder.locked():
            folder.clear()
    run_id = tracker.run("run", {FINGERPRINT_TAG: experiment.fingerprint}, name=experiment.name or experiment.defence.name)
    tracker.log_params(run_id, experiment.flatten())
    environment = {f"environment.{key}": value for key, value in collect_environment().items() if not isinstance(value, dict)}
    tracker.set_tags(run_id, experiment.tracking.tags | environment)
    tracker.log_json(run_id, experiment.model_dump(mode="json"), "config.json")
    console.say(f"training {experiment.name}, fingerprint {experiment.fingerprint}; MLflow {tracker.link(run_id)}")
    known = _finished_epochs(folder)
    if known:
        console.say(f"going on after epoch {known}")
    progress = _Progress(experiment)
    writer = BackgroundWriter(tracker.uri)

    def on_epoch(report: EpochReport) -> None:
        writer.later(tracker.log_epoch, run_id, report.epoch, dict(report.metrics))
        progress.epoch(report, replayed=report.epoch <= known)

    with writer:
        try:
            with progress.board:
                if experiment.resources.workers > 1:
                    from orchestration.training.group_run import train_in_group

                    result = train_in_group(experiment, folder, home, data_root, address, on_epoch)
                else:
                    with folder.locked():
                        result = train_here(experiment, folder, data_root, on_epoch=on_epoch, on_step=progress.step)
        except BaseException as error:
            if not isinstance(error, KeyboardInterrupt | SystemExit):
                writer.later(tracker.set_tags, run_id, {"rayndom.error": str(error)})
            writer.later(tracker.finish, run_id, "FAILED" if isinstance(error, Exception) else "KILLED")
            raise
        writer.later(tracker.log_metrics, run_id, {f"selected/{name}": value for name, value in result.metrics.items()})
        writer.later(_log_model, tracker, run_id, result)
        writer.later(tracker.finish, run_id)
    return result, run_id


def _log_model(tracker: Tracker, run_id: str, result: RunResult) -> None:
    # A run that was finished before may have ended while the store was away.
    if not result.reused or not tracker.has_folder(run_id, result.folder.model, "model"):
        tracker.log_folder(run_id, result.folder.model, "model")


def _finished_epochs(folder: RunFolder) -> int:
    finished = folder.result()
    if finished is not None:
        return finished["num_epochs"]
    if not folder.has_state:
        return 0
    from trainers.checkpoint import read_state

    return read_state(folder.path)["finished_epochs"]
