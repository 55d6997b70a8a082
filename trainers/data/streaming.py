"""Batches of sets too large for memory: worker processes decode, crop and resize image files while training goes on.

Legend: B batch, C channels, H, W, N images. Workers send uint8; the device makes floats of them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from models.errors import UserError
from trainers.data.augmentation import STREAMED_AUGMENTATIONS, Augmentation, unit_interval
from trainers.data.decoding import available_cpus, open_rgb
from trainers.data.image_tree import ImageFiles
from trainers.data.sharding import BatchPlan, shard_range
from trainers.data.split import Batch, StreamedSplit

STREAMED_SIDE = 224
"""Side of a streamed image unless the config says otherwise."""
EVALUATION_RESIZE = 256 / 224
"""The shorter side is resized to this times the image size before its centre is cut out."""
MAX_DEFAULT_WORKERS = 8
LARGEST_SEED = 2**63 - 1


class StreamedBatches:
    """Training batches of a `StreamedSplit`; the same interface and promises as `DeviceBatches`.

    Each epoch draws one seed per position, and an image's crop and flip depend on that seed alone: neither the number
    of ranks nor of worker processes nor their timing changes a pixel.
    """

    def __init__(
        self,
        split: StreamedSplit,
        batch_size: int,
        augmentation: Augmentation,
        order_generator: torch.Generator,
        augmentation_generator: torch.Generator,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = True,
    ) -> None:
        if augmentation.name not in STREAMED_AUGMENTATIONS:
            raise UserError(
                f"augmentation {augmentation.name!r} is not available for streamed images; allowed: {', '.join(STREAMED_AUGMENTATIONS)}"
            )
        self.split = split
        self.order_generator = order_generator
        self.augmentation_generator = augmentation_generator
        self.plan = BatchPlan(len(split), batch_size, rank, world_size, drop_last)
        self._epoch = _EpochSampler()
        self._loader = _loader(split, augmentation, self._epoch)

    def __len__(self) -> int:
        return len(self.plan)

    def __iter__(self) -> Iterator[Batch]:
        order_N = _permutation(len(self.split), self.order_generator)
        seeds_N = torch.randint(
            LARGEST_SEED,
            (len(self.split),),
            generator=self.augmentation_generator,
            device=self.augmentation_generator.device,
        ).cpu()
        slices = [self.plan.positions(batch) for batch in range(len(self.plan))]
        self._epoch.batches = [list(zip(order_N[part].tolist(), seeds_N[part].tolist(), strict=True)) for part in slices]
        return _on_device(iter(self._loader), self.split.device)


class StreamedEvaluationBatches:
    """Every image of one rank's shard of a `StreamedSplit` once, in order: resized, centre cut out, nothing random."""

    def __init__(self, split: StreamedSplit, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        self.split = split
        shard = shard_range(len(split), rank, world_size)
        starts = range(shard.start, shard.stop, batch_size)
        self._epoch = _EpochSampler()
        self._epoch.batches = [[(row, 0) for row in range(start, min(start + batch_size, shard.stop))] for start in starts]
        self._loader = _loader(split, Augmentation("none"), self._epoch)

    def __len__(self) -> int:
        return len(self._epoch)

    def __iter__(self) -> Iterator[Batch]:
        return _on_device(iter(self._loader), self.split.device)


class _EpochSampler:
    """The batches of the epoch that is about to start, as lists of (row, seed)."""

    def __init__(self) -> None:
        self.batches: list[list[tuple[int, int]]] = []

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return iter(self.batches)


class _DecodedFiles(Dataset):
    """Maps (row, seed) to a uint8 image CHW and its label, or to the error that the file caused."""

    def __init__(self, files: ImageFiles, image_size: int, augmentation: Augmentation) -> None:
        self.folder = files.folder
        # One array instead of a million strings: reading those would copy their pages into every worker process.
        self.names = np.array([os.fsencode(name) for name in files.files])
        self.labels = files.labels
        self.image_size = image_size
        self.augmentation = augmentation

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, row_and_seed: tuple[int, int]) -> tuple[Tensor, int] | UserError:
        row, seed = row_and_seed
        try:
            image = open_rgb(self.folder / os.fsdecode(self.names[row]))
        except UserError as error:
            return error  # Raised in the main process: from a worker it would arrive wrapped in a traceback.
        if self.augmentation.name == "none":
            image = centre_cut(image, self.image_size)
        else:
            image = self._random_resized_crop(image, seed)
        pixels_HWC = torch.from_numpy(np.array(image))
        return pixels_HWC.permute(2, 0, 1).contiguous(), int(self.labels[row])

    def _random_resized_crop(self, image: Image.Image, seed: int) -> Image.Image:
        width, height = image.size
        draw = self.augmentation.draw(1, height, width, torch.Generator().manual_seed(seed))
        top, left, box_height, box_width = draw.boxes[0].tolist()
        box = image.crop((left, top, left + box_width, top + box_height))
        box = box.resize((self.image_size, self.image_size), Image.Resampling.BILINEAR)
        return box.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if bool(draw.flips[0]) else box


def centre_cut(image: Image.Image, image_size: int) -> Image.Image:
    """Resize the shorter side to 256/224 of `image_size` (bilinear, antialiased) and cut out the central square."""
    shorter = round(image_size * EVALUATION_RESIZE)
    width, height = (int(shorter * side / min(image.size)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - image_size) / 2), round((height - image_size) / 2)
    return image.crop((left, top, left + image_size, top + image_size))


def _permutation(num_examples: int, generator: torch.Generator) -> Tensor:
    return torch.randperm(num_examples, generator=generator, device=generator.device).cpu()


def _collate(examples: list[tuple[Tensor, int] | UserError]) -> tuple[Tensor, Tensor] | UserError:
    for example in examples:
        if isinstance(example, UserError):
            return example
    images, labels = zip(*examples, strict=True)
    return torch.stack(images), torch.tensor(labels)


def _loader(split: StreamedSplit, augmentation: Augmentation, sampler: _EpochSampler) -> DataLoader:
    num_workers = min(MAX_DEFAULT_WORKERS, available_cpus()) if split.num_workers is None else split.num_workers
    return DataLoader(
        _DecodedFiles(split.files, split.image_size, augmentation),
        batch_sampler=sampler,
        num_workers=num_workers,
        collate_fn=_collate,
        pin_memory=split.device.type in ("cuda", "xpu"),
        persistent_workers=num_workers > 0,
        generator=torch.Generator().manual_seed(0),  # Without one the loader would move the global generator.
    )


def _on_device(batches: Iterator[tuple[Tensor, Tensor] | UserError], device: torch.device) -> Iterator[Batch]:
    for batch in batches:
        if isinstance(batch, UserError):
            raise batch
        images_BCHW, labels_B = batch
        yield (
            unit_interval(images_BCHW.to(device, non_blocking=True)),
            labels_B.to(device, non_blocking=True),
        )
