"""Training the baselines of a sweep: as many at a time as fit, on the Ray that the sweep runs on."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ray import tune

from orchestration import cluster, console
from orchestration.experiment import ExperimentConfig
from orchestration.home import Home
from orchestration.resources import concurrency, trial_resources
from orchestration.run_folder import RunFolder
from orchestration.tracking import FINGERPRINT_TAG, Tracker
from orchestration.trial import run_trial, tune_resources


def train_baselines(experiments: Sequence[ExperimentConfig], home: Home, data_root: Path | None, tracker: Tracker, parent: str) -> None:
    """Train every experiment that has no finished run yet; each gets its own MLflow run below `parent`.

    Raises:
        RuntimeError: a baseline failed.
    """
    pending = [each for each in experiments if RunFolder(home.run(each.fingerprint)).result() is None]
    if not pending:
        return
    available = cluster.connect()
    need = max((trial_resources(each.resources) for each in pending), key=lambda resources: (resources.gpus, resources.cpus))
    console.say(f"training the baselines {', '.join(each.name for each in pending)}")
    start = f"{time.time_ns():x}"
    listener = _BaselineListener(pending, tracker, parent)
    by_fingerprint = {each.fingerprint: each for each in pending}

    def trial(settings: dict[str, Any]) -> None:
        experiment = by_fingerprint[settings["fingerprint"]]
        run_trial(
            {
                "experiment": experiment.model_dump(mode="json"),
                "folder": str(home.run(experiment.fingerprint)),
                "data_root": str(data_root) if data_root else None,
                "train_storage": str(home.root / "train"),
                "start": start,
            }
        )

    with listener.board:
        results = tune.Tuner(
            tune.with_resources(trial, tune_resources(pending[0])),
            param_space={"fingerprint": tune.grid_search(list(by_fingerprint))},
            tune_config=tune.TuneConfig(max_concurrent_trials=concurrency(need, available), reuse_actors=True),
            run_config=tune.RunConfig(
                name=f"baselines-{start}",
                storage_path=str(home.root / "tune"),
                callbacks=[listener],
                failure_config=tune.FailureConfig(max_failures=2),
                verbose=0,
            ),
        ).fit()
    if results.errors:
        raise RuntimeError(f"a baseline failed: {str(results.errors[0]).strip().splitlines()[-1]}")


class _BaselineListener(tune.Callback):
    """A line per epoch of each baseline, and its MLflow run."""

    def __init__(self, experiments: Sequence[ExperimentConfig], tracker: Tracker, parent: str) -> None:
        self.experiments = {each.fingerprint: each for each in experiments}
        self.tracker, self.parent = tracker, parent
        self.board = console.Board("baselines", ["recipe", "epoch", "clean %", "robust %"])
        self.rows: dict[str, list[str]] = {}
        self.runs: dict[str, str] = {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Open the MLflow run."""
        experiment = self.experiments[trial.config["fingerprint"]]
        run_id = self.tracker.run("baseline", {FINGERPRINT_TAG: experiment.fingerprint}, experiment.name, parent=self.parent)
        self.tracker.log_params(run_id, experiment.flatten())
        self.tracker.log_json(run_id, experiment.model_dump(mode="json"), "config.json")
        self.runs[experiment.fingerprint] = run_id

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any) -> None:
        """Log an epoch."""
        experiment = self.experiments[result["fingerprint"]]
        run_id = self.runs[experiment.fingerprint]
        numbers = {key: value for key, value in result.items() if "/" in key and isinstance(value, int | float)}
        if result["finished"]:
            self.tracker.log_metrics(run_id, {f"selected/{name}": value for name, value in numbers.items()})
            self.tracker.finish(run_id)
            return
        self.tracker.log_epoch(run_id, result["epoch"], numbers)
        accuracies = [
            f"{100 * numbers[name]:.1f}" if name in numbers else "" for name in ("validation/clean_accuracy", "validation/robust_accuracy")
        ]
        epoch = f"{result['epoch']}/{experiment.training.epochs}"
        self.rows[experiment.name] = [experiment.name, epoch, *accuracies]
        self.board.show(
            list(self.rows.values()), "", f"{experiment.name}: epoch {epoch}, clean {accuracies[0]} %, robust {accuracies[1]} %"
        )
