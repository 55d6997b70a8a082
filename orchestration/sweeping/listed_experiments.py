"""Training a given list of experiments (baselines, repeats over seeds): as many at a time as fit, on the Ray that the sweep runs on."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import tune

from orchestration import console
from orchestration.experiment import ExperimentConfig, ResourcesConfig
from orchestration.home import Home
from orchestration.run_folder import RunFolder
from orchestration.sweeping.trial_runs import log_history
from orchestration.tracking.background_writer import BackgroundWriter
from orchestration.tracking.tracker import FINGERPRINT_TAG, Tracker
from orchestration.training import cluster
from orchestration.training.final_measures import MeasureConfig, kept_protocol_metrics
from orchestration.training.resources import concurrency, trial_resources
from orchestration.training.trial import failure_reason, run_trial, tune_resources
from trainers.fit import TrainingDiverged


@dataclass(frozen=True)
class Listed:
    """An experiment of the list, and what it is called in lines and in MLflow."""

    title: str
    experiment: ExperimentConfig


def train_baselines(experiments: Sequence[ExperimentConfig], home: Home, data_root: Path | None, tracker: Tracker, parent: str) -> None:
    """Train every baseline that has no finished run yet; each gets its own MLflow run below `parent`.

    Raises:
        RuntimeError: a baseline failed.
    """
    train_listed("baseline", [Listed(each.name, each) for each in experiments], home, data_root, tracker, parent)


def train_listed(
    kind: str,
    listed: Sequence[Listed],
    home: Home,
    data_root: Path | None,
    tracker: Tracker,
    parent: str,
    measure: MeasureConfig | None = None,
) -> None:
    """Train every experiment that has no finished run yet; each gets its own MLflow run below `parent`.

    Args:
        kind: `baseline` or `repeat`.
        measure: attack the finished models under named protocols, on validation images; None: do not.

    Raises:
        RuntimeError: one of them failed.
    """
    failures = train_all(kind, listed, home, data_root, tracker, parent, measure)
    if failures:
        raise RuntimeError(f"a {kind} failed: {next(iter(failures.values()))}")


def train_all(
    kind: str,
    listed: Sequence[Listed],
    home: Home,
    data_root: Path | None,
    tracker: Tracker,
    parent: str,
    measure: MeasureConfig | None = None,
    on_end: Callable[[ExperimentConfig], None] = lambda experiment: None,
) -> dict[str, str]:
    """Train like `train_listed`, but go on when one fails; return fingerprint -> why it failed.

    Args:
        on_end: called when an experiment has finished or failed for good.

    Raises:
        KeyboardInterrupt: the user stopped it.
    """
    pending = [each for each in listed if not _is_done(RunFolder(home.run(each.experiment.fingerprint)), measure)]
    _complete_records(kind, [each for each in listed if each not in pending], home, tracker, parent, measure)
    if not pending:
        return {}
    console.say(f"training the {kind}s {', '.join(each.title for each in pending)}")
    listener = _Listener(kind, pending, tracker, parent, on_end)
    # Tune reserves the same for every trial of a start.
    groups: dict[ResourcesConfig, list[Listed]] = {}
    for each in pending:
        groups.setdefault(each.experiment.resources, []).append(each)
    with listener.writer, listener.board:
        for resources, group in groups.items():
            _train_alike(kind, [each.experiment for each in group], resources, home, data_root, measure, listener)
            if any(each.experiment.fingerprint not in listener.over for each in group):
                raise KeyboardInterrupt  # Tune takes Ctrl-C as a wish to end in good order, and returns
    return listener.failures


def _train_alike(
    kind: str,
    experiments: Sequence[ExperimentConfig],
    resources: ResourcesConfig,
    home: Home,
    data_root: Path | None,
    measure: MeasureConfig | None,
    listener: _Listener,
) -> None:
    at_once = concurrency(trial_resources(resources), cluster.connect(dashboard=resources.workers > 1))
    start = f"{time.time_ns():x}"
    by_fingerprint = {each.fingerprint: each for each in experiments}

    def trial(settings: dict[str, Any]) -> None:
        experiment = by_fingerprint[settings["fingerprint"]]
        job = {
            "experiment": experiment.model_dump(mode="json"),
            "folder": str(home.run(experiment.fingerprint)),
            "data_root": str(data_root) if data_root else None,
            "train_storage": str(home.root / "train"),
            "start": start,
            "measure": measure.model_dump(mode="json") if measure else None,
        }
        try:
            run_trial(job)
        except TrainingDiverged as error:
            # Not raised: Tune would try again, and it would diverge again.
            tune.report({"epoch": 0, "finished": False, "failed": str(error), "fingerprint": experiment.fingerprint})

    tune.Tuner(
        tune.with_resources(trial, tune_resources(experiments[0])),
        param_space={"fingerprint": tune.grid_search(list(by_fingerprint))},
        tune_config=tune.TuneConfig(max_concurrent_trials=at_once, reuse_actors=True),
        run_config=tune.RunConfig(
            name=f"{kind}s-{start}",
            storage_path=str(home.root / "tune"),
            callbacks=[listener],
            failure_config=tune.FailureConfig(max_failures=2),
            verbose=0,
        ),
    ).fit()


def _is_done(folder: RunFolder, measure: MeasureConfig | None) -> bool:
    return folder.result() is not None and (measure is None or kept_protocol_metrics(folder, measure) is not None)


class _Listener(tune.Callback):
    """A line per epoch of each experiment, and its MLflow run."""

    def __init__(
        self, kind: str, listed: Sequence[Listed], tracker: Tracker, parent: str, on_end: Callable[[ExperimentConfig], None]
    ) -> None:
        self.experiments = {each.experiment.fingerprint: each.experiment for each in listed}
        self.titles = {each.experiment.fingerprint: each.title for each in listed}
        self.kind, self.tracker, self.parent = kind, tracker, parent
        self.board = console.Board(f"{kind}s", ["recipe", "epoch", "clean %", "robust %"])
        self.rows: dict[str, list[str]] = {}
        self.runs: dict[str, str] = {}
        self.failures: dict[str, str] = {}
        self.over: set[str] = set()
        self.on_end = on_end
        self.writer = BackgroundWriter(tracker.uri)

    def __getstate__(self) -> dict[str, Any]:
        """Return nothing: Tune keeps a copy for its own way of restoring, which is never taken, and a terminal cannot be copied."""
        return {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Open the MLflow run."""
        experiment = self.experiments[trial.config["fingerprint"]]
        self.writer.later(self._open, experiment)

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any) -> None:
        """Log an epoch."""
        experiment = self.experiments[result["fingerprint"]]
        if "failed" in result:
            self._fail(experiment, result["failed"])
            return
        numbers = {key: value for key, value in result.items() if "/" in key and isinstance(value, int | float)}
        if result["finished"]:
            self._log(experiment, "log_metrics", {f"selected/{name}": value for name, value in numbers.items()})
            self._log(experiment, "finish")
            self._end(experiment)
            return
        self._log(experiment, "log_epoch", result["epoch"], numbers)
        accuracies = [
            f"{100 * numbers[name]:.1f}" if name in numbers else "" for name in ("validation/clean_accuracy", "validation/robust_accuracy")
        ]
        epoch = f"{result['epoch']}/{experiment.training.epochs}"
        title = self.titles[experiment.fingerprint]
        self.rows[title] = [title, epoch, *accuracies]
        self.board.show(list(self.rows.values()), "", f"{title}: epoch {epoch}, clean {accuracies[0]} %, robust {accuracies[1]} %")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Close the MLflow run of a trial that broke for good."""
        self._fail(self.experiments[trial.config["fingerprint"]], failure_reason(trial))

    def _fail(self, experiment: ExperimentConfig, reason: str) -> None:
        self.failures[experiment.fingerprint] = reason
        self._log(experiment, "set_tags", {"rayndom.error": reason})
        self._log(experiment, "finish", "FAILED")
        console.warn(f"{self.titles[experiment.fingerprint]} failed: {reason}")
        self._end(experiment)

    def _end(self, experiment: ExperimentConfig) -> None:
        self.over.add(experiment.fingerprint)
        self.on_end(experiment)

    def _open(self, experiment: ExperimentConfig) -> None:
        title = self.titles[experiment.fingerprint]
        self.runs[experiment.fingerprint] = _open_run(self.kind, Listed(title, experiment), self.tracker, self.parent)

    def _log(self, experiment: ExperimentConfig, method: str, *arguments: Any) -> None:
        """Call a method of the tracker on an experiment's run, when the writer comes to it: then the run is open."""

        def log() -> None:
            if experiment.fingerprint not in self.runs:  # it failed before it started
                self._open(experiment)
            getattr(self.tracker, method)(self.runs[experiment.fingerprint], *arguments)

        self.writer.later(log)


