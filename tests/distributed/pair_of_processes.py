"""Two gloo processes that run the jobs of a test file. Starting a process costs seconds, so all jobs of a file share one pair."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing


def results_of(jobs_of: str, folder: Path) -> Callable[[str], list[Any]]:
    """Run every function in `JOBS` of the module `jobs_of` on both ranks; returned: what a job gave on each rank."""
    multiprocessing.spawn(_enter, (jobs_of, str(folder)), nprocs=2, join=True)
    results = [torch.load(folder / f"result-{rank}.pt", weights_only=False) for rank in range(2)]
    return lambda name: [result[name] for result in results]


def _enter(rank: int, jobs_of: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        jobs = importlib.import_module(jobs_of).JOBS
        torch.save({name: function(rank) for name, function in jobs.items()}, Path(folder) / f"result-{rank}.pt")
    finally:
        dist.destroy_process_group()
