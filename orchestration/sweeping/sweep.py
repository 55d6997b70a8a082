"""Sweeps: Optuna proposes, Tune runs trials, ASHA stops, MLflow records; the same command goes on after any kill."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
from optuna.trial import TrialState
from ray import tune
from ray.tune.error import TuneError
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler

from orchestration import console
from orchestration.environment import collect_environment
from orchestration.experiment import ExperimentConfig
from orchestration.home import Home
from orchestration.sweeping.cluster_watch import ClusterWatch
from orchestration.sweeping.config import SweepConfig
from orchestration.sweeping.listener import SweepListener
from orchestration.sweeping.study import (
    PASSED,
    STUDY_ERRORS,
    StudyAway,
    StudySearch,
    is_feasible,
    open_study,
    proxy_values,
    spent,
    study_error,
    superseded,
    target,
)
from orchestration.sweeping.trial_record import complete_trial_records
from orchestration.tracking.tracker import SWEEP_TAG, Tracker
from orchestration.training import cluster
from orchestration.training.resources import concurrency, trial_resources
from orchestration.training.run_folder import replace_text
from orchestration.training.trial import run_trial, tune_resources

BUDGET_FIELDS = {
    "name",
    "description",
    "num_trials",
    "max_concurrent_trials",
    "suite",
    "baselines",
    "num_test_examples",
    "repeats",
    "remarks",
}
# Fields that came later: at their defaults they are not part of a sweep's key, so that earlier sweeps keep theirs.
LATER_FIELDS = {"recipes", "constraints", "measure", "points", "prior"}


@dataclass(frozen=True)
class SweepOutcome:
    """A finished or interrupted sweep.

    Attributes:
        complete: whether all trials are over.
        best: Optuna's numbers of the best trials: one, or the Pareto front.
        experiments: trial number -> experiment.
        parent_run: id of the MLflow run.
    """

    complete: bool
    best: list[int]
    experiments: dict[int, ExperimentConfig]
    study: optuna.Study
    parent_run: str
    folder: Path
    stopped_early: int


def sweep_key(config: SweepConfig) -> str:
    """Return the name of a sweep's folder: its name and a hash of what it searches. Budgets are not part of it."""
    fields = type(config).model_fields
    unused = {name for name in LATER_FIELDS if getattr(config, name) == fields[name].get_default(call_default_factory=True)}
    bases = [experiment.scientific() for experiment in config.base_experiments()]
    definition = config.model_dump(mode="json", exclude=BUDGET_FIELDS | unused) | {"base": bases if config.recipes else bases[0]}
    digest = hashlib.blake2b(json.dumps(definition, sort_keys=True).encode(), digest_size=4).hexdigest()
    return f"{config.name}-{digest}"


