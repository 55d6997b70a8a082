"""One training run with its MLflow record: in this process with one worker, in a Ray Train group with several."""

from __future__ import annotations

import contextlib
import math
import time

from orchestration import console
from orchestration.environment import environment_tags
from orchestration.experiment import ExperimentConfig
from orchestration.home import Workplace
from orchestration.method_code import changed_files, method_code
from orchestration.storage import forget
from orchestration.tracking.background_writer import BackgroundWriter
from orchestration.tracking.experiment_run import FAILED, KILLED, ExperimentRun
from orchestration.tracking.system_metrics import system_metrics
from orchestration.tracking.tracker import Tracker
from orchestration.trained_models.recipe_differences import named_by_changes
from orchestration.training.job import TrainingJob
from orchestration.training.tracked_outcome import track_data, track_model
from orchestration.training.training_run import RunResult, train_here
from trainers.complaints import complaints
from trainers.reporting import EpochReport


class _TrainingProgress:
    """A line per epoch, and on a terminal a line that moves with the steps."""

    def __init__(self, experiment: ExperimentConfig) -> None:
        self.name, self.epochs = experiment.name, experiment.training.epochs
        self.board = console.Board(experiment.name, ["epoch", "step", "loss", "clean %", "robust %", "images/s"])
        self.started = time.monotonic()
        self.first_epoch: int | None = None
        self.rows: list[list[str]] = []
        self.complained: set[str] = set()

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
        # What earlier starts reported is shown again; they may be of another version.
        loss, speed = metrics.get("train/loss", math.nan), metrics.get("time/examples_per_second", math.nan)
        row = [
            f"{report.epoch}/{self.epochs}",
            "",
            f"{loss:.3f}",
            "" if clean is None else f"{100 * clean:.1f}",
            "" if robust is None else f"{100 * robust:.1f}",
            f"{speed:.0f}",
        ]
        self.rows.append(row)
        if replayed:
            return
        if self.first_epoch is None:
            self.first_epoch = report.epoch - 1
        for sign, sentence in complaints(metrics).items():
            if sign not in self.complained:
                self.complained.add(sign)
                console.warn(f"epoch {report.epoch}: {sentence}")
        accuracies = "" if clean is None or robust is None else f", clean {100 * clean:.1f} %, robust {100 * robust:.1f} %"
        self.board.show(
            self.rows[-6:],
            self._left(report.epoch),
            f"epoch {report.epoch}/{self.epochs}, loss {loss:.3f}{accuracies}, {speed:.0f} images/s, {self._left(report.epoch)}",
        )

    def _left(self, epoch: int) -> str:
        trained = epoch - (self.first_epoch or 0)
        if trained < 1:
            return "time left unknown"
        return f"{console.duration((time.monotonic() - self.started) / trained * (self.epochs - epoch))} left"


class _SingleRun:
    """One training in its MLflow run, followed on the terminal.

    Args:
        job: what is trained. workplace: where.
    """

    def __init__(self, job: TrainingJob, workplace: Workplace) -> None:
        experiment = job.experiment
        self.job, self.address = job, workplace.address
        self.tracker = Tracker(workplace.home, experiment.tracking.experiment)
        self.run = ExperimentRun(self.tracker, "run", experiment, named_by_changes(experiment))
        self.writer = BackgroundWriter(self.tracker.uri)
        self.progress = _TrainingProgress(experiment)
        self.known = 0
        """Epochs that an earlier start trained."""
        self.watched = contextlib.ExitStack()
        """What runs as long as the training does: MLflow's system metrics, where they are wanted."""

    def forget_earlier(self) -> None:
        """Begin anew: the earlier run stays in MLflow as it was, what it left in its folder goes."""
        self.run.replace_earlier()
        with self.job.folder.locked():
            self.job.folder.clear()
            forget(self.job.folder.path)

    def train(self) -> RunResult:
        """Train to the end; all that is known is in MLflow when it returns or raises, as far as the store can be reached."""
        self.known = len(self.job.folder.history())
        with self.writer:
            try:
                with self.progress.board, self.watched:
                    result = self._train()
            except BaseException as error:
                # What was refused, or broke, before the first step was taken leaves no run.
                if self.run.is_open:
                    broke = isinstance(error, Exception)
                    self.writer.later(self.run.end, FAILED if broke else KILLED, str(error) if broke else None)
                raise
            self.writer.later(self.run.log_selected, result.metrics)
            self.writer.later(track_model, self.tracker, self.run.open(), self.job.experiment)
            self.writer.later(self.run.end)
        return result

    def _train(self) -> RunResult:
        if self.job.experiment.resources.most_workers > 1:
            from orchestration.training.group_run import train_in_group

            return train_in_group(self.job, self.address, self._epoch_finished, self._begin)
        with self.job.folder.locked():
            return train_here(self.job, on_epoch=self._epoch_finished, on_step=self.progress.step, on_ready=self._begin)

    def _begin(self) -> None:
        experiment = self.job.experiment
        self.run.set_tags(experiment.tracking.tags | environment_tags())
        console.say(f"training {experiment.name}, fingerprint {experiment.fingerprint}; MLflow {self.tracker.link(self.run.open())}")
        if self.known:
            console.say(f"going on after epoch {self.known}")
        begun = self.job.folder.initial_weights()
        if begun is not None:
            console.say(f"initial weights: {begun['sentence']}")
        self.watched.enter_context(system_metrics(self.tracker, self.run.open(), wanted=experiment.tracking.system_metrics))

    def _epoch_finished(self, report: EpochReport) -> None:
        self.writer.later(self.run.log_epoch, report.epoch, dict(report.metrics))
        self.writer.later(track_data, self.run)
        self.progress.epoch(report, replayed=report.epoch <= self.known)


def run_single(
    experiment: ExperimentConfig, workplace: Workplace, *, restart: bool = False, retrain: bool = False, wait: bool = False
) -> tuple[RunResult, str]:
    """Train, resume or reuse one experiment; return its result and the id of its MLflow run.

    Args:
        experiment: what is trained. workplace: where.
        restart: forget an earlier training; its MLflow run stays as it was, and the new one names it.
        retrain: the same, if the code of its defence or objective has changed since.
        wait: for another process that trains it, instead of refusing.

    Raises:
        UserError: a mistake, found before any worker starts and before an MLflow run is opened; or another process trains it.
        TrainingDiverged, OSError: while running; finished epochs are kept.
        StoreAway: trained, but the MLflow store stayed away; the same call logs the rest.
    """
    job = TrainingJob.at(workplace, experiment, anew=restart)
    with job.folder.commanded(experiment.name, wait=wait):
        if _code_changed(job, retrain) and retrain:
            restart, job = True, TrainingJob.at(workplace, experiment, anew=True)
        run = _SingleRun(job, workplace)
        if restart:
            run.forget_earlier()
        result = run.train()
        return result, run.run.open()


def _code_changed(job: TrainingJob, retrain: bool) -> bool:
    """Return whether the method's code is another than the one that an earlier start trained with, and say so."""
    known = job.folder.code()
    changed = changed_files(known, method_code(job.experiment)) if known else []
    if changed:
        files = ", ".join(changed)
        what = "it is trained anew" if retrain else "the same configuration is the same run: --retrain trains it anew"
        console.say(f"{job.experiment.name} was trained with other code: {files} changed since; {what}")
    return bool(changed)
