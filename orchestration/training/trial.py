"""What runs inside a Tune trial: one worker trains in the trial's own process, several in a Ray Train group that it starts."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray.train
from ray import tune
from ray.train import UserCallback
from ray.train.torch import TorchTrainer
from ray.tune.experiment import Trial
from ray.tune.integration.ray_train import TuneReportCallback

from models.errors import UserError
from orchestration.experiment import ResourcesConfig
from orchestration.storage import keep, storage_of
from orchestration.training.cluster import PATIENCE_S
from orchestration.training.final_measures import protocol_metrics
from orchestration.training.job import TrainingJob, TrialReport, bundled, unbundled
from orchestration.training.preemption import GroupNotice, TrialNotice, preemptions_without_limit
from orchestration.training.ray_internals import raised_by_workers
from orchestration.training.resources import DRIVER_BUNDLE, trial_resources
from orchestration.training.training_run import RunResult, train_here
from orchestration.training.validation_task import FreeWorkers
from orchestration.training.worker_group import WorkerGroup
from trainers.distributed import world
from trainers.fit import TrainingDiverged
from trainers.reporting import EpochReport

_START_TIMEOUT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
_LOOK_INTERVAL = "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"
LOOK_EVERY_S = 0.5
"""A group's report is passed on when its controller looks, and until then its workers wait."""
ELASTIC_START_S = 20.0
"""Room that is there is given within a second; waiting longer is in vain where Ray counted a node that was just lost."""
MOST_STARTS = 60
"""Groups whose size changes that may be too large for the room there is, one after the other."""
RESIZE_EVERY_S = 30.0
"""How often such a group looks whether there is room for more workers."""


def run_trial(job: TrainingJob) -> None:
    """Train, and report every epoch, then once more at the end with the selected epoch's metrics, as `TrialReport`s.

    A training that diverges is reported as failed and not raised: Tune would try again, and it would diverge again.
    """
    job = job.with_own_cores()
    try:
        _train_and_report(job)
    except TrainingDiverged as error:
        tune.report(TrialReport(0, {}, job.experiment.fingerprint, failed=str(error)).to_result())


def _train_and_report(job: TrainingJob) -> None:
    if job.experiment.resources.most_workers > 1:
        train_group(job, callbacks=[_ReportToTune()])
        return
    with job.folder.locked():
        beside = FreeWorkers(job) if job.experiment.resources.validate_beside else None
        result = train_here(job, on_epoch=lambda report: tune.report(_after_epoch(job, report)), leaving=TrialNotice(), beside=beside)
        metrics = _final_metrics(job, result)
    tune.report(_at_end(job, result, metrics))


class _ReportToTune(TuneReportCallback):
    """Passes on what Tune judges: that the workers are ready is not an epoch."""

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """Pass rank 0's report on."""
        for result in unbundled(metrics[0]):
            if TrialReport.from_result(result).epoch:
                super().after_report(run_context, [result], checkpoint)


def train_group(job: TrainingJob, callbacks: Sequence[UserCallback]) -> ray.train.Result:
    """Train with several workers in a Ray Train group. A worker that dies is restarted twice, from the last finished epoch.

    Raises:
        UserError, TrainingDiverged: what a worker raised.
        ray.train.TrainingFailedError: the workers failed for good.
    """
    resources = job.experiment.resources
    if resources.is_elastic:
        # Ray Train counts the room that there was a moment ago; a group that is too large for what is left is given up soon, and a smaller
        # one begins.
        os.environ[_START_TIMEOUT] = str(ELASTIC_START_S)
    else:
        # Ray Train gives workers a minute to come; nodes of a cluster are waited for as long as trials with one worker wait for them.
        os.environ.setdefault(_START_TIMEOUT, str(PATIENCE_S))
    os.environ.setdefault(_LOOK_INTERVAL, str(LOOK_EVERY_S))
    per_worker = {"CPU": resources.cpus_per_worker or 1.0}
    if resources.gpus_per_worker:
        per_worker["GPU"] = resources.gpus_per_worker
    trainer = TorchTrainer(
        run_worker,
        train_loop_config=job.to_json(),
        scaling_config=ray.train.ScalingConfig(
            num_workers=resources.workers,  # type: ignore[arg-type]  # as below
            use_gpu=resources.gpus_per_worker > 0,
            resources_per_worker=per_worker,
            elastic_resize_monitor_interval_s=RESIZE_EVERY_S,  # type: ignore[call-arg]  # as below
        ),
        run_config=ray.train.RunConfig(
            name=f"{job.experiment.fingerprint}-{job.start}",
            **_train_storage(job.train_storage),
            callbacks=list(callbacks),  # type: ignore[arg-type]  # Ray types it as the callback of Train V1
            failure_config=ray.train.FailureConfig(  # type: ignore[call-arg]  # as above
                max_failures=2, controller_failure_limit=MOST_STARTS if resources.is_elastic else 3, **preemptions_without_limit()
            ),
        ),
    )
    try:
        return trainer.fit()
    except ray.train.TrainingFailedError as error:
        for cause in raised_by_workers(error):
            if isinstance(cause, UserError | TrainingDiverged):
                raise cause from None
        raise


