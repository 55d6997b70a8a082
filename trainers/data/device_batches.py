"""Batches of a split that lives on the device: no worker processes, no copies from the host, no loop over images."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from trainers.data.augmentation import Augmentation, AugmentationDraw, unit_interval
from trainers.data.mixing import mix
from trainers.data.sharding import BatchPlan, shard_range
from trainers.data.split import ArraySplit, Batch


class DeviceBatches:
    """Training batches of an `ArraySplit`; each iteration is one epoch in a new order with new augmentation.

    `batch_size` is per rank. Both generators must be seeded alike on every rank: the order and the augmentation of the
    whole epoch are drawn when it starts, and each rank uses its own positions. So the ranks' k-th batches together are
    the k-th batch of one process with the global batch size, augmentation included. An epoch moves each generator by an
    amount that depends on neither ranks nor batch size nor on whether it is iterated to its end; a caller resumes at an
    epoch by restoring both.

    Attributes:
        shown: rows and draw of the batch that was given last, where images are not mixed.

    Raises UserError if the split has fewer images than one global batch.
    """

    def __init__(
        self,
        split: ArraySplit,
        batch_size: int,
        augmentation: Augmentation,
        order_generator: torch.Generator,
        augmentation_generator: torch.Generator,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = True,
    ) -> None:
        self.split = split
        self.augmentation = augmentation
        self.order_generator = order_generator
        self.augmentation_generator = augmentation_generator
        self.plan = BatchPlan(split.epoch_length, batch_size, rank, world_size, drop_last)
        self.shown: tuple[Tensor, AugmentationDraw] | None = None

    def __len__(self) -> int:
        return len(self.plan)

    def __iter__(self) -> Iterator[Batch]:
        split, device = self.split, self.split.device
        height, width = split.image_shape[1:]
        order_N = split.epoch_order(self.order_generator)
        draw = self.augmentation.draw(len(order_N), height, width, self.augmentation_generator)
        # A separate generator function, so that the draws above happen at once and not at the first batch.
        return self._batches(order_N.to(device), draw.to(device))

    def _batches(self, order_N: Tensor, draw: AugmentationDraw) -> Iterator[Batch]:
        for batch in range(len(self.plan)):
            positions = self.plan.positions(batch)
            if draw.mixing is not None:
                yield self._mixed(batch, positions, order_N, draw)
                continue
            rows_B = order_N[positions]
            x_BCHW = self.augmentation.apply(self.split.images_NCHW[rows_B], draw[positions])
            self.shown = rows_B, draw[positions]
            yield x_BCHW, self.split.labels[rows_B]

    def _mixed(self, batch: int, positions: slice, order_N: Tensor, draw: AugmentationDraw) -> Batch:
        """Return this rank's part of a batch in which each image is mixed with the next one of all ranks', the last with the first."""
        start = batch * self.plan.global_batch_size
        end = min(start + self.plan.global_batch_size, len(order_N))
        following = positions.stop if positions.stop < end else start
        device = order_N.device
        needed = torch.cat([torch.arange(positions.start, positions.stop, device=device), torch.tensor([following], device=device)])
        rows = order_N[needed]
        x_BCHW, labels_B = self.augmentation.apply(self.split.images_NCHW[rows], draw[needed]), self.split.labels[rows]
        assert draw.mixing is not None
        return mix(
            self.augmentation.mixing, x_BCHW[:-1], x_BCHW[1:], labels_B[:-1], labels_B[1:], draw.mixing[positions], self.split.num_classes
        )


class DeviceEvaluationBatches:
    """Every image of one rank's shard of an `ArraySplit` once, in order, as it is."""

    def __init__(self, split: ArraySplit, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        self.split = split
        self.batch_size = batch_size
        self.shard = shard_range(len(split), rank, world_size)

    def __len__(self) -> int:
        return -(-len(self.shard) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for start in range(self.shard.start, self.shard.stop, self.batch_size):
            rows = slice(start, min(start + self.batch_size, self.shard.stop))
            yield unit_interval(self.split.images_NCHW[rows]), self.split.labels[rows]
