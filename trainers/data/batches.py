"""Batches of a split, whichever kind of split it is."""

from __future__ import annotations

import torch

from models.errors import UserError
from trainers.data.augmentation import Augmentation
from trainers.data.device_batches import DeviceBatches, DeviceEvaluationBatches
from trainers.data.split import ArraySplit, StreamedSplit
from trainers.data.streaming import StreamedBatches, StreamedEvaluationBatches


def training_batches(
    split: ArraySplit | StreamedSplit,
    batch_size: int,
    augmentation: Augmentation,
    order_generator: torch.Generator,
    augmentation_generator: torch.Generator,
    rank: int = 0,
    world_size: int = 1,
    drop_last: bool = True,
) -> DeviceBatches | StreamedBatches:
    """Return training batches (x_BCHW float32 in [0, 1], y_B int64), `batch_size` images a rank; iterating is an epoch.

    The generators must be seeded alike on every rank; see `DeviceBatches`. Raises UserError if there is not one full
    global batch.
    """
    settings = (batch_size, augmentation, order_generator, augmentation_generator, rank, world_size, drop_last)
    return DeviceBatches(split, *settings) if isinstance(split, ArraySplit) else StreamedBatches(split, *settings)


def evaluation_batches(
    split: ArraySplit | StreamedSplit, batch_size: int, rank: int = 0, world_size: int = 1
) -> DeviceEvaluationBatches | StreamedEvaluationBatches:
    """Return batches (x_BCHW float32 in [0, 1], y_B int64) of a split in its order, unaugmented, the last maybe small.

    With several ranks each gets the contiguous rows `shard_range(len(split), rank, world_size)`: disjoint, complete,
    unpadded.
    """
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1, not {batch_size}")
    if isinstance(split, ArraySplit):
        return DeviceEvaluationBatches(split, batch_size, rank, world_size)
    return StreamedEvaluationBatches(split, batch_size, rank, world_size)
