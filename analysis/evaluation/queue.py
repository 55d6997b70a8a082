"""Blocks that wait to be run, of one evaluation or of several: each is run once, and its record handed to all that want it.

Whoever runs blocks (a plain loop, Ray's workers) takes them from the queue and gives their records back; the queue keeps the records, knows
how far everything is, and tells.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

from torch import Tensor

from analysis.evaluation.block_task import BlockTask
from analysis.evaluation.points import PointStore
from analysis.evaluation.records import Record, append_record, read_records
from models.errors import UserError

_logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Evaluation:
    """The evaluation of one model as work.

    Attributes:
        plan: its blocks. x, y: the images and labels of the plan. records_path: file of its records; None: they are kept nowhere else.
        points: where perturbed images are kept or taken from; None: neither.
        again: keys of blocks that are measured although their records are there.
        keys: of the plan's blocks. done: records by key, those of the file to begin with. unkept: keys of blocks that have a record and
            lack the points that are to be kept: they are attacked again.
    """

    plan: list[BlockTask]
    x: Tensor
    y: Tensor
    records_path: Path | None = None
    points: PointStore | None = None
    again: frozenset[str] = frozenset()
    keys: list[str] = field(init=False)
    done: dict[str, Record] = field(init=False)
    unkept: set[str] = field(init=False)

    def __post_init__(self) -> None:
        known = read_records(self.records_path) if self.records_path is not None else {}
        self.keys = [task.key for task in self.plan]
        self.done = {key: known[key] for key in self.keys if key in known and key not in self.again}
        taken_over = 0
        for task, key in zip(self.plan, self.keys, strict=True):
            if key not in self.done and task.succeeds in known:
                self.done[key] = _renewed(known[task.succeeds], task)
                taken_over += 1
                if self.records_path is not None:
                    append_record(self.records_path, self.done[key])
        if taken_over:
            _logger.warning(
                "%d blocks were measured by an earlier version, for a model of the same record and weights: taken over", taken_over
            )
        self.unkept = self._without_points()

    @property
    def pending(self) -> list[BlockTask]:
        """Blocks that have no record yet, or lack points that are to be kept."""
        return [task for task, key in zip(self.plan, self.keys, strict=True) if key not in self.done or key in self.unkept]

    def read_again(self) -> None:
        """Take over what another process has found since the evaluation was planned."""
        if self.records_path is None:
            return
        known = read_records(self.records_path)
        self.done.update({key: known[key] for key in self.keys if key in known and key not in self.again})
        self.unkept = self._without_points()

    def take(self, record: Record) -> None:
        """Take over the record of a block that was just run."""
        self.done[record["key"]] = record
        self.unkept.discard(record["key"])

    def _without_points(self) -> set[str]:
        store = self.points
        if store is None or store.purpose != "keep":
            return set()
        blocks = zip(self.plan, self.keys, strict=True)
        return {key for task, key in blocks if key in self.done and task.has_points and not store.holds(task)}


def _renewed(record: Record, task: BlockTask) -> Record:
    """Return the record of an earlier version under the key of the task."""
    return {**record, "key": task.key, "header": {**record["header"], "model": task.model}}


@dataclass(frozen=True)
class Progress:
    """How far the evaluations of a queue are.

    Attributes:
        num_done, num_total: blocks. num_resumed: of those done, blocks that were in the records already.
        share: share of the estimated work that is done, in [0,1].
        seconds_left: estimate from the speed of this run; None before its first block. passes_per_second: forward passes of one image, a
            backward pass counts as two; None likewise.
        title: the block that was just finished. accuracy: mean correctness of that block over its draws. evaluation: whose block it is.
    """

    num_done: int
    num_total: int
    num_resumed: int
    share: float
    seconds_left: float | None = None
    passes_per_second: float | None = None
    title: str = ""
    accuracy: float | None = None
    evaluation: Evaluation | None = None


E = TypeVar("E", bound=Evaluation)

OnBrokenBlock = Callable[[E, BlockTask, Exception], None]
"""Told of a block that cannot be run: whose it is, which, and why."""


class BlockQueue(Generic[E]):
    """Blocks that wait, in the order of the plans.

    Args:
        evaluations: what is to be run. A block of several of them, with records in one file, is run once.
        report: called at the beginning, and for each evaluation that a finished block belongs to.
        on_done: called when an evaluation's last block is done.
        on_failure: called when a block of an evaluation cannot be run; its other blocks are left out then. None: the error is raised.
        on_broken_block: called in its place with the block that cannot be run; the others are run all the same. An error of the disk, or
            in what was asked for, is raised nevertheless: it would befall every block.
    """

    def __init__(
        self,
        evaluations: Sequence[E],
        report: Callable[[Progress], None] | None = None,
        on_done: Callable[[E], None] | None = None,
        on_failure: Callable[[E, Exception], None] | None = None,
        on_broken_block: OnBrokenBlock[E] | None = None,
    ) -> None:
        self._meter = _WorkMeter(evaluations, report)
        self._on_done, self._on_failure, self._on_broken_block = on_done, on_failure, on_broken_block
        self._owners: dict[tuple[Path | None, str], list[E]] = {}
        self._failed: list[E] = []
        self.waiting: list[tuple[E, BlockTask]] = []
        for evaluation in evaluations:
            for task in evaluation.pending:
                owners = self._owners.setdefault((evaluation.records_path, task.key), [])
                if not owners:
                    self.waiting.append((evaluation, task))
                owners.append(evaluation)

    @property
    def cost(self) -> float:
        """Work that waits, in forward passes of one image."""
        return sum(task.cost for _, task in self.waiting)

    def long_ones_first(self) -> None:
        """Sort the blocks: the last of several workers to finish is then the least late."""
        self.waiting.sort(key=lambda entry: -entry[1].cost)

    def take(self) -> tuple[E, BlockTask] | None:
        """Return the next block that some evaluation still wants, with one that does; None if none is left."""
        while self.waiting:
            evaluation, task = self.waiting.pop(0)
            wanting = [each for each in self._owners[evaluation.records_path, task.key] if each not in self._failed]
            if wanting:
                return wanting[0], task
        return None

    def finished(self, evaluation: E, task: BlockTask, record: Record) -> None:
        """Keep the record of a block that was taken."""
        if evaluation.records_path is not None:
            append_record(evaluation.records_path, record)
        for owner in self._owners[evaluation.records_path, record["key"]]:
            owner.take(record)
            self._meter.finished(owner, task, record)
            if self._on_done is not None and not owner.pending:
                self._on_done(owner)

    def broke(self, evaluation: E, task: BlockTask, error: Exception) -> None:
        """Give up a block which cannot be run, or all evaluations that want it.

        Raises:
            Exception: the error, where nobody asked to be told of failures.
        """
        if self._on_broken_block is not None and not isinstance(error, UserError | OSError):
            for owner in self._owners[evaluation.records_path, task.key]:
                self._on_broken_block(owner, task, error)
            return
        if self._on_failure is None:
            raise error
        for owner in self._owners[evaluation.records_path, task.key]:
            if owner not in self._failed:
                self._failed.append(owner)
                self._on_failure(owner, error)


class _WorkMeter:
    """Counts finished work and estimates what is left."""

    def __init__(self, evaluations: Sequence[Evaluation], report: Callable[[Progress], None] | None) -> None:
        self.report = report
        blocks = [(evaluation, task, key) for evaluation in evaluations for task, key in zip(evaluation.plan, evaluation.keys, strict=True)]
        resumed = [task for evaluation, task, key in blocks if key in evaluation.done and key not in evaluation.unkept]
        self.num_total = len(blocks)
        self.num_done = self.num_resumed = len(resumed)
        self.total_cost = sum(task.cost for _, task, _ in blocks) or 1.0
        self.done_cost = self.resumed_cost = sum(task.cost for task in resumed)
        self.started = time.monotonic()
        if report is not None:
            report(Progress(self.num_done, self.num_total, self.num_resumed, self.done_cost / self.total_cost))

    def finished(self, evaluation: Evaluation, task: BlockTask, record: Record) -> None:
        """Count a block and report."""
        self.num_done += 1
        self.done_cost += task.cost
        if self.report is None:
            return
        counts = record["samples"]["num_correct"]["evaluation"]
        seconds, work = time.monotonic() - self.started, self.done_cost - self.resumed_cost
        self.report(
            Progress(
                self.num_done,
                self.num_total,
                self.num_resumed,
                share=self.done_cost / self.total_cost,
                seconds_left=seconds / work * (self.total_cost - self.done_cost) if work > 0 else None,
                passes_per_second=work / seconds if seconds > 0 else None,
                title=task.title,
                accuracy=sum(counts) / len(counts) / record["block"]["num_draws"]["evaluation"],
                evaluation=evaluation,
            )
        )
