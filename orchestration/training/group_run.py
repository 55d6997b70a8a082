"""A single run with several workers: a Ray Train group, its epochs followed through the run folder's reports."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ray
from ray.train import UserCallback

from orchestration.training import cluster
from orchestration.training.job import TrainingJob, TrialReport, unbundled
from orchestration.training.ray_internals import outlive_nodes
from orchestration.training.resources import concurrency, trial_resources
from orchestration.training.shared_storage import probed
from orchestration.training.training_run import RunResult, as_result, check_initial_weights
from orchestration.training.trial import train_group
from trainers.reporting import EpochReport


class _Follow(UserCallback):
    """Puts rank 0's reports into a queue: the callback runs in Ray Train's controller, not in this process."""

    def __init__(self, queue: Any) -> None:
        self.queue = queue

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """Pass rank 0's report on."""
        for result in unbundled(metrics[0]):
            self.queue.put(result)


def train_in_group(
    job: TrainingJob, address: str | None, on_epoch: Callable[[EpochReport], None], on_ready: Callable[[], None]
) -> RunResult:
    """Train with `resources.workers` workers of the Ray at `address`; the listeners are called here, in the driver.

    Args:
        job: what to train. address: of Ray. on_epoch: called after every epoch. on_ready: called once the workers have taken the first
            step.

    Raises:
        UserError: the workers do not fit the cluster, or something does not fit them. TrainingDiverged: the loss is not finite.
        ray.train.TrainingFailedError: the workers failed for good.
    """
    check_initial_weights(job)
    available = cluster.connect(address)
    concurrency(trial_resources(job.experiment.resources), available)
    if job.experiment.resources.is_elastic:
        outlive_nodes()
    with probed(job.folder.path.parent.parent):
        return _follow_group(job, on_epoch, on_ready)


def _follow_group(job: TrainingJob, on_epoch: Callable[[EpochReport], None], on_ready: Callable[[], None]) -> RunResult:
    from ray.util.queue import Empty, Queue

    finished = job.folder.result()
    ready = False
    queue = Queue(actor_options={"num_cpus": 0})

    @ray.remote(num_cpus=0)
    def controller() -> None:
        train_group(job, callbacks=[_Follow(queue)])

    pending = controller.remote()
    while True:
        done, _ = ray.wait([pending], timeout=0)
        try:
            while True:
                report = TrialReport.from_result(queue.get(timeout=0.5))
                if not ready:
                    on_ready()
                    ready = True
                if report.epoch and not report.finished:
                    on_epoch(EpochReport(report.epoch, report.metrics))
        except Empty:
            pass
        if done:
            try:
                ray.get(pending)
            except ray.exceptions.RayTaskError as error:
                raise (error.cause or error) from None  # its text would be the stack of every process on the way
            break
    queue.shutdown()
    record = job.folder.result()
    assert record is not None
    return as_result(job.folder, record, reused=finished is not None)
