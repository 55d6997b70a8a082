"""What runs inside a Tune trial: one worker trains in the trial's own process, several in a Ray Train group that it starts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import ray.train
from ray import tune
from ray.train.torch import TorchTrainer
from ray.tune.integration.ray_train import TuneReportCallback

from orchestration.experiment import ExperimentConfig
from orchestration.run_folder import RunFolder
from orchestration.training.final_measures import MeasureConfig, protocol_metrics
from orchestration.training.resources import DRIVER_BUNDLE, trial_resources
from orchestration.training.training_run import RunResult, train_here
from trainers.reporting import EpochReport


def report_of(experiment: ExperimentConfig, report: EpochReport) -> dict[str, Any]:
    """Return what a trial tells the driver after an epoch."""
    return dict(report.metrics) | {"epoch": report.epoch, "finished": False, "fingerprint": experiment.fingerprint}


def run_trial(job: dict[str, Any]) -> None:
    """Train the experiment of `job` and report every epoch, then once more with `finished` and the selected epoch's metrics.

    Args:
        job: `experiment` (JSON form), `folder` (run folder), `data_root`, `train_storage` (for Ray Train's own files), and `measure` (JSON
            form of a `MeasureConfig`) where the finished model is to be attacked under named protocols.
    """
    experiment = with_own_cores(ExperimentConfig(**job["experiment"]))
    if experiment.resources.workers > 1:
        train_group(experiment, job, callbacks=[TuneReportCallback()])
        return
    folder = RunFolder(Path(job["folder"]))
    with folder.locked():
        result = train_here(
            experiment,
            folder,
            _path(job["data_root"]),
            on_epoch=lambda report: tune.report(report_of(experiment, report)),
        )
        metrics = final_metrics(experiment, folder, result, job)
    tune.report(finished_report(experiment, metrics, result.num_epochs))


def final_metrics(experiment: ExperimentConfig, folder: RunFolder, result: RunResult, job: dict[str, Any]) -> dict[str, float]:
    """Return the metrics of a finished run, those under named protocols among them where the job asks for them."""
    if job.get("measure") is None:
        return dict(result.metrics)
    return result.metrics | protocol_metrics(experiment, folder, _path(job["data_root"]), MeasureConfig(**job["measure"]))


def finished_report(experiment: ExperimentConfig, metrics: dict[str, float], num_epochs: int) -> dict[str, Any]:
    """Return the last thing a trial tells the driver."""
    return dict(metrics) | {"epoch": num_epochs, "finished": True, "fingerprint": experiment.fingerprint}


def train_group(experiment: ExperimentConfig, job: dict[str, Any], callbacks: list[Any]) -> ray.train.Result:
    """Train with several workers in a Ray Train group. A worker that dies is restarted twice, from the last finished epoch.

    Raises:
        ray.train.TrainingFailedError: the workers failed for good.
    """
    resources = experiment.resources
    per_worker = {"CPU": resources.cpus_per_worker or 1.0}
    if resources.gpus_per_worker:
        per_worker["GPU"] = resources.gpus_per_worker
    trainer = TorchTrainer(
        run_worker,
        train_loop_config=job,
        scaling_config=ray.train.ScalingConfig(
            num_workers=resources.workers, use_gpu=resources.gpus_per_worker > 0, resources_per_worker=per_worker
        ),
        run_config=ray.train.RunConfig(
            # Ray Train resumes from its own records when the name is taken; ours are in the run folder, so each start is its own.
            name=f"{experiment.fingerprint}-{job['start']}",
            storage_path=job["train_storage"],
            callbacks=callbacks,
            failure_config=ray.train.FailureConfig(max_failures=2, controller_failure_limit=3),
        ),
    )
    return trainer.fit()


def run_worker(job: dict[str, Any]) -> None:
    """Train as one worker of a group; every worker reports, rank 0 holds the run's lock."""
    experiment = with_own_cores(ExperimentConfig(**job["experiment"]))
    folder = RunFolder(Path(job["folder"]))
    folder.path.mkdir(parents=True, exist_ok=True)

    rank = ray.train.get_context().get_world_rank()

    def train() -> None:
        result = train_here(
            experiment,
            folder,
            _path(job["data_root"]),
            on_epoch=lambda report: ray.train.report(report_of(experiment, report)),
        )
        # The others wait in their report while rank 0, whose report counts, measures.
        metrics = final_metrics(experiment, folder, result, job) if rank == 0 else dict(result.metrics)
        ray.train.report(finished_report(experiment, metrics, result.num_epochs))

    if rank == 0:
        with folder.locked():
            train()
    else:
        train()


def with_own_cores(experiment: ExperimentConfig) -> ExperimentConfig:
    """Return the experiment with as many threads per worker as Ray gives it cores: one unless the recipe says more."""
    resources = experiment.resources
    return experiment.model_copy(update={"resources": resources.model_copy(update={"cpus_per_worker": resources.cpus_per_worker or 1.0})})


def tune_resources(experiment: ExperimentConfig) -> dict[str, float]:
    """Return what Tune reserves for the trial's own process: everything with one worker, next to nothing with several."""
    need = trial_resources(experiment.resources)
    if need.workers > 1:
        return dict(DRIVER_BUNDLE)
    return {"CPU": need.cpus} | ({"GPU": need.gpus} if need.gpus else {})


def failure_reason(trial: Any) -> str:
    """Return in one line what broke a Tune trial last: the end of an exception's text, or that and why its process died."""
    text = trial.get_error()
    if text is None and trial.error_file and Path(trial.error_file).is_file():  # not stored yet, as when the trial is tried again
        text = Path(trial.error_file).read_text(errors="replace")
    lines = [line.strip() for line in str(text or "").rpartition("Failure # ")[2].splitlines() if line.strip()]
    if not lines:
        return "unknown"
    deaths = [line.partition(": ")[2] for line in lines if re.match(r"ray\.exceptions\.(Actor|Worker|Node)\w+Error: ", line)]
    return deaths[-1] if deaths else lines[-1]


def _path(text: str | None) -> Path | None:
    return Path(text) if text else None
