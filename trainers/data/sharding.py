"""Which rows of an epoch belong to which rank."""

from __future__ import annotations

from dataclasses import dataclass

from models.errors import UserError


def check_batch_size(batch_size: int, num_images: int, num_workers: int, parts: int = 1) -> None:
    """Check that the workers share a batch evenly, in so many parts each, and that the data has one.

    Raises:
        UserError: it is not so.
    """
    if batch_size % num_workers:
        raise UserError(f"batch_size {batch_size} cannot be divided among {num_workers} workers")
    if batch_size % (num_workers * parts):
        raise UserError(f"batch_size {batch_size} cannot be divided into {parts} parts for each of {num_workers} workers")
    if num_images < batch_size:
        raise UserError(f"batch_size {batch_size} is larger than the training set ({num_images} images)")


def shard_range(num_examples: int, rank: int, world_size: int) -> range:
    """Return the rows of one rank when examples are cut into `world_size` contiguous, disjoint, complete shards.

    Sizes differ by at most one. Nothing is padded or repeated, so counts summed over the ranks are exact.
    """
    _check_rank(rank, world_size)
    return range(num_examples * rank // world_size, num_examples * (rank + 1) // world_size)


@dataclass(frozen=True)
class BatchPlan:
    """The batches of one rank in one epoch, as positions in the epoch's order.

    A global batch is `batch_size * world_size` consecutive positions; each rank takes a contiguous part of it. With
    `drop_last` the remainder of the epoch is left out; without, it is shared out as evenly as possible, or left out if
    it has fewer positions than there are ranks (no rank may run dry while others wait for its gradients).
    """

    num_examples: int
    batch_size: int
    rank: int = 0
    world_size: int = 1
    drop_last: bool = True

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"batch_size must be at least 1, not {self.batch_size}")
        _check_rank(self.rank, self.world_size)
        if len(self) == 0:
            per_rank = f" ({self.batch_size} on each of {self.world_size} workers)" if self.world_size > 1 else ""
            raise UserError(
                f"the training set has {self.num_examples} images, fewer than one batch of "
                f"{self.global_batch_size}{per_rank}; lower the batch size or raise data.limit_train"
            )

    @property
    def global_batch_size(self) -> int:
        """Images of all ranks in one step."""
        return self.batch_size * self.world_size

    def __len__(self) -> int:
        full, rest = divmod(self.num_examples, self.global_batch_size)
        return full + (not self.drop_last and rest >= self.world_size)

    def positions(self, batch: int) -> slice:
        """Return this rank's positions in global batch number `batch`."""
        start = batch * self.global_batch_size
        size = min(self.global_batch_size, self.num_examples - start)
        part = shard_range(size, self.rank, self.world_size)
        return slice(start + part.start, start + part.stop)


def _check_rank(rank: int, world_size: int) -> None:
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in 0..{world_size - 1} for world_size {world_size}, not {rank}")