class RememberingAsha(AsyncHyperBandScheduler):
    """ASHA over several starts of a sweep: it also compares with trials of earlier starts, does not judge again the epochs of a trial
    that an earlier start let go on, and stops no trial at its last epoch."""

    def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Decide as ASHA does, but let a trial that goes on after an interruption come to where it was."""
        action = super().on_trial_result(controller, trial, result)
        passed = (getattr(trial, "config", None) or {}).get(PASSED, 0)
        return self.CONTINUE if action == self.STOP and result[self._time_attr] <= passed else action

    def spare_the_last_epoch(self, epochs: int) -> None:
        """Leave out rungs at or beyond the last epoch: what has trained to its end counts, whatever the others did."""
        for bracket in self._brackets:
            bracket._rungs = [(milestone, recorded) for milestone, recorded in bracket._rungs if milestone < epochs]

    def remember(self, config: SweepConfig, study: optuna.Study) -> None:
        """Enter what early stopping compares of all trials in the study."""
        again = superseded(study)
        for trial in study.trials:
            if trial.number not in again:
                for epoch, value in proxy_values(config, trial).items():
                    self._brackets[0].on_result(SimpleNamespace(trial_id=f"earlier-{trial.number}"), epoch, value)


def run_sweep(config: SweepConfig, home: Home, data_root: Path | None, *, address: str | None = None, tracker: Tracker) -> SweepOutcome:
    """Run a sweep, or go on with it.

    Raises:
        UserError: the resources do not suffice for one trial, the study is locked, or a name is wrong.
        StudyAway, StoreAway, NoSpace, ClusterLost: the study, the MLflow store, the disk or Ray failed on the way; everything finished is
            kept.
        KeyboardInterrupt: Ctrl-C; everything finished is kept.
    """
    base = config.experiment({})
    need = trial_resources(base.resources)
    console.say(f"joining Ray at {address}" if address else "starting Ray")
    available = cluster.connect(address, dashboard=need.workers > 1)
    at_once = concurrency(need, available, config.max_concurrent_trials, cluster.alive_nodes())
    key = sweep_key(config)
    folder = home.sweep(key)
    study = open_study(config, folder)
    parent = tracker.run("sweep", {SWEEP_TAG: key}, name=config.name)
    tracker.set_tags(parent, {"rayndom.recipe": ", ".join(config.all_recipes)} | _flat_environment())
    tracker.log_json(parent, config.model_dump(mode="json"), "sweep.json")
    replace_text(folder / "sweep.json", json.dumps(config.model_dump(mode="json"), indent=2))
    done, wanted = spent(study), target(config)
    over = f", {done} already over" if done else ""
    console.say(f"sweep {config.name}: {wanted} trials of {', '.join(config.all_recipes)}, {at_once} at a time{over}")
    for remark in config.remarks:
        console.say(remark)
    console.say(f"study {folder / 'study.db'}; MLflow {tracker.link(parent)}")
    late = complete_trial_records(config, key, study, home, tracker, parent)
    if late:
        console.say(f"logged what an earlier start could not: trials {', '.join(map(str, late))}")
    if done < wanted:
        watch = ClusterWatch(need, local=cluster.is_local(address))
        listener = SweepListener(config, tracker, parent, key, done, wanted, watch)
        with listener.writer, listener.board:
            _tune(config, base, home, data_root, study, at_once, wanted - done, listener, folder, key)
    study = open_study_readonly(config, folder, study)
    complete = spent(study) >= wanted
    return SweepOutcome(
        complete=complete,
        best=best_trials(config, study),
        experiments={trial.number: config.experiment(trial.user_attrs["values"]) for trial in study.trials if "values" in trial.user_attrs},
        study=study,
        parent_run=parent,
        folder=folder,
        stopped_early=sum(trial.state == TrialState.PRUNED for trial in study.trials),
    )


def open_study_readonly(config: SweepConfig, folder: Path, study: optuna.Study) -> optuna.Study:
    """Return the study with its cache renewed."""
    return optuna.load_study(study_name=config.name, storage=study._storage)


def best_trials(config: SweepConfig, study: optuna.Study) -> list[int]:
    """Return the numbers of the best full-budget trials: one, or the Pareto front.

    Trials that were stopped early or violate a constraint do not count.
    """
    if not any(trial.state == TrialState.COMPLETE and is_feasible(trial) for trial in study.trials):
        return []
    if len(config.objectives) == 1:
        return [study.best_trial.number]
    return [trial.number for trial in study.best_trials]


def _tune(
    config: SweepConfig,
    base: ExperimentConfig,
    home: Home,
    data_root: Path | None,
    study: optuna.Study,
    at_once: int,
    remaining: int,
    listener: SweepListener,
    folder: Path,
    key: str,
) -> None:
    start = f"{time.time_ns():x}"
    epochs = max(experiment.training.epochs for experiment in config.base_experiments())

    def trial(suggestion: dict[str, Any]) -> None:
        experiment = config.experiment(suggestion["values"])
        run_trial(
            {
                "experiment": experiment.model_dump(mode="json"),
                "folder": str(home.run(experiment.fingerprint)),
                "data_root": str(data_root) if data_root else None,
                "train_storage": str(folder / "train"),
                "start": start,
                "measure": config.measure.model_dump(mode="json") if config.needs_protocols else None,
            }
        )

    scheduler: Any = FIFOScheduler()
    if config.stopping is not None:
        scheduler = RememberingAsha(
            time_attr="epoch",
            metric=config.stopping.metric,
            mode="max",
            # Beyond the last epoch: a trial that reaches its end finishes by itself and writes its model.
            max_t=epochs + 1,
            grace_period=min(config.stopping.grace_epochs, epochs),
            reduction_factor=config.stopping.reduction_factor,
        )
        scheduler.spare_the_last_epoch(epochs)
        scheduler.remember(config, study)
    search = StudySearch(config, study)
    tuner = tune.Tuner(
        tune.with_resources(trial, tune_resources(base)),
        tune_config=tune.TuneConfig(
            search_alg=search,
            scheduler=scheduler,
            num_samples=remaining + 1000,  # the searcher says when the sweep has all its trials
            max_concurrent_trials=at_once,
            reuse_actors=base.resources.workers == 1,
        ),
        run_config=tune.RunConfig(
            name=f"start-{start}",
            storage_path=str(folder / "tune"),
            callbacks=[listener],
            stop=_OnFullDisk(listener),
            failure_config=tune.FailureConfig(max_failures=2),
            checkpoint_config=tune.CheckpointConfig(),
            verbose=0,
        ),
    )
    try:
        tuner.fit()
    except (*STUDY_ERRORS, TuneError) as error:
        behind = study_error(error)
        if behind is None:
            raise
        raise StudyAway(folder, behind) from error
    if listener.full_disk is not None:
        raise NoSpace(f"a trial could not write ({listener.full_disk}); make room below {home.root}. All finished epochs are kept")


class NoSpace(RuntimeError):
    """The disk is full."""


class _OnFullDisk(tune.Stopper):
    """Ends the search when a trial found the disk full: the others would only fail one after the other."""

    def __init__(self, listener: SweepListener) -> None:
        self.listener = listener

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Stop no trial for its result."""
        return False

    def stop_all(self) -> bool:
        """Return whether a trial found the disk full."""
        return self.listener.full_disk is not None

    def __getstate__(self) -> dict[str, Any]:
        """Return nothing, like the listener."""
        return {}


def _flat_environment() -> dict[str, str]:
    return {f"environment.{key}": str(value) for key, value in collect_environment().items() if not isinstance(value, dict)}
