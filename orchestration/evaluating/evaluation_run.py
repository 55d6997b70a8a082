"""Evaluating trained models: units of work per (checkpoint, attack and protocol, block of samples), on Ray workers or in this process.

Every finished block is one JSON line, so a killed evaluation goes on where it was, and whoever runs a block writes the same record.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from analysis.evaluate import BlockQueue, Evaluation, EvaluationResult, PointStore, Progress, collect, plan_blocks, run_in_order
from analysis.evaluation.points import KeptPoints, PointPurpose
from analysis.evaluation.queue import OnBrokenBlock
from analysis.evaluation.suites import Suite, load_suite
from analysis.evaluation.tasks import MAX_BLOCK_SIZE, check_counts, check_seed
from analysis.statistics.stopping import Looks
from models.errors import UserError
from models.threat_model import ThreatModel
from orchestration import console
from orchestration.evaluating.block_workers import Source, load_for_blocks, run_on_ray
from orchestration.evaluating.external_targets import check_outputs
from orchestration.home import Workplace
from orchestration.single_process import ADVICE, ENDING_S, only_process
from orchestration.trained_models.targets import Target
from trainers.data import DataConfig, evaluation_batches, load_data
from trainers.validation import limited

RECORDS_FILE = "records.jsonl"
POINTS_FOLDER = "points"
SMALL_WORK = 2e5
"""Forward passes of one image that one process makes in about the time that Ray takes to start."""


@dataclass(frozen=True)
class Until:
    """Images are added until the interval of T1 is narrow.

    Attributes:
        width: that is wanted, a share. looks: where it may be looked at. block_size: images of a block.
    """

    width: float
    looks: Looks
    block_size: int

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON types."""
        return {"width": self.width, "block_size": self.block_size, **vars(self.looks)}

    @classmethod
    def from_json(cls, kept: Mapping[str, Any]) -> Until:
        """Return what `to_json` wrote."""
        return cls(kept["width"], Looks(tuple(kept["images"]), kept["doublings"], kept["level"]), kept["block_size"])


@dataclass(frozen=True)
class EvaluationSettings:
    """What is asked of an evaluation.

    Attributes:
        suite: name, file, or the suite itself. threat_model: None: the one the model was trained for.
        num_samples, num_draws: None: the suite's.
        data: None: the data set the model was trained on. seed: root of all seeds.
        until: the rule that chose the numbers of samples and draws; None: they were asked for.

    Raises:
        UserError: a number that cannot be.
    """

    suite: str | Suite = "quick"
    threat_model: ThreatModel | None = None
    num_samples: int | None = None
    num_draws: int | None = None
    data: DataConfig | None = None
    seed: int = 0
    until: Until | None = None

    def __post_init__(self) -> None:
        check_seed(self.seed)
        check_counts(num_samples=self.num_samples, num_draws=self.num_draws)


def threat_model_of(target: Target | None, norm: str | None, epsilon: float | str | None, flag: str = "") -> ThreatModel | None:
    """Return the threat model that is asked for by norm or radius, the rest of it as the model was trained for; None: neither was named.

    Args:
        target: the model; None: it was not trained here. flag: how the names of both begin where the user types them.

    Raises:
        UserError: it is none.
    """
    if norm is None and epsilon is None:
        return None
    trained = target.experiment.threat_model if target is not None and target.experiment is not None else ThreatModel()
    asked = {"norm": trained.norm if norm is None else norm, "epsilon": trained.epsilon if epsilon is None else epsilon}
    try:
        return ThreatModel.model_validate(asked)
    except ValidationError as error:
        said = (
            f"{flag}{''.join(map(str, item['loc'])) or 'epsilon'}: {item['msg'].removeprefix('Value error, ')}" for item in error.errors()
        )
        raise UserError("; ".join(said)) from None


@dataclass(eq=False, kw_only=True)
class Job(Evaluation):
    """The evaluation of one model that was trained or exported here.

    Attributes:
        name: how tables name it. target: the model. settings: what was asked for, with the suite and the threat model themselves.
    """

    name: str
    target: Target
    settings: EvaluationSettings
    records_path: Path

    def kept_points(self) -> KeptPoints | None:
        """Return the perturbed images of the attacks as far as they were kept, by this evaluation or an earlier one."""
        folder = self.records_path.with_name(POINTS_FOLDER)
        return KeptPoints(self.points or PointStore(folder), self.plan) if self.points or folder.is_dir() else None

    def result(self) -> EvaluationResult:
        """Return what the finished blocks say."""
        until = self.settings.until
        return collect(self.done.values(), self.plan, None if until is None else until.looks)


def prepare(
    name: str,
    target: Target,
    settings: EvaluationSettings,
    workplace: Workplace,
    images: tuple[Tensor, Tensor] | None = None,
    *,
    points: PointPurpose | None = None,
) -> Job:
    """Plan the evaluation of a model on the test images of its data set, and read the records it already has. Nothing is written.

    Args:
        images: from `test_images`, where several jobs share them; None: read here.
        points: keep perturbed images beside the records, or score those that are there in the place of attacks.

    Raises:
        UserError: the data set is not known or missing, or the suite does not fit the model.
    """
    experiment = target.experiment
    data = data_of(target, settings)
    until = settings.until
    # Of a growing evaluation all images are read: blocks are named by their rows.
    x, y = images if images is not None else test_images(data, workplace.data_root, settings.num_samples if until is None else None)
    settings = replace(
        settings,
        suite=load_suite(settings.suite, target.defence),
        threat_model=settings.threat_model or (experiment.threat_model if experiment else ThreatModel()),
        data=data,
    )
    model = target.load()
    try:
        plan = plan_blocks(
            model,
            x,
            y,
            settings.suite,
            threat_model=settings.threat_model,
            seed=settings.seed,
            num_samples=settings.num_samples,
            num_draws=settings.num_draws,
            batch_size=until.block_size if until is not None else MAX_BLOCK_SIZE,
        )
    except UserError as error:  # analysis knows "the model", which a command line may name several of
        raise type(error)(f"{target.shown}: {error}") from None
    check_outputs(target, plan[0].num_classes, data)
    folder = target.records_folder(workplace.home, plan[0].checkpoint)
    store = None if points is None else PointStore(folder / POINTS_FOLDER, points)
    return Job(name=name, target=target, settings=settings, plan=plan, x=x, y=y, records_path=folder / RECORDS_FILE, points=store)


