"""What trials tell while Tune runs them, those of a search and those of a list alike: lines and a table on the screen, runs in MLflow."""

from __future__ import annotations

import errno
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ray import tune
from ray.tune.experiment import Trial

from models.errors import EnvironmentFailure
from orchestration import console
from orchestration.experiment import ExperimentConfig
from orchestration.home import Home
from orchestration.storage import keep_databases
from orchestration.sweeping.operation_metrics import OperationMetrics
from orchestration.tracking.background_writer import BackgroundWriter
from orchestration.tracking.experiment_run import FAILED, FINISHED, KILLED, STOPPED_EARLY, ExperimentRun
from orchestration.training.cluster import ClusterWatch
from orchestration.training.job import TrialReport
from orchestration.training.tracked_outcome import track_data
from orchestration.training.trial import failure_reason
from trainers.complaints import complaints
from trainers.selection import SELECTION_METRIC

MOST_ROWS = 40
"""Trials on the board that are over."""


@dataclass
class TrialRow:
    """One trial, as the board shows it and MLflow records it.

    Attributes:
        title: how lines call it. cells: what the board shows of it beside its progress. remark: ends its first line.
        run: its MLflow run. state, epoch, metrics: how far it is. finished: it has trained to its end.
        complained: signs that it does not learn which were said already.
        goes_on: whether it goes on with a trial that was over before.
        beside: whether it is none of those that are wanted, but trained beside them.
        workers: that train it, as far as it has said.
    """

    title: str
    cells: Sequence[str]
    run: ExperimentRun
    remark: str = ""
    state: str = "running"
    epoch: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    finished: bool = False
    complained: set[str] = field(default_factory=set)
    goes_on: bool = False
    beside: bool = False
    workers: int | None = None

    @property
    def experiment(self) -> ExperimentConfig:
        """What it trains."""
        return self.run.experiment


