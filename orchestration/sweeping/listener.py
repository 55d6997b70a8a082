"""What a running sweep tells: lines and a table on the screen, runs in MLflow."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ray import tune
from ray.tune.experiment import Trial

from orchestration import console
from orchestration.experiment import ExperimentConfig
from orchestration.sweeping.config import SweepConfig, describe_values, dimension_cells, dimension_titles
from orchestration.sweeping.trial_runs import FAILED, FINISHED, STATE_TAG, STOPPED_EARLY, is_metric, open_trial_run
from orchestration.tracking.background_writer import BackgroundWriter
from orchestration.tracking.tracker import Tracker
from orchestration.training.cluster import ClusterWatch
from orchestration.training.trial import failure_reason


@dataclass
class TrialRow:
    """One line of the board."""

    number: int
    values: Mapping[str, Any]
    state: str = "starting"
    epoch: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    run_id: str = ""
    fingerprint: str = ""


class SweepListener(tune.Callback):
    """Follows the trials: tells MLflow, renews the board."""

    def __init__(self, config: SweepConfig, tracker: Tracker, parent: str, key: str, done: int, wanted: int, watch: ClusterWatch) -> None:
        self.config, self.tracker, self.parent, self.key = config, tracker, parent, key
        self.done, self.wanted = done, wanted
        self.watch = watch
        self.writer = BackgroundWriter(tracker.uri)
        self.started = time.monotonic()
        self.done_at_start = done
        self.rows: dict[str, TrialRow] = {}
        self.full_disk: str | None = None
        self.epochs = max(experiment.training.epochs for experiment in config.base_experiments())
        dimensions = dimension_titles(config)
        self.board = console.Board(f"sweep {config.name}", ["trial", "state", "epoch", *dimensions, "clean %", "robust %"])

    def __getstate__(self) -> dict[str, Any]:
        """Return nothing: Tune keeps a copy for its own way of restoring, which a sweep never takes, and a thread cannot be copied."""
        return {}

    def on_step_begin(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        """Look whether the cluster still has room."""
        self.watch.look()

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Open the trial's MLflow run and its line."""
        if trial.trial_id in self.rows:
            return
        suggestion = trial.config
        experiment = self.config.experiment(suggestion["values"])
        row = TrialRow(suggestion["number"], suggestion["values"], "running", fingerprint=experiment.fingerprint)
        self.writer.later(self._open, row, experiment)
        self.rows[trial.trial_id] = row
        self._show(f"trial {row.number}: started, {describe_values(row.values)}")

    def on_trial_result(self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any) -> None:
        """Log an epoch."""
        row = self.rows[trial.trial_id]
        numbers = {name: value for name, value in result.items() if is_metric(name) and isinstance(value, int | float)}
        if result.get("finished"):
            row.metrics = numbers
            self._log(row, "log_metrics", {f"selected/{name}": value for name, value in numbers.items()})
            return
        row.epoch = result["epoch"]
        row.metrics = {**row.metrics, **numbers}
        self._log(row, "log_epoch", row.epoch, numbers)
        self._show(
            f"trial {row.number}: epoch {row.epoch}/{self.epochs}, loss {numbers.get('train/loss', float('nan')):.3f}"
            f"{_accuracies(row.metrics)}; {self._summary()}"
        )

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Close a trial that ended, by itself or stopped by ASHA."""
        row = self.rows[trial.trial_id]
        finished = bool((trial.last_result or {}).get("finished"))
        row.state = "finished" if finished else f"stopped at {row.epoch}"
        self.done += 1
        self._log(row, "set_tags", {STATE_TAG: FINISHED if finished else STOPPED_EARLY})
        self._log(row, "finish")
        self._show(f"trial {row.number}: {row.state}{_accuracies(row.metrics)}; {self._summary()}")

    def on_trial_recover(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Say that a trial broke and is tried again; with a full disk there is no point in that."""
        reason = failure_reason(trial)
        if is_full_disk(reason):
            self.full_disk = reason
            return
        row = self.rows.get(trial.trial_id)
        if row is not None:
            console.warn(f"trial {row.number} broke and is tried again from its last finished epoch: {reason}")

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Close a trial that broke for good."""
        row = self.rows.get(trial.trial_id)
        if row is None:
            return
        row.state = "failed"
        reason = failure_reason(trial)
        if is_full_disk(reason):
            self.full_disk = reason
            return
        self.done += 1
        self._log(row, "set_tags", {STATE_TAG: FAILED, "rayndom.error": reason})
        self._log(row, "finish", "FAILED")
        console.warn(f"trial {row.number} failed: {reason}")
        self._show(f"trial {row.number}: failed; {self._summary()}")

    def _open(self, row: TrialRow, experiment: ExperimentConfig) -> None:
        """Open a trial's MLflow run; in the writer's thread, so that a store that is away holds no trial up."""
        row.run_id = open_trial_run(self.tracker, self.parent, self.key, row.number, experiment)

    def _log(self, row: TrialRow, method: str, *arguments: Any) -> None:
        """Call a method of the tracker on a trial's run, when the writer comes to it: then the run is open."""

        def log() -> None:
            getattr(self.tracker, method)(row.run_id, *arguments)

        self.writer.later(log)

    def _show(self, event: str) -> None:
        rows = [
            [
                row.number,
                row.state,
                f"{row.epoch}/{self.epochs}",
                *dimension_cells(self.config, row.values),
                _percent(row.metrics.get("validation/clean_accuracy")),
                _percent(row.metrics.get("validation/robust_accuracy")),
            ]
            for row in self.rows.values()
        ]
        self.board.show(rows, self._summary(), event)

    def _summary(self) -> str:
        over = self.done - self.done_at_start
        running = [row for row in self.rows.values() if row.state == "running"]
        # Partly trained trials count by their epochs, so that the estimate moves between ends of trials.
        progress = over + sum(row.epoch / self.epochs for row in running)
        left = "time left unknown"
        if progress > 0.2:
            seconds = (time.monotonic() - self.started) * (self.wanted - self.done_at_start - progress) / progress
            left = f"at most {console.duration(seconds)} left"
        best = max((row.metrics.get("validation/robust_accuracy", -1.0) for row in self.rows.values()), default=-1.0)
        shown = f", best robust {100 * best:.1f} %" if best >= 0 else ""
        return f"{self.done}/{self.wanted} trials over{shown}, {left}"


def is_full_disk(reason: str) -> bool:
    """Return whether an error's text says that there is no room for a file."""
    return any(os.strerror(code) in reason for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)) or "disk is full" in reason


def _accuracies(metrics: Mapping[str, float]) -> str:
    if "validation/clean_accuracy" not in metrics:
        return ""
    return f", clean {_percent(metrics['validation/clean_accuracy'])} %, robust {_percent(metrics['validation/robust_accuracy'])} %"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"
