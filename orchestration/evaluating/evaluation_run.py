"""Evaluating trained models: units of work per (checkpoint, attack and protocol, block of samples), on Ray workers or in this process.

Every finished block is one JSON line, so a killed evaluation goes on where it was, and whoever runs a block writes the same record.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from analysis.evaluate import run_block
from analysis.evaluation.records import Record, append_record, read_records
from analysis.evaluation.suites import Suite
from analysis.evaluation.tasks import BlockTask, plan_blocks
from analysis.result import EvaluationResult, collect
from models.errors import UserError
from models.threat_model import ThreatModel
from models.weights import load_pretrained
from orchestration import console
from orchestration.exporting.targets import Target
from orchestration.home import Home
from trainers.data import DataConfig, evaluation_batches, load_data
from trainers.validation import limited

SMALL_WORK = 2e5
"""Forward passes of one image that one process makes in about the time that Ray takes to start."""


@dataclass
class Job:
    """The evaluation of one model: what is to be attacked, with which plan, and where its records are."""

    name: str
    target: Target
    x: Tensor
    y: Tensor
    plan: list[BlockTask]
    records_path: Path
    done: dict[str, Record] = field(default_factory=dict)

    @property
    def pending(self) -> list[BlockTask]:
        """Blocks that have no record yet."""
        return [task for task in self.plan if task.key not in self.done]

    def result(self) -> EvaluationResult:
        """Return what the finished blocks say."""
        return collect(self.done.values(), self.plan)


@dataclass(frozen=True)
class EvaluationSettings:
    """What is asked of an evaluation.

    Attributes:
        suite: name, file, or the suite itself. threat_model: None: the one the model was trained for.
        num_samples, num_draws: None: the suite's.
        data: None: the data set the model was trained on. seed: root of all seeds.
    """

    suite: str | Suite = "quick"
    threat_model: ThreatModel | None = None
    num_samples: int | None = None
    num_draws: int | None = None
    data: DataConfig | None = None
    seed: int = 0


def prepare(
    name: str,
    target: Target,
    settings: EvaluationSettings,
    home: Home,
    data_root: Path | None,
    images: tuple[Tensor, Tensor] | None = None,
) -> Job:
    """Plan the evaluation of a model on the test images of its data set, and read the records it already has.

    Args:
        images: from `test_images`, where several jobs share them; None: read here.

    Raises:
        UserError: the data set is not known or missing, or the suite does not fit the model.
    """
    experiment = target.experiment
    data = settings.data or (experiment.data if experiment else None)
    if data is None:
        raise UserError(f"{target.folder} does not say what data it was trained on; name a data set with --data.name")
    x, y = images if images is not None else test_images(data, data_root, settings.num_samples)
    model = load_pretrained(target.folder, resample_on_forward=False)
    threat_model = settings.threat_model or (experiment.threat_model if experiment else ThreatModel())
    plan = plan_blocks(
        model,
        x,
        y,
        settings.suite,
        threat_model=threat_model,
        seed=settings.seed,
        num_samples=settings.num_samples,
        num_draws=settings.num_draws,
    )
    path = home.evaluation(plan[0].checkpoint[:16]) / "records.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    known = read_records(path)
    done = {task.key: known[task.key] for task in plan if task.key in known}
    return Job(name, target, x, y, plan, path, done)


def test_images(data: DataConfig, data_root: Path | None, num_samples: int | None) -> tuple[Tensor, Tensor]:
    """Return test images (N, C, H, W) in [0,1] and labels; at most `num_samples`, the same number of each class."""
    split = limited(load_data(data, data_root).test, num_samples)
    batches = list(evaluation_batches(split, 256))
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


def run_jobs(
    jobs: Sequence[Job],
    *,
    workers: int | None,
    gpus_per_worker: float = 0,
    address: str | None = None,
    on_done: Callable[[Job], None] = lambda job: None,
    on_failure: Callable[[Job, Exception], None] | None = None,
) -> None:
    """Run all pending blocks of all jobs; records are on disk as soon as a block is done. A block of several jobs is run once.

    Args:
        jobs: from `prepare`.
        workers: 1: in this process, with all cores (or OMP_NUM_THREADS); more: Ray workers of one core each. None: as many as there are
            cores, or this process where the work is too small to start Ray for it.
        gpus_per_worker: share of a GPU for each worker.
        address: of a Ray cluster.
        on_done: called when a job's last block is done.
        on_failure: called when a block of a job cannot be run; the job's other blocks are left out then. None: the error is raised.
    """
    meter = _Meter(jobs)
    queue = _Queue(jobs, meter, on_done, on_failure)
    with meter.board:
        if not queue.waiting:
            return
        if not address and (workers == 1 or (workers is None and not gpus_per_worker and queue.cost < SMALL_WORK)):
            _run_here(queue, gpus_per_worker)
        else:
            _run_on_ray(queue, workers, gpus_per_worker, address)


class _Queue:
    """Blocks that wait, long ones first: the last worker to finish is then the least late."""

    def __init__(
        self,
        jobs: Sequence[Job],
        meter: _Meter,
        on_done: Callable[[Job], None],
        on_failure: Callable[[Job, Exception], None] | None,
    ) -> None:
        self.meter, self.on_done, self.on_failure = meter, on_done, on_failure
        self.owners: dict[tuple[Path, str], list[Job]] = {}
        self.waiting: list[tuple[Job, BlockTask]] = []
        self.failed: list[Job] = []
        for job in jobs:
            for task in job.pending:
                owners = self.owners.setdefault((job.records_path, task.key), [])
                if not owners:
                    self.waiting.append((job, task))
                owners.append(job)

    @property
    def cost(self) -> float:
        """Work that waits, in forward passes of one image."""
        return sum(task.cost for _, task in self.waiting)

    def sort(self) -> None:
        self.waiting.sort(key=lambda entry: -entry[1].cost)

    def take(self) -> tuple[Job, BlockTask] | None:
        """Return the next block that some job still wants."""
        while self.waiting:
            job, task = self.waiting.pop(0)
            wanting = [each for each in self.owners[job.records_path, task.key] if each not in self.failed]
            if wanting:
                return wanting[0], task
        return None

    def finished(self, job: Job, record: Record) -> None:
        append_record(job.records_path, record)
        for owner in self.owners[job.records_path, record["key"]]:
            owner.done[record["key"]] = record
            self.meter.finished(owner, record)
            if not owner.pending:
                self.on_done(owner)

    def broke(self, job: Job, task: BlockTask, error: Exception) -> None:
        if self.on_failure is None:
            raise error
        for owner in self.owners[job.records_path, task.key]:
            if owner not in self.failed:
                self.failed.append(owner)
                self.on_failure(owner, error)


def _run_here(queue: _Queue, gpus: float) -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1))
    loaded: tuple[Path, nn.Module] | None = None
    while (taken := queue.take()) is not None:
        job, task = taken
        if loaded is None or loaded[0] != job.target.folder:
            loaded = (job.target.folder, _load(job.target.folder, gpus))
        try:
            record = run_block(loaded[1], job.x, job.y, task)
        except Exception as error:
            queue.broke(job, task, error)
            continue
        queue.finished(job, record)


def _run_on_ray(queue: _Queue, workers: int | None, gpus: float, address: str | None) -> None:
    import ray

    from orchestration.training import cluster
    from orchestration.training.resources import TrialResources, concurrency

    available = cluster.connect(address)
    count = concurrency(TrialResources(cpus=1, gpus=gpus, workers=1), available, workers)
    queue.sort()
    # A worker that dies is started again and its block repeated: blocks have no effect but their record.
    evaluator = ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=3, max_task_retries=3)(_Evaluator)
    actors = [evaluator.remote(gpus) for _ in range(min(count, len(queue.waiting)))]
    stored: dict[int, Any] = {}
    running: dict[Any, tuple[Any, Job, BlockTask]] = {}

    def reference(tensor: Tensor) -> Any:
        """Put images into Ray's store once, however many jobs share them."""
        if id(tensor) not in stored:
            stored[id(tensor)] = ray.put(tensor)
        return stored[id(tensor)]

    def start(actor: Any) -> None:
        taken = queue.take()
        if taken is not None:
            job, task = taken
            images = (reference(job.x), reference(job.y))
            running[actor.run.remote(str(job.target.folder), *images, task.model_dump(mode="json"))] = (actor, job, task)

    for actor in actors:
        start(actor)
    while running:
        (finished,), _ = ray.wait(list(running), num_returns=1)
        actor, job, task = running.pop(finished)
        try:
            record = ray.get(finished)
        except ray.exceptions.RayError as error:
            queue.broke(job, task, getattr(error, "cause", None) or error)
        else:
            queue.finished(job, record)
        start(actor)
    for actor in actors:
        ray.kill(actor)