def _train_storage(folder: Path) -> dict[str, Any]:
    """Return where Ray Train keeps files of its own, which every node must see."""
    storage = storage_of(folder)
    if storage is None:
        return {"storage_path": str(folder)}
    filesystem, base = storage.filesystem()
    return {"storage_path": f"{base}/.ray-train", "storage_filesystem": filesystem}


def run_worker(content: Mapping[str, Any]) -> None:
    """Train as one worker of a group; every worker reports that it is ready, then each epoch. Rank 0 holds the run's lock.

    Args:
        content: JSON form of the `TrainingJob`.
    """
    job = TrainingJob.from_json(content).with_own_cores()
    job.folder.path.mkdir(parents=True, exist_ok=True)
    group = WorkerGroup(job.experiment.training)
    if group.stands_by:
        group.stand_by()
        return
    with group.training(), job.folder.locked() if group.rank == 0 else contextlib.nullcontext():
        result = train_here(
            job,
            on_epoch=lambda report: group.report(_after_epoch(job, report)),
            on_replay=lambda reports: group.report(bundled([_after_epoch(job, report) for report in reports])),
            on_ready=lambda: group.report(TrialReport(0, {}, job.experiment.fingerprint).to_result()),
            leaving=GroupNotice(group.preemption, group.agree),
        )
        # The others wait in their report while rank 0, whose report counts, measures.
        metrics = _final_metrics(job, result) if group.rank == 0 else result.metrics
        group.report(_at_end(job, result, metrics))


def _after_epoch(job: TrainingJob, report: EpochReport) -> dict[str, Any]:
    return TrialReport(report.epoch, report.metrics, job.experiment.fingerprint, workers=world()[1]).to_result()


def _at_end(job: TrainingJob, result: RunResult, metrics: Mapping[str, float]) -> dict[str, Any]:
    return TrialReport(result.num_epochs, metrics, job.experiment.fingerprint, finished=True, workers=world()[1]).to_result()


def _final_metrics(job: TrainingJob, result: RunResult) -> Mapping[str, float]:
    """Return the metrics of a finished run, those under named protocols among them where the job asks for them."""
    if job.measure is None:
        return result.metrics
    measured = protocol_metrics(job, job.measure)
    keep(job.folder.path)
    return result.metrics | measured


def tune_resources(resources: ResourcesConfig) -> dict[str, float]:
    """Return what Tune reserves for the trial's own process: everything with one worker, next to nothing with several."""
    if resources.most_workers > 1:
        return dict(DRIVER_BUNDLE)
    need = trial_resources(resources)
    return {"CPU": need.cpus} | ({"GPU": need.gpus} if need.gpus else {})


def failure_reason(trial: Trial) -> str:
    """Return in one line what broke a Tune trial last: the end of an exception's text, or that and why its process died."""
    text: object = trial.get_error()
    if text is None and trial.error_file and Path(trial.error_file).is_file():  # not stored yet, as when the trial is tried again
        text = Path(trial.error_file).read_text(errors="replace")
    lines = [line.strip() for line in str(text or "").rpartition("Failure # ")[2].splitlines() if line.strip()]
    if not lines:
        return "unknown"
    deaths = [line.partition(": ")[2] for line in lines if re.match(r"ray\.exceptions\.(Actor|Worker|Node)\w+Error: ", line)]
    return deaths[-1] if deaths else lines[-1]