def data_of(target: Target, settings: EvaluationSettings) -> DataConfig:
    """Return whose test images a model is evaluated on.

    Raises:
        UserError: neither the model nor the settings say.
    """
    data = settings.data or target.data
    if data is None:
        raise UserError(f"{target.folder} does not say what data it was trained on; name the data set with --data, e.g. --data cifar10")
    return data


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
    on_done: Callable[[Job], None] | None = None,
    on_failure: Callable[[Job, Exception], None] | None = None,
    on_broken_block: OnBrokenBlock[Job] | None = None,
    wait: bool = True,
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
        on_broken_block: called in its place with the block that cannot be run; the others are run all the same.
        wait: for another process that evaluates one of the models, instead of refusing: records have one writer.

    Raises:
        UserError: another process evaluates one of the models, and `wait` is off.
    """
    with _held(jobs, wait=wait):
        queue_of = partial(BlockQueue, jobs, on_done=on_done, on_failure=on_failure, on_broken_block=on_broken_block)
        _run_alone(jobs, queue_of, workers, gpus_per_worker, address)


def run_beside(jobs: Sequence[Job], *, gpus_per_worker: float = 0, address: str | None = None) -> None:
    """Run all pending blocks of all jobs on what workers Ray has free, beside whatever else this process does, and show nothing.

    Args, raises: as `run_jobs`.
    """
    with _held(jobs, wait=True):
        queue = BlockQueue(jobs)
        if queue.waiting:
            run_on_ray(queue, _source, None, gpus_per_worker, address)


@contextlib.contextmanager
def _held(jobs: Sequence[Job], *, wait: bool) -> Iterator[None]:
    """Hold the records of the jobs for this process, and take over what is in them by now."""
    with contextlib.ExitStack() as held:
        # Always in the same order, so that two processes do not wait for each other.
        for folder in sorted({job.records_path.parent for job in jobs}):
            names = ", ".join(job.name for job in jobs if job.records_path.parent == folder)
            held.enter_context(
                only_process(folder / "lock", f"the evaluation of {names}", advice=ADVICE, patience_s=None if wait else ENDING_S)
            )
        for job in jobs:
            job.read_again()
        yield


def _run_alone(
    jobs: Sequence[Job],
    queue_of: Callable[[Callable[[Progress], None]], BlockQueue[Job]],
    workers: int | None,
    gpus_per_worker: float,
    address: str | None,
) -> None:
    with console.Board("evaluation", ["model", "blocks", "last block", "accuracy %"]) as board:
        queue = queue_of(_Table(jobs, board).show)
        if not queue.waiting:
            return
        if not address and (workers == 1 or (workers is None and not gpus_per_worker and queue.cost < SMALL_WORK)):
            _run_here(queue, gpus_per_worker)
        else:
            run_on_ray(queue, _source, workers, gpus_per_worker, address)


def _run_here(queue: BlockQueue[Job], gpus: float) -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1))
    loaded: tuple[Source, nn.Module] | None = None

    def load(job: Job) -> nn.Module:
        nonlocal loaded
        if loaded is None or loaded[0] != _source(job):
            loaded = (_source(job), load_for_blocks(_source(job), gpus))
        return loaded[1]

    run_in_order(queue, load)


def _source(job: Job) -> Source:
    return job.target.source


class _Table:
    """Progress as a table: one line per model."""

    def __init__(self, jobs: Sequence[Job], board: console.Board) -> None:
        self.jobs, self.board = jobs, board
        self.last: dict[int, Progress] = {}

    def show(self, progress: Progress) -> None:
        """Show a finished block, or at the beginning how many are done already."""
        if progress.evaluation is None:
            if progress.num_resumed:
                console.say(f"{progress.num_resumed} of {progress.num_total} blocks are done already")
            return
        self.last[id(progress.evaluation)] = progress
        caption = (
            f"{100 * progress.share:.0f} % of the work, {progress.passes_per_second or 0:.0f} images/s through the network "
            f"(a backward pass counts as two), {console.duration(progress.seconds_left or 0)} left"
        )
        rows: list[Sequence[Any]] = [self._row(job) for job in self.jobs]
        name = next(job.name for job in self.jobs if job is progress.evaluation)
        self.board.show(rows, caption, f"{name}: {progress.title}, accuracy {100 * (progress.accuracy or 0):.1f} %; {caption}")

    def _row(self, job: Job) -> list[str]:
        last = self.last.get(id(job))
        seen = ["", ""] if last is None else [last.title, f"{100 * (last.accuracy or 0):.1f}"]
        return [job.name, f"{len(job.done)}/{len(job.plan)}", *seen]
