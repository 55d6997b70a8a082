"""What an evaluation would do and cost: blocks, passes, time on this machine, and the disk space of kept points. Nothing is written."""

from __future__ import annotations

import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from analysis.attacked_model.plain_model import images_like, plain_model
from analysis.evaluate import BlockTask
from analysis.evaluation.cost import estimated_cost
from analysis.evaluation.points import point_bytes
from models.modes import mode
from orchestration import console
from orchestration.evaluating.block_workers import load_for_blocks
from orchestration.evaluating.evaluation_run import SMALL_WORK, Job

_TIMED_IMAGES, _TIMED_PASSES = 64, 5
_KNOWN_SECONDS = 1.0  # blocks that took less than this in all say little about the speed


@dataclass(frozen=True)
class EvaluationCost:
    """What an evaluation would need.

    Attributes:
        name: of the model. suite: of the evaluation. num_samples: images.
        num_blocks, num_done: blocks, and those whose record is there.
        passes: forward passes of one image that are left; a backward pass counts as two.
        seconds: estimate of the time on this machine. processes: that share the work.
        points_bytes: size of the perturbed images of the whole evaluation; None: they are not kept. points_folder: where.
    """

    name: str
    suite: str
    num_samples: int
    num_blocks: int
    num_done: int
    passes: float
    seconds: float
    processes: int
    points_bytes: int | None
    points_folder: Path | None

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON types."""
        return vars(self) | {"points_folder": None if self.points_folder is None else str(self.points_folder)}

    def rows(self) -> list[tuple[str, str]]:
        """Return what a person reads, as pairs of a word and a value."""
        rows = [
            ("model", self.name),
            ("suite", self.suite),
            ("images", str(self.num_samples)),
            ("blocks", f"{self.num_blocks}, of which {self.num_done} are done already"),
            ("work left", f"{self.passes:,.0f} forward passes of one image (a backward pass counts as two)"),
            ("time left", f"about {console.duration(self.seconds)}, {self.processes} process{'es' * (self.processes > 1)}"),
        ]
        if self.points_bytes is not None:
            rows.append(("perturbed images", f"{megabytes(self.points_bytes)} in {self.points_folder}"))
        else:
            rows.append(("perturbed images", "not kept (`--keep-points` keeps them)"))
        return rows


def megabytes(size: int) -> str:
    """Return a size on disk, e.g. `12.3 MB`."""
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"


def cost_of(job: Job, workers: int | None, gpus: float = 0) -> EvaluationCost:
    """Return what is left of a job and what it would need, without running a block of it.

    Args:
        workers, gpus: as for `run_jobs`.
    """
    passes = sum(task.cost for task in job.pending)
    keeps = job.points is not None and job.points.purpose == "keep"
    return EvaluationCost(
        name=job.name,
        suite=job.plan[0].suite,
        num_samples=sum(len(task.ids) for task in job.plan if task.kind == "clean" and task.protocol == "T1"),
        num_blocks=len(job.plan),
        num_done=len(job.plan) - len(job.pending),
        passes=passes,
        seconds=passes * seconds_per_pass(job, gpus) / processes_for(passes, workers, gpus),
        processes=processes_for(passes, workers, gpus),
        points_bytes=point_bytes(job.plan, job.x[0]) if keeps else None,
        points_folder=job.points.folder if keeps and job.points is not None else None,
    )


def processes_for(passes: float, workers: int | None, gpus: float = 0) -> int:
    """Return how many processes `run_jobs` uses for so much work on a machine of its own."""
    if workers is not None:
        return max(workers, 1)
    if gpus:
        return max(int(torch.accelerator.device_count() / gpus), 1)
    return 1 if passes < SMALL_WORK else os.cpu_count() or 1


def seconds_per_pass(job: Job, gpus: float = 0) -> float:
    """Return the time of one forward pass of one image in one process: from blocks that are done, else from a few passes."""
    known: list[tuple[float, BlockTask]] = [
        (job.done[key]["measured"]["seconds"], task) for task, key in zip(job.plan, job.keys, strict=True) if key in job.done
    ]
    attacks = [(seconds, estimated_cost(task)) for seconds, task in known if task.kind == "attack"]
    if sum(seconds for seconds, _ in attacks) >= _KNOWN_SECONDS:
        return sum(seconds for seconds, _ in attacks) / sum(cost for _, cost in attacks)
    loaded = load_for_blocks(job.target.source, gpus)
    x = job.x[:_TIMED_IMAGES].to(images_like(loaded, job.x))
    model = plain_model(loaded, x[:1])
    x.requires_grad_()
    taken = []
    with mode(model, "eval"):
        for _ in range(_TIMED_PASSES):
            started = time.perf_counter()
            torch.autograd.grad(model(x).sum(), x, allow_unused=True)
            taken.append(time.perf_counter() - started)
    return statistics.median(taken) / (3 * len(x))
