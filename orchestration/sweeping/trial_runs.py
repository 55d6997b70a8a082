"""The MLflow runs of a sweep's trials, completed afterwards where an earlier start could not.

What a start leaves out (its driver was killed before its last writes, or the store was away to its end) is in the study and in the
run folders. The next start logs it before anything else.
"""

from __future__ import annotations

import optuna
from optuna.trial import TrialState

from models.errors import UserError
from orchestration.home import Home
from orchestration.run_folder import RunFolder
from orchestration.sweeping.config import SweepConfig
from orchestration.sweeping.study import METRICS, superseded
from orchestration.tracking.experiment_run import FAILED, FINISHED, STOPPED_EARLY, ExperimentRun, ParentRun
from orchestration.tracking.tracker import SWEEP_TAG

_OVER = {TrialState.COMPLETE: FINISHED, TrialState.PRUNED: STOPPED_EARLY, TrialState.FAIL: FAILED}


def trial_run(parent: ParentRun, key: str, number: int, config: SweepConfig, values: dict[str, object]) -> ExperimentRun:
    """Return the run of a trial, which its sweep and its fingerprint identify."""
    return parent.child("trial", config.experiment(values), f"trial {number}", {SWEEP_TAG: key})


def complete_trial_runs(config: SweepConfig, key: str, study: optuna.Study, home: Home, parent: ParentRun) -> list[int]:
    """Log what is missing of trials that are over, and close their runs; return the numbers of those that were not closed."""
    closed, again = parent.closed("trial"), superseded(study)
    found = []
    for trial in study.trials:
        if trial.state not in _OVER or trial.number in again or "values" not in trial.user_attrs:
            continue
        if trial.user_attrs["fingerprint"] in closed:
            continue
        run = trial_run(parent, key, trial.number, config, trial.user_attrs["values"])
        history = known_history(RunFolder(home.run(run.experiment.fingerprint)))[: trial.user_attrs.get("epochs")]
        selected = trial.user_attrs.get(METRICS, {}) if trial.state == TrialState.COMPLETE else None
        run.complete(history, selected, _OVER[trial.state])
        found.append(trial.number)
    return found


def known_history(folder: RunFolder) -> list[dict[str, float]]:
    """Return the metrics of a run folder's epochs; a damaged or deleted folder has none, training again would say so."""
    try:
        return folder.history()
    except UserError:
        return []