def _open_run(kind: str, each: Listed, tracker: Tracker, parent: str) -> str:
    run_id = tracker.run(kind, {FINGERPRINT_TAG: each.experiment.fingerprint}, each.title, parent=parent)
    tracker.log_params(run_id, each.experiment.flatten())
    tracker.log_json(run_id, each.experiment.model_dump(mode="json"), "config.json")
    return run_id


def _complete_records(kind: str, done: Sequence[Listed], home: Home, tracker: Tracker, parent: str, measure: MeasureConfig | None) -> None:
    """Give finished experiments their closed run below `parent` where they have none: trained for another sweep, or by a start that was
    killed before its last writes."""
    closed = {run.data.tags.get(FINGERPRINT_TAG) for run in tracker.children(parent, kind) if run.info.status == "FINISHED"}
    for each in done:
        folder = RunFolder(home.run(each.experiment.fingerprint))
        record = folder.result()
        if each.experiment.fingerprint in closed or record is None:
            continue
        run_id = _open_run(kind, each, tracker, parent)
        log_history(tracker, run_id, folder)
        measured = (kept_protocol_metrics(folder, measure) or {}) if measure else {}
        tracker.log_metrics(run_id, {f"selected/{name}": value for name, value in (record["metrics"] | measured).items()})
        tracker.finish(run_id)