class TrialListener(tune.Callback):
    """Follows the trials of one or more starts of Tune: tells MLflow, renews the board.

    Args:
        kind: what its trials are called, e.g. `trial` or `baseline`.
        title: of the board. columns: heads of `TrialRow.cells`.
        row_of: makes the row of a Tune trial from its configuration.
        writer: writes to MLflow.
        watch: looks whether the cluster still has room for a trial.
        wanted: how many trials there are to be. done: how many of them were over before.
        on_end: called when a trial has ended, in whatever way.
        most_broken: trials that may break before the others are ended; None: all of them.
        best: robust accuracy that earlier starts came to; None: none.
    """

    def __init__(
        self,
        kind: str,
        title: str,
        columns: Sequence[str],
        row_of: Callable[[dict[str, Any]], TrialRow],
        writer: BackgroundWriter,
        watch: ClusterWatch | None,
        *,
        wanted: int,
        done: int = 0,
        on_end: Callable[[TrialRow], None] = lambda row: None,
        most_broken: float | None = None,
        best: float | None = None,
    ) -> None:
        self.best = best
        """Robust accuracy of the best epoch of any trial."""
        self.most_broken = most_broken
        self.broken: dict[str, str] = {}
        """Title -> what broke a trial for good; diverged ones are not among them."""
        self.kind, self.row_of, self.writer, self.watch, self.on_end = kind, row_of, writer, watch, on_end
        self.wanted, self.done, self.done_at_start = wanted, done, done
        self.started = time.monotonic()
        self.rows: dict[str, TrialRow] = {}
        self.full_disk: str | None = None
        self.failures: dict[str, str] = {}
        """Fingerprint -> why its training failed for good."""
        self.epochs, self.metrics = 0, OperationMetrics(title.removeprefix("sweep "), kind)
        self.board = console.Board(title, [kind, "state", "epoch", *columns, "clean %", "robust %"])

    def __getstate__(self) -> dict[str, Any]:
        """Return nothing: Tune keeps a copy for its own way of restoring, which is never taken, and a thread cannot be copied."""
        return {}

    def on_step_begin(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        """Look whether the cluster still has room."""
        if self.watch is not None:
            self.watch.look()

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Open the trial's MLflow run and its line."""
        if trial.trial_id not in self.rows:
            row = self._row(trial)
            self._show(f"{row.title}: started{row.remark}")

    def on_trial_result(self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any) -> None:
        """Log an epoch, or what the trial ended with."""
        row, report = self._row(trial), TrialReport.from_result(result)
        if report.failed is not None:
            self._fail(row, report.failed)
        elif report.finished:
            row.finished, row.metrics = True, dict(report.metrics)
            self._note_best(row)
            self.writer.later(row.run.log_selected, row.metrics)
        else:
            self._note_workers(row, report)
            row.epoch, row.metrics = report.epoch, row.metrics | dict(report.metrics)
            self._note_best(row)
            self.epochs += 1
            self.writer.later(row.run.log_epoch, report.epoch, report.metrics)
            self.writer.later(track_data, row.run)
            self._complain(row, report)
            loss = report.metrics.get("train/loss", float("nan"))
            self._show(f"{row.title}: epoch {_epoch(row)}, loss {loss:.3f}{_accuracies(row.metrics)}; {self._summary()}")

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Close a trial that ended, by itself or stopped by ASHA."""
        row = self._row(trial)
        if row.state == FAILED:  # it said so itself, and then returned
            return
        if self.hopeless and not row.finished:
            row.state = f"interrupted at {row.epoch}"
            self.writer.later(row.run.end, KILLED)
            return
        row.state = FINISHED if row.finished else f"stopped at {row.epoch}"
        self.writer.later(row.run.end, FINISHED if row.finished else STOPPED_EARLY)
        self._end(row)
        self._show(f"{row.title}: {row.state}{_accuracies(row.metrics)}; {self._summary()}")

    def on_trial_recover(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Say that a trial broke and is tried again; with a full disk there is no point in that."""
        reason = failure_reason(trial)
        if is_full_disk(reason):
            self.full_disk = reason
        elif trial.trial_id in self.rows:
            console.warn(f"{self.rows[trial.trial_id].title} broke and is tried again from its last finished epoch: {reason}")

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Close a trial that broke for good."""
        reason = failure_reason(trial)
        if is_full_disk(reason):
            self.full_disk = reason
        else:
            row = self._row(trial)
            if not row.beside:
                self.broken[row.title] = reason
            self._fail(row, reason)

    @property
    def hopeless(self) -> bool:
        """Whether the trials that are left would only break like the others: the disk is full, or too many broke."""
        return self.full_disk is not None or (self.most_broken is not None and len(self.broken) > self.most_broken)

    def check_broken(self) -> None:
        """Say what broke trials for good, each reason once.

        Raises:
            TrialsBroke: more of them broke than may.
        """
        reasons: dict[str, list[str]] = {}
        for title, reason in self.broken.items():
            reasons.setdefault(reason, []).append(title)
        for reason, titles in reasons.items():
            console.warn(f"{', '.join(titles)} broke: {reason}. The same command tries {'it' if len(titles) == 1 else 'them'} again")
        if self.hopeless:
            raise TrialsBroke(
                f"{len(self.broken)} of {self.wanted} {self.kind}s broke, more than max_failed_share allows. Mend the cause "
                f"({next(iter(reasons))}) and start the same command again, or raise --max_failed_share. Finished trials are kept"
            )

    def check_disk(self, home: Home) -> None:
        """Raise `NoSpace` if a trial found the disk of the home folder full."""
        if self.full_disk is not None:
            raise NoSpace(f"a trial could not write ({self.full_disk}); make room below {home.root}. All finished epochs are kept")

    def _row(self, trial: Trial) -> TrialRow:
        """Return a trial's row; a new one's MLflow run is opened by the writer, so that a store that is away holds no trial up."""
        if trial.trial_id not in self.rows:
            row = self.rows[trial.trial_id] = self.row_of(trial.config)
            self.done -= row.goes_on
            self.writer.later(row.run.open)
            self.writer.later(keep_databases)
        return self.rows[trial.trial_id]

    def _note_best(self, row: TrialRow) -> None:
        value = None if row.beside else row.metrics.get(SELECTION_METRIC)
        if value is not None and value > (-math.inf if self.best is None else self.best):
            self.best = value

    def _note_workers(self, row: TrialRow, report: TrialReport) -> None:
        """Say how many workers train a group whose size may change, whenever it has changed."""
        if row.experiment.resources.is_elastic and row.workers != report.workers:
            most = row.experiment.resources.most_workers
            console.say(f"{row.title}: {'trains' if row.workers is None else 'goes on'} with {report.workers} of {most} workers")
            row.workers = report.workers

    def _complain(self, row: TrialRow, report: TrialReport) -> None:
        """Say each sign that a trial does not learn once, as `train` does."""
        for sign, sentence in complaints(report.metrics).items():
            if sign not in row.complained:
                row.complained.add(sign)
                console.warn(f"{row.title}, epoch {report.epoch}: {sentence}")

    def _fail(self, row: TrialRow, reason: str) -> None:
        row.state = FAILED
        self.failures[row.experiment.fingerprint] = reason
        self.writer.later(row.run.end, FAILED, reason)
        console.warn(f"{row.title} failed: {reason}")
        self._end(row)
        self._show(f"{row.title}: failed; {self._summary()}")

    def _end(self, row: TrialRow) -> None:
        self.done += not row.beside
        self.writer.later(keep_databases)
        self.on_end(row)

    def _show(self, event: str) -> None:
        clean, robust = "validation/clean_accuracy", SELECTION_METRIC
        rows = [
            [
                f"{row.title} (!)" if complaints(row.metrics) else row.title,
                row.state,
                _epoch(row),
                *row.cells,
                *(_percent(row.metrics.get(name)) for name in (clean, robust)),
            ]
            for row in self._shown()
        ]
        self.board.show(rows, self._summary(), event)
        self.metrics.show(self._counts())

    def _counts(self) -> dict[str, float]:
        running = sum(row.state == "running" and not row.beside for row in self.rows.values())
        counts = {"trials_wanted": self.wanted, "trials_over": self.done, "trials_running": running, "trials_broken": len(self.broken)}
        counts["epochs"] = self.epochs
        best = {} if self.best is None else {"best_robust_accuracy": self.best}
        return {f"rayndom_{name}": float(value) for name, value in (counts | best).items()}

    def _shown(self) -> list[TrialRow]:
        """Return the rows of the board: all that run, and of the others the last."""
        rows = list(self.rows.values())
        earlier = [row for row in rows[:-MOST_ROWS] if row.state == "running"]
        return earlier + rows[-MOST_ROWS:]

    def _summary(self) -> str:
        over = self.done - self.done_at_start
        running = [row for row in self.rows.values() if row.state == "running" and not row.beside]
        # Partly trained trials count by their epochs, so that the estimate moves between ends of trials.
        progress = over + sum(row.epoch / row.experiment.training.epochs for row in running)
        left = "time left unknown"
        if progress > 0.2:
            seconds = (time.monotonic() - self.started) * (self.wanted - self.done_at_start - progress) / progress
            left = f"at most {console.duration(seconds)} left"
        shown = "" if self.best is None else f", best robust {100 * self.best:.1f} %"
        return f"{self.done}/{self.wanted} {self.kind}s over{shown}, {left}"


def is_full_disk(reason: str) -> bool:
    """Return whether an error's text says that there is no room for a file."""
    return any(os.strerror(code) in reason for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)) or "disk is full" in reason


class NoSpace(EnvironmentFailure):
    """The disk is full."""


class TrialsBroke(RuntimeError):
    """More trials broke than may."""


class WhenHopeless(tune.Stopper):
    """Ends a start of Tune when a trial found the disk full or too many broke: the others would only fail one after the other."""

    def __init__(self, listener: TrialListener) -> None:
        self.listener = listener

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Stop no trial for its result."""
        return False

    def stop_all(self) -> bool:
        """Return whether there is no point in going on."""
        return self.listener.hopeless

    def __getstate__(self) -> dict[str, Any]:
        """Return nothing, like the listener."""
        return {}


def _epoch(row: TrialRow) -> str:
    return f"{row.epoch}/{row.experiment.training.epochs}"


def _accuracies(metrics: Mapping[str, float]) -> str:
    if "validation/clean_accuracy" not in metrics:
        return ""
    return f", clean {_percent(metrics['validation/clean_accuracy'])} %, robust {_percent(metrics[SELECTION_METRIC])} %"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"
