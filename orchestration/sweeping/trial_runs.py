"""The MLflow runs of a sweep's trials: few rows for each, and completed afterwards where an earlier start could not.

What a start leaves out (its driver was killed before its last writes, or the store was away to its end) is in the study and in the
run folders. The next start logs it before anything else. A note beside the study says which runs are closed: to ask the store takes
milliseconds a trial.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import optuna
from optuna.trial import TrialState

from models.errors import UserError
from orchestration.experiment import ExperimentConfig
from orchestration.home import Home
from orchestration.run_folder import RunFolder
from orchestration.sweeping.config import SweepConfig, describe_values
from orchestration.sweeping.study import METRICS, all_trials, superseded
from orchestration.tracking.experiment_run import FAILED, FINISHED, KILLED, STOPPED_EARLY, ExperimentRun, ParentRun
from orchestration.tracking.tracker import SWEEP_TAG
from orchestration.trained_models.recipe_differences import MOST_NAME
from orchestration.training.tracked_outcome import track_data
from trainers.complaints import complaints

_OVER = {TrialState.COMPLETE: FINISHED, TrialState.PRUNED: STOPPED_EARLY, TrialState.FAIL: FAILED}

EACH_EPOCH = (
    "train/loss",
    "train/learning_rate",
    "validation/clean_accuracy",
    "validation/robust_accuracy",
    "time/epoch_seconds",
)
"""Metrics of a trial that MLflow has of every epoch, 280 bytes each; of the others it has the last value, the run folder all."""


class TrialRun(ExperimentRun):
    """The run of a trial.

    Args:
        parent: the sweep's.
        folder: of the sweep, where its end is noted.
        number: of the trial.
        experiment: what it trains.
        varied: what differs from the other trials, in words.
    """

    def __init__(self, parent: ParentRun, folder: Path, number: int, experiment: ExperimentConfig, varied: str) -> None:
        tags, name = {SWEEP_TAG: folder.name}, f"trial {number}: {varied}"[:MOST_NAME]
        super().__init__(parent.tracker, "trial", experiment, name, parent.run_id, tags, parent.shared)
        self.number, self.closed = number, ClosedRuns(folder, parent.run_id)
        self._last: tuple[int, Mapping[str, float]] = (0, {})
        self._complained: set[str] = set()

    def log_epoch(self, epoch: int, metrics: Mapping[str, float]) -> None:
        """Log an epoch's main metrics, once, and signs of a training that does not learn; the others are logged at the end."""
        self._complained |= complaints(metrics).keys()  # from then on, so that the last value says when it is over
        super().log_epoch(epoch, {name: metrics[name] for name in (*EACH_EPOCH, *self._complained) if name in metrics})
        self._last = (epoch, metrics)

    def end(self, state: str = FINISHED, error: str | None = None) -> None:
        """Log the other metrics of the last epoch, end the run, and note it."""
        epoch, metrics = self._last
        rest = {name: value for name, value in metrics.items() if name not in EACH_EPOCH}
        if rest:
            self.tracker.log_metrics(self.open(), rest, epoch)
        super().end(state, error)
        if state != KILLED:
            self.closed.add(self.number)


class ClosedRuns:
    """Notes which trials' runs are closed, for one run of the sweep in one store: a line for each.

    Args:
        folder: of the sweep.
        run_id: of the sweep's run.
    """

    def __init__(self, folder: Path, run_id: str) -> None:
        self.path = folder / "closed_runs" / f"{run_id}.txt"

    def numbers(self) -> set[int] | None:
        """Return the noted trials; None where nothing was ever noted. Each line ends with a full stop: one that a kill cut is none."""
        try:
            text = self.path.read_text(errors="replace")
        except FileNotFoundError:
            return None
        return {int(number) for number in re.findall(r"^(\d+)\.$", text, re.MULTILINE | re.ASCII)}

    def add(self, *numbers: int) -> None:
        """Note trials. Their line begins on a new one, whatever a kill left."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            os.write(file, ("\n" + "".join(f"{number}.\n" for number in numbers)).encode())
        finally:
            os.close(file)


def shared_parameters(bases: Sequence[ExperimentConfig]) -> dict[str, object]:
    """Return the parameters that all recipes of a sweep have with the same value: its trials share them but for those that they vary."""
    first, *others = [base.flatten() for base in bases]
    missing = object()
    return {name: value for name, value in first.items() if all(other.get(name, missing) == value for other in others)}


def trial_run(parent: ParentRun, folder: Path, number: int, config: SweepConfig, values: dict[str, object]) -> TrialRun:
    """Return the run of a trial, which its sweep and its fingerprint identify; `folder` of the sweep."""
    return TrialRun(parent, folder, number, config.experiment(values), describe_values(values))


def complete_trial_runs(config: SweepConfig, folder: Path, study: optuna.Study, home: Home, parent: ParentRun) -> list[int]:
    """Log what is missing of trials that are over, and close their runs; return the numbers of those that were not closed."""
    again = superseded(study)
    over = [trial for trial in all_trials(study) if trial.state in _OVER and trial.number not in again and "values" in trial.user_attrs]
    note = ClosedRuns(folder, parent.run_id)
    noted = note.numbers()
    unknown = [trial for trial in over if noted is None or trial.number not in noted]
    if not unknown:
        return []
    among = None if noted is None else {trial.user_attrs["fingerprint"] for trial in unknown}
    closed = parent.closed("trial", among=among)
    note.add(*(trial.number for trial in unknown if trial.user_attrs["fingerprint"] in closed))
    found = []
    for trial in unknown:
        if trial.user_attrs["fingerprint"] in closed:
            continue
        run = trial_run(parent, folder, trial.number, config, trial.user_attrs["values"])
        history = known_history(RunFolder(home.run(run.experiment.fingerprint)))[: trial.user_attrs.get("epochs")]
        selected = trial.user_attrs.get(METRICS, {}) if trial.state == TrialState.COMPLETE else None
        track_data(run)
        run.complete(history, selected, _OVER[trial.state])
        found.append(trial.number)
    return found


def known_history(folder: RunFolder) -> list[dict[str, float]]:
    """Return the metrics of a run folder's epochs; a damaged or deleted folder has none, training again would say so."""
    try:
        return folder.history()
    except UserError:
        return []
