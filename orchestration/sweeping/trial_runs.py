"""The MLflow run of a trial: opened under its identity, and completed afterwards where an earlier start could not.

What a start leaves out (its driver was killed before its last writes, or the store was away to its end) is in the study and in the
run folders. The next start logs it before anything else.
"""

from __future__ import annotations

from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from models.errors import UserError
from orchestration.experiment import ExperimentConfig
from orchestration.home import Home
from orchestration.run_folder import RunFolder
from orchestration.sweeping.config import SweepConfig
from orchestration.sweeping.study import METRICS, superseded
from orchestration.tracking.tracker import FINGERPRINT_TAG, SWEEP_TAG, Tracker

STATE_TAG = "rayndom.state"
FINISHED, STOPPED_EARLY, FAILED = "finished", "stopped early by ASHA", "failed"
_OVER = {TrialState.COMPLETE: FINISHED, TrialState.PRUNED: STOPPED_EARLY, TrialState.FAIL: FAILED}


def is_metric(name: str) -> bool:
    """Return whether an entry of a report is a metric, rather than Tune's own bookkeeping."""
    return name.startswith(("train/", "validation/", "time/", "model/"))


def open_trial_run(tracker: Tracker, parent: str, key: str, number: int, experiment: ExperimentConfig) -> str:
    """Return the id of a trial's run, created or found, with its parameters and configuration."""
    identity = {SWEEP_TAG: key, FINGERPRINT_TAG: experiment.fingerprint}
    run_id = tracker.run("trial", identity, f"trial {number}", parent)
    tracker.log_params(run_id, experiment.flatten())
    tracker.log_json(run_id, experiment.model_dump(mode="json"), "config.json")
    return run_id


def complete_trial_records(config: SweepConfig, key: str, study: optuna.Study, home: Home, tracker: Tracker, parent: str) -> list[int]:
    """Log what is missing of trials that are over, and close their runs; return the numbers of those that were not closed."""
    closed = {run.data.tags.get(FINGERPRINT_TAG) for run in tracker.children(parent, "trial") if run.info.status != "RUNNING"}
    again = superseded(study)
    found = []
    for trial in study.trials:
        if trial.state not in _OVER or trial.number in again or "values" not in trial.user_attrs:
            continue
        if trial.user_attrs["fingerprint"] not in closed:
            _complete(config, key, trial, home, tracker, parent)
            found.append(trial.number)
    return found


def _complete(config: SweepConfig, key: str, trial: FrozenTrial, home: Home, tracker: Tracker, parent: str) -> None:
    experiment = config.experiment(trial.user_attrs["values"])
    run_id = open_trial_run(tracker, parent, key, trial.number, experiment)
    log_history(tracker, run_id, RunFolder(home.run(experiment.fingerprint)), trial.user_attrs.get("epochs"))
    if trial.state == TrialState.COMPLETE:
        tracker.log_metrics(run_id, {f"selected/{name}": value for name, value in trial.user_attrs.get(METRICS, {}).items()})
    tracker.set_tags(run_id, {STATE_TAG: _OVER[trial.state]})
    tracker.finish(run_id, "FAILED" if trial.state == TrialState.FAIL else "FINISHED")


def log_history(tracker: Tracker, run_id: str, folder: RunFolder, until: int | None = None) -> None:
    """Log the epochs of a run folder that its MLflow run lacks, up to epoch `until`."""
    try:
        history: list[dict[str, Any]] = folder.history()
    except UserError:
        return  # a damaged or deleted folder has nothing to add; training again would say so
    for epoch, metrics in enumerate(history[:until], start=1):
        tracker.log_epoch(run_id, epoch, metrics)
