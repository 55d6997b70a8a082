"""The workers of one Ray Train group. A group whose size changes may have a size that does not divide the batch: then some stand by.

Whatever is collective in Ray Train needs every worker of the group. So those that stand by are told what comes, and do the same.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import ray.train
import torch.distributed as dist
from ray.train.collective import broadcast_from_rank_zero

from orchestration.training.preemption import group_preemption
from orchestration.training.resources import workers_that_share
from trainers.config import TrainingConfig

_REPORT, _ASK, _AGREE, _END = "report", "ask", "agree", "end"
T = TypeVar("T")


class WorkerGroup:
    """This worker's view of its group.

    Args:
        training: whose batches the workers share.

    Attributes:
        rank: of this worker. stands_by: whether it takes no part in the training.
    """

    def __init__(self, training: TrainingConfig) -> None:
        context = ray.train.get_context()
        self.rank, self._size = context.get_world_rank(), context.get_world_size()
        self._sharing = workers_that_share(self._size, training)
        self.stands_by = self.rank >= self._sharing

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Within, PyTorch's process group is that of the workers that share the batch."""
        if self._sharing < self._size:
            self._leave_out_the_others()
        yield
        self._tell(_END)

    def stand_by(self) -> None:
        """Take part in what is collective until the training ends."""
        self._leave_out_the_others()
        while (word := broadcast_from_rank_zero(None)) != _END:
            if word == _REPORT:
                ray.train.report({})
            elif word == _ASK:
                group_preemption()
            else:
                broadcast_from_rank_zero(None)

    def report(self, result: dict[str, Any]) -> None:
        """Report, as every worker that trains does at the same time."""
        self._tell(_REPORT)
        ray.train.report(result)

    def preemption(self) -> Any:
        """Return Ray's notice that a node goes, None if there is none; every worker that trains asks at the same time."""
        return self._together(_ASK, group_preemption)

    def agree(self, value: int) -> int:
        """Return rank 0's value on all workers that train."""
        return self._together(_AGREE, lambda: broadcast_from_rank_zero(value))

    def _together(self, word: str, do: Callable[[], T]) -> T:
        self._tell(word)
        return do()

    def _tell(self, word: str) -> None:
        if self._sharing < self._size:
            broadcast_from_rank_zero(word)

    def _leave_out_the_others(self) -> None:
        backend = dist.get_backend()
        dist.destroy_process_group()
        address = broadcast_from_rank_zero(_free_address() if self.rank == 0 else None)
        if not self.stands_by:
            dist.init_process_group(backend, init_method=f"tcp://{address}", rank=self.rank, world_size=self._sharing)


def _free_address() -> str:
    """Return HOST:PORT of this node that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return f"{ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"
