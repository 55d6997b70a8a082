"""Blocks of evaluations on Ray workers. Whoever runs a block writes the same record, so a worker that dies is simply started again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from analysis.evaluate import BlockQueue, BlockTask, PointStore, run_block
from analysis.evaluation.queue import E
from analysis.evaluation.records import Record
from models.accelerator import device_for
from models.freed_memory import keep_freed_memory
from orchestration.storage import fetch, keep, storage_of
from orchestration.trained_models.external import KnownExternal
from orchestration.trained_models.targets import files_of, load_source

Source = Path | KnownExternal


def load_for_blocks(source: Source, gpus: float) -> nn.Module:
    """Return a target's model where its blocks run: on the GPU if a worker has a share of one."""
    model = load_source(source).to(device_for(gpus))
    # The code of other people's networks may rely on the order of values in memory (`view`).
    return model if isinstance(source, KnownExternal) else model.to(memory_format=torch.channels_last)


def run_on_ray(queue: BlockQueue[E], source_of: Callable[[E], Source], workers: int | None, gpus: float, address: str | None) -> None:
    """Run the blocks of a queue on Ray workers.

    Args:
        source_of: returns what a job's model is loaded from. workers: at most so many; None: as many as the cluster has room for.
        gpus: share of a GPU for each. address: of a Ray cluster.
    """
    import ray

    from orchestration.training import cluster
    from orchestration.training.resources import TrialResources, concurrency
    from orchestration.training.shared_storage import SharedStorage

    available = cluster.connect(address)
    count = concurrency(TrialResources(cpus=1, gpus=gpus, workers=1), available, workers)
    for file in {file for job, _ in queue.waiting for file in files_of(source_of(job))}:
        if storage_of(file) is None:
            SharedStorage(file).check()
    queue.long_ones_first()
    # A worker that dies is started again and its block repeated: blocks have no effect but their record.
    evaluator = ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=3, max_task_retries=3)(_Evaluator)
    actors: list[Any] = [evaluator.remote(gpus) for _ in range(min(count, len(queue.waiting)))]
    stored: dict[int, Any] = {}
    running: dict[Any, tuple[Any, E, BlockTask]] = {}

    def reference(tensor: Tensor) -> Any:
        """Put images into Ray's store once, however many jobs share them."""
        if id(tensor) not in stored:
            stored[id(tensor)] = ray.put(tensor)
        return stored[id(tensor)]

    def start(actor: Any) -> None:
        """Give a worker its next block; without one it ends, so that what else runs on the cluster has its place."""
        taken = queue.take()
        if taken is None:
            ray.kill(actor)
            return
        job, task = taken
        running[actor.run.remote(source_of(job), reference(job.x), reference(job.y), task, job.points)] = (actor, job, task)

    for actor in actors:
        start(actor)
    while running:
        (finished,), _ = ray.wait(list(running), num_returns=1)
        actor, job, task = running.pop(finished)
        try:
            record = ray.get(finished)
        except ray.exceptions.RayError as error:
            queue.broke(job, task, getattr(error, "cause", None) or error)
            if isinstance(error, ray.exceptions.RayActorError):  # it died once too often, over this block: another takes the next
                actor = evaluator.remote(gpus)
        else:
            queue.finished(job, task, record)
        start(actor)


class _Evaluator:
    """Runs blocks in a Ray worker; keeps the models it has loaded."""

    def __init__(self, gpus: float) -> None:
        torch.set_num_threads(1)
        keep_freed_memory()
        self.gpus = gpus
        self.models: dict[Source, nn.Module] = {}

    def run(self, source: Source, x: Tensor, y: Tensor, task: BlockTask, points: PointStore | None) -> Record:
        """Run one block."""
        if source not in self.models:
            self.models[source] = load_for_blocks(source, self.gpus)
        if points is None:
            return run_block(self.models[source], x.clone(), y.clone(), task, points)
        fetch(points.folder)
        record = run_block(self.models[source], x.clone(), y.clone(), task, points)
        keep(points.folder)
        return record
