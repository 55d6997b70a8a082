"""Members of an ensemble spread over two processes: gradients, logged values and running statistics are those of one process."""

from __future__ import annotations

import socket
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.numerics.ensemble_cases import batch, context, gradients, largest_difference, objective, tiny_ensemble
from trainers.distributed import average_gradients

CASES = {"three members": (3, False), "fewer members than workers": (1, False), "batch normalization": (3, True)}


def train(num_members: int, normalized: bool, rows: slice) -> tuple[list[torch.Tensor], dict[str, torch.Tensor], list[torch.Tensor]]:
    ensemble = tiny_ensemble(num_members, normalized=normalized)
    x, y = batch(8)
    method = objective("red", members="spread", example="mean_loss", warmup_epochs=0)
    scalars = method.training_step(ensemble, x[rows], y[rows], context(ensemble, attack={"random_start": False}))
    average_gradients(ensemble.parameters())
    return gradients(ensemble), scalars, [*ensemble.buffers(), torch.zeros(1)]


def worker(rank: int, port: int, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    for name, case in CASES.items():
        slopes, scalars, buffers = train(*case, rows=slice(4 * rank, 4 * rank + 4))
        total = torch.stack([scalars[key] for key in sorted(scalars)])
        dist.all_reduce(total)
        results[rank, name] = (slopes, dict(zip(sorted(scalars), (total / 2).tolist(), strict=True)), buffers)
    dist.destroy_process_group()


@pytest.mark.distributed
def test_two_processes_give_the_gradients_of_one():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with mp.Manager() as manager:
        shared = manager.dict()
        mp.spawn(worker, args=(port, shared), nprocs=2)
        results = dict(shared)
    for name, case in CASES.items():
        slopes, scalars, buffers = train(*case, rows=slice(None))
        for rank in range(2):
            # Batch statistics too are those of the whole batch, because a member is whole on its worker.
            assert largest_difference(results[rank, name][0], slopes) < 1e-12
            assert results[rank, name][1] == pytest.approx({key: value.item() for key, value in scalars.items()}, abs=1e-12)
            assert largest_difference(results[rank, name][2], buffers) < 1e-12
