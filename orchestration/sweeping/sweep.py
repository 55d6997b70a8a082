"""Sweeps: Optuna proposes, Tune runs trials, ASHA stops, MLflow records; the same command goes on after any kill."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
from optuna.trial import TrialState
from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler

from orchestration import console
from orchestration.environment import collect_environment
from orchestration.experiment import ExperimentConfig
from orchestration.home import Home
from orchestration.sweeping.config import SweepConfig
from orchestration.sweeping.joint_space import RECIPE
from orchestration.sweeping.study import StudySearch, is_feasible, open_study, proxy_values, spent, superseded, target
from orchestration.tracking.background_writer import BackgroundWriter
from orchestration.tracking.tracker import FINGERPRINT_TAG, SWEEP_TAG, Tracker
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
    """ASHA that also compares with trials of earlier starts of the same sweep."""

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
        KeyboardInterrupt: Ctrl-C; everything finished is kept.
    """
    base = config.experiment({})
    need = trial_resources(base.resources)
    available = cluster.connect(address, dashboard=need.workers > 1 and config.stopping is not None)
    at_once = concurrency(need, available, config.max_concurrent_trials)
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
    if done < wanted:
        listener = SweepListener(config, tracker, parent, key, done, wanted)
        try:
            with listener.board:
                _tune(config, base, home, data_root, study, at_once, wanted - done, listener, folder, key)
        finally:
            listener.writer.close()
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
        scheduler.remember(config, study)
    search = StudySearch(config, study)
    listener.search = search
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
            failure_config=tune.FailureConfig(max_failures=2),
            checkpoint_config=tune.CheckpointConfig(),
            verbose=0,
        ),
    )
    tuner.fit()


class SweepListener(tune.Callback):
    """Follows the trials: tells MLflow, renews the board."""

    def __init__(self, config: SweepConfig, tracker: Tracker, parent: str, key: str, done: int, wanted: int) -> None:
        self.config, self.tracker, self.parent, self.key = config, tracker, parent, key
        self.done, self.wanted = done, wanted
        self.writer = BackgroundWriter()
        self.started = time.monotonic()
        self.done_at_start = done
        self.rows: dict[str, TrialRow] = {}
        self.search: StudySearch | None = None
        self.epochs = max(experiment.training.epochs for experiment in config.base_experiments())
        dimensions = dimension_titles(config)
        self.board = console.Board(f"sweep {config.name}", ["trial", "state", "epoch", *dimensions, "clean %", "robust %"])

    def __getstate__(self) -> dict[str, Any]:
        """Return nothing: Tune keeps a copy for its own way of restoring, which a sweep never takes, and a thread cannot be copied."""
        return {}

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Open the trial's MLflow run and its line."""
        if trial.trial_id in self.rows:
            return
        suggestion = trial.config
        experiment = self.config.experiment(suggestion["values"])
        row = TrialRow(suggestion["number"], suggestion["values"], "running", fingerprint=experiment.fingerprint)
        identity = {SWEEP_TAG: self.key, FINGERPRINT_TAG: experiment.fingerprint}
        row.run_id = self.writer.now(self.tracker.run, "trial", identity, f"trial {suggestion['number']}", self.parent)
        self.writer.later(self.tracker.log_params, row.run_id, experiment.flatten())
        self.writer.later(self.tracker.log_json, row.run_id, experiment.model_dump(mode="json"), "config.json")
        self.rows[trial.trial_id] = row
        self._show(f"trial {row.number}: started, {_settings(row.values)}")

    def on_trial_result(self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any) -> None:
        """Log an epoch."""
        row = self.rows[trial.trial_id]
        numbers = {name: value for name, value in result.items() if _is_metric(name) and isinstance(value, int | float)}
        if result.get("finished"):
            row.metrics = numbers
            self.writer.later(self.tracker.log_metrics, row.run_id, {f"selected/{name}": value for name, value in numbers.items()})
            return
        row.epoch = result["epoch"]
        row.metrics = {**row.metrics, **numbers}
        self.writer.later(self.tracker.log_epoch, row.run_id, row.epoch, numbers)
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
        self.writer.later(self.tracker.set_tags, row.run_id, {"rayndom.state": "finished" if finished else "stopped early by ASHA"})
        self.writer.later(self.tracker.finish, row.run_id)
        self._show(f"trial {row.number}: {row.state}{_accuracies(row.metrics)}; {self._summary()}")

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Close a trial that broke for good."""
        row = self.rows.get(trial.trial_id)
        if row is None:
            return
        row.state = "failed"
        self.done += 1
        reason = _reason(trial)
        self.writer.later(self.tracker.set_tags, row.run_id, {"rayndom.state": "failed", "rayndom.error": reason})
        self.writer.later(self.tracker.finish, row.run_id, "FAILED")
        console.warn(f"trial {row.number} failed: {reason}")
        self._show(f"trial {row.number}: failed; {self._summary()}")

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


def _is_metric(name: str) -> bool:
    return name.startswith(("train/", "validation/", "time/", "model/"))


def _accuracies(metrics: Mapping[str, float]) -> str:
    if "validation/clean_accuracy" not in metrics:
        return ""
    return f", clean {_percent(metrics['validation/clean_accuracy'])} %, robust {_percent(metrics['validation/robust_accuracy'])} %"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def dimension_titles(config: SweepConfig) -> list[str]:
    """Return the heads of the columns that show a trial's values; the dimensions of several recipes share one column."""
    if config.recipes:
        return ["recipe", "values"]
    return [name.rpartition(".")[2] for name in config.space or {}]


def dimension_cells(config: SweepConfig, values: Mapping[str, Any]) -> list[str]:
    """Return a trial's values, one for each of `dimension_titles`."""
    if config.recipes:
        return [str(values.get(RECIPE, "")), _settings({name: value for name, value in values.items() if name != RECIPE})]
    return [_short(values.get(name)) for name in config.space or {}]


def _settings(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name.rpartition('.')[2]} {_short(value)}" for name, value in values.items())


def _reason(trial: Trial) -> str:
    cause = getattr(trial.get_error(), "cause", None) or trial.get_error()
    lines = [line for line in str(cause).strip().splitlines() if line.strip()]
    return lines[-1] if lines else "unknown"


def _flat_environment() -> dict[str, str]:
    return {f"environment.{key}": str(value) for key, value in collect_environment().items() if not isinstance(value, dict)}
