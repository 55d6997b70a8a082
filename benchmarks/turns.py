"""Trainings in processes of their own that take turns epoch by epoch, so that what is compared runs seconds apart on the same machine.

A training stops after each epoch until it is released. It waits in a blocking read, which costs no CPU time. Ratios of neighbouring epochs
are then ratios under the same load, and their median over many pairs says more than two long runs one after the other.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from orchestration.experiment import ExperimentConfig


@dataclass(frozen=True)
class Epoch:
    """What one epoch took: wall seconds, and the CPU seconds of its busiest process."""

    wall: float
    cpu: float


class Turns:
    """A training, with one worker or several under gloo, whose epochs are released one by one.

    Args:
        experiment: what to train. folder: its run folder. workers: processes; they share the global batch.
    """

    def __init__(self, experiment: ExperimentConfig, folder: Path, workers: int = 1) -> None:
        context = multiprocessing.get_context("spawn")
        folder.mkdir(parents=True, exist_ok=True)
        self._links: list[Connection] = []
        self._processes = []
        for rank in range(workers):
            here, there = context.Pipe()
            process = context.Process(
                target=_train, args=(experiment.model_dump(mode="json"), str(folder), rank, workers, there), daemon=True
            )
            process.start()
            there.close()
            self._links.append(here)
            self._processes.append(process)
        for link in self._links:
            link.recv()  # ready: imported, and at the gate before the first epoch

    def run_epoch(self) -> Epoch:
        """Release one epoch and wait for its end.

        Raises:
            EOFError: the training is over or broke.
        """
        began = time.perf_counter()
        for link in self._links:
            link.send(None)
        cpu = [link.recv() for link in self._links]
        return Epoch(time.perf_counter() - began, max(cpu))

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.terminate()
            process.join()


def _train(experiment: dict[str, Any], folder: str, rank: int, workers: int, link: Connection) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch
    import torch.distributed as dist

    from orchestration.home import Home, Workplace
    from orchestration.training.job import TrainingJob
    from orchestration.training.training_run import train_here

    if workers > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/gloo", rank=rank, world_size=workers)
    torch.set_num_threads(1)
    begun = [0.0]

    def wait() -> None:
        link.recv()
        begun[0] = time.process_time()

    def after_epoch(report: object) -> None:
        link.send(time.process_time() - begun[0])
        wait()

    link.send("ready")
    wait()
    job = TrainingJob.at(Workplace(Home(Path(folder))), ExperimentConfig(**experiment))
    train_here(job.with_own_cores(), on_epoch=after_epoch)


@dataclass(frozen=True)
class Ratios:
    """Ratios of neighbouring epochs: their median, and an interval that holds the true median with at least 95 %.

    The interval is that of order statistics: it assumes nothing about the noise but that the pairs are independent.
    """

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def interval(self) -> tuple[float, float]:
        """Ends of the interval; the whole range where there are fewer than six pairs."""
        ordered, count = sorted(self.values), len(self.values)
        below = 0
        while binomial_tail(count, below) <= 0.025:  # one more may be left out on each side
            below += 1
        first = max(below - 1, 0)
        return ordered[first], ordered[-1 - first]

    def verdict(self, *, at_most: float | None = None, at_least: float | None = None) -> str:
        """Return `met`, `missed` or `undecided`: the bar lies inside the interval."""
        low, high = self.interval
        if at_most is not None:
            return "met" if high <= at_most else "missed" if low > at_most else "undecided"
        assert at_least is not None
        return "met" if low >= at_least else "missed" if high < at_least else "undecided"

    def shown(self) -> str:
        """Return the median and the interval."""
        low, high = self.interval
        return f"{self.median:.3f} [{low:.3f}, {high:.3f}] over {len(self.values)} pairs"


def binomial_tail(count: int, most: int) -> float:
    """Return the probability of at most `most` heads in `count` throws of a fair coin."""
    ways, total = 1, 0
    for successes in range(most + 1):
        total += ways
        ways = ways * (count - successes) // (successes + 1)
    return total / 2**count
