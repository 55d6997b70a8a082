"""A single run with several workers: a Ray Train group, its epochs followed through the run folder's reports."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray.train
from ray.train import UserCallback

from orchestration.experiment import ExperimentConfig
from orchestration.home import Home
from orchestration.run_folder import RunFolder
from orchestration.training import cluster
from orchestration.training.resources import concurrency, trial_resources
from orchestration.training.training_run import RunResult
from orchestration.training.trial import train_group
from trainers.reporting import EpochReport


class _Follow(UserCallback):
    """Puts rank 0's reports into a queue: the callback runs in Ray Train's controller, not in this process."""

    def __init__(self, queue: Any) -> None:
        self.queue = queue

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """Pass rank 0's report on."""
        self.queue.put(metrics[0])


def train_in_group(
    experiment: ExperimentConfig,
    folder: RunFolder,
    home: Home,
    data_root: Path | None,
    address: str | None,
    on_epoch: Callable[[EpochReport], None],
) -> RunResult:
    """Train with `resources.workers` workers; `on_epoch` is called here, in the driver.

    Raises:
        UserError: the workers do not fit the cluster. ray.train.TrainingFailedError: the workers failed for good.
    """
    from ray.util.queue import Empty, Queue

    finished = folder.result()
    available = cluster.connect(address)
    concurrency(trial_resources(experiment.resources), available)
    queue = Queue(actor_options={"num_cpus": 0})
    job = {
        "experiment": experiment.model_dump(mode="json"),
        "folder": str(folder.path),
        "data_root": str(data_root) if data_root else None,
        "train_storage": str(home.root / "train"),
        "start": f"{time.time_ns():x}",
    }

    @ray.remote(num_cpus=0)
    def controller() -> None:
        train_group(experiment, job, callbacks=[_Follow(queue)])

    pending = controller.remote()
    while True:
        done, _ = ray.wait([pending], timeout=0)
        try:
            while True:
                report = queue.get(timeout=0.5)
                if not report["finished"]:
                    numbers = {key: value for key, value in report.items() if "/" in key}
                    on_epoch(EpochReport(report["epoch"], numbers, is_best=False))
        except Empty:
            pass
        if done:
            ray.get(pending)
            break
    queue.shutdown()
    record = folder.result()
    assert record is not None
    return RunResult(folder, record["metrics"], record["selected_epoch"], record["num_epochs"], reused=finished is not None)