class _Evaluator:
    """Runs blocks in a Ray worker; keeps the models it has loaded."""

    def __init__(self, gpus: float) -> None:
        torch.set_num_threads(1)
        self.gpus = gpus
        self.models: dict[str, nn.Module] = {}

    def run(self, folder: str, x: Tensor, y: Tensor, task: dict[str, Any]) -> Record:
        """Run one block."""
        if folder not in self.models:
            self.models[folder] = _load(Path(folder), self.gpus)
        return run_block(self.models[folder], x.clone(), y.clone(), BlockTask(**task))


def _load(folder: Path, gpus: float) -> nn.Module:
    model = load_pretrained(folder, resample_on_forward=False)
    return model.to("cuda" if gpus else "cpu", memory_format=torch.channels_last)


class _Meter:
    """Done blocks, estimated work, time left: one line per model."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        import time

        self.jobs, self.clock = jobs, time.monotonic
        self.started = self.clock()
        self.board = console.Board("evaluation", ["model", "blocks", "last block", "accuracy %"])
        self.last: dict[str, tuple[str, float]] = {}
        self.total = sum(task.cost for job in jobs for task in job.plan) or 1.0
        self.resumed = sum(task.cost for job in jobs for task in job.plan if task.key in job.done)
        self.work = self.resumed
        self.costs: dict[str, float] = {task.key: task.cost for job in jobs for task in job.plan}
        self.titles: dict[str, str] = {task.key: task.title for job in jobs for task in job.plan}
        resumed = sum(len(job.done) for job in jobs)
        if resumed:
            console.say(f"{resumed} of {len(self.costs)} blocks are done already")

    def finished(self, job: Job, record: Record) -> None:
        """Count a block."""
        key = record["key"]
        self.work += self.costs[key]
        counts = record["samples"]["num_correct"]["evaluation"]
        accuracy = sum(counts) / len(counts) / record["block"]["num_draws"]["evaluation"]
        self.last[job.name] = (self.titles[key], accuracy)
        seconds = self.clock() - self.started
        fresh = self.work - self.resumed
        left = seconds / fresh * (self.total - self.work) if fresh else 0.0
        caption = (
            f"{100 * self.work / self.total:.0f} % of the work, {fresh / seconds:.0f} images/s through the network "
            f"(a backward pass counts as two), {console.duration(left)} left"
        )
        rows = [
            [
                each.name,
                f"{len(each.done)}/{len(each.plan)}",
                self.last.get(each.name, ("", 0.0))[0],
                f"{100 * self.last[each.name][1]:.1f}" if each.name in self.last else "",
            ]
            for each in self.jobs
        ]
        event = f"{job.name}: {self.titles[key]}, accuracy {100 * accuracy:.1f} %; {caption}"
        self.board.show(rows, caption, event)
