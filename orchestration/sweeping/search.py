"""The search of a sweep: Optuna proposes, Tune runs trials, ASHA stops, MLflow records; the same command goes on after any kill."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
from optuna.trial import TrialState
from ray import tune
from ray.tune.error import TuneError
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from models.files import write_text
from orchestration import console
from orchestration.environment import collect_environment
from orchestration.experiment import ExperimentConfig
from orchestration.home import Home
from orchestration.search_space import suggest
from orchestration.sweeping.config import SweepConfig, sweep_key
from orchestration.sweeping.listener import SweepListener
from orchestration.sweeping.study import (
    METRICS,
    PASSED,
    PROXY,
    RESUMES,
    RETRY,
    STUDY_ERRORS,
    StudyAway,
    best_trials,
    open_study,
    proxy_values,
    spent,
    study_error,
    superseded,
    target,
)
from orchestration.sweeping.trial_runs import complete_trial_records
from orchestration.tracking.tracker import SWEEP_TAG, Tracker
from orchestration.training import cluster
from orchestration.training.cluster import ClusterWatch
from orchestration.training.resources import concurrency, trial_resources
from orchestration.training.trial import run_trial, tune_resources


@dataclass(frozen=True)
class SearchOutcome:
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


class StudySearch(OptunaSearch):
    """Ray Tune's Optuna searcher on a persistent study, with a fixed number of trials over all starts.

    Args:
        config: the sweep.
        study: from `open_study`.
    """

    def __init__(self, config: SweepConfig, study: optuna.Study) -> None:
        metrics = [objective.metric for objective in config.objectives]
        modes = [objective.mode for objective in config.objectives]
        single = len(metrics) == 1
        super().__init__(metric=metrics[0] if single else metrics, mode=modes[0] if single else modes)
        self.config = config
        self._ot_study = study
        self._metrics = metrics
        self._target = target(config)

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """Return `values`, `number` and `passed` of a new trial, or that the sweep has all its trials."""
        if trial_id not in self._ot_trials:
            if spent(self._ot_study) + len(self._running()) >= self._target:
                return Searcher.FINISHED
            self._ot_trials[trial_id] = self._ot_study.ask()
        trial = self._ot_trials[trial_id]
        values = suggest(self.config.space or {}, trial)
        trial.set_user_attr("values", {name: value for name, value in values.items()})
        trial.set_user_attr("fingerprint", self.config.experiment(values).fingerprint)
        return {"values": values, "number": trial.number, PASSED: self._passed(trial)}

    def _passed(self, trial: optuna.Trial) -> int:
        """Return the last epoch after which an interrupted start let this trial go on."""
        earlier = trial.user_attrs.get(RESUMES)
        return 0 if earlier is None else max(proxy_values(self.config, self._ot_study.trials[earlier]), default=0)

    def on_trial_result(self, trial_id: str, result: Mapping[str, Any]) -> None:
        """Report an epoch's value, for single-objective sweeps; keep what early stopping compares."""
        if trial_id in self._completed_trials or result.get("finished"):
            return
        self._keep_proxy(trial_id, result)
        if len(self._metrics) > 1:
            return
        value = result.get(self._metrics[0])
        if value is not None and math.isfinite(value):
            self._ot_trials[trial_id].report(value, result["epoch"])

    def on_trial_complete(self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False) -> None:
        """Close the Optuna trial."""
        if trial_id in self._completed_trials or trial_id not in self._ot_trials:
            return
        self._completed_trials.add(trial_id)
        trial = self._ot_trials[trial_id]
        values = [(result or {}).get(metric) for metric in self._metrics]
        finite = all(value is not None and math.isfinite(value) for value in values)
        bounded = {constraint: (result or {}).get(constraint.metric) for constraint in self.config.constraints}
        finite = finite and all(value is not None and math.isfinite(value) for value in bounded.values())
        if error:
            trial.set_user_attr(RETRY, True)
            self._ot_study.tell(trial, state=TrialState.FAIL)
        elif (result or {}).get("finished") and finite:
            trial.set_user_attr("epochs", result["epoch"])
            trial.set_user_attr(METRICS, {name: value for name, value in result.items() if "/" in name and isinstance(value, int | float)})
            for constraint, value in bounded.items():
                trial.set_constraint(constraint.key, constraint.violation(value))
            self._ot_study.tell(trial, values)
        elif (result or {}).get("finished"):
            judged = dict(zip(self._metrics, values, strict=True)) | {each.key: value for each, value in bounded.items()}
            trial.set_user_attr("reason", f"not finite: {judged}")
            self._ot_study.tell(trial, state=TrialState.FAIL)
        else:
            trial.set_user_attr("epochs", (result or {}).get("epoch", 0))
            self._ot_study.tell(trial, state=TrialState.PRUNED)

    def _keep_proxy(self, trial_id: str, result: Mapping[str, Any]) -> None:
        """Keep the values that early stopping compares where Optuna's intermediate values are others."""
        stopping = self.config.stopping
        if stopping is None or self._metrics == [stopping.metric]:
            return
        value = result.get(stopping.metric)
        if value is not None and math.isfinite(value):
            trial = self._ot_trials[trial_id]
            trial.set_user_attr(PROXY, trial.user_attrs.get(PROXY, {}) | {str(result["epoch"]): value})

    def _running(self) -> set[str]:
        return set(self._ot_trials) - self._completed_trials


def run_search(config: SweepConfig, home: Home, data_root: Path | None, *, address: str | None = None, tracker: Tracker) -> SearchOutcome:
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
    write_text(folder / "sweep.json", json.dumps(config.model_dump(mode="json"), indent=2))
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
    return SearchOutcome(
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
