"""What a data set is, for the record: name, sizes of its splits, and a digest of every pixel and label that a training may see."""

from __future__ import annotations

import hashlib

from pydantic import Field
from torch import Tensor

from models.configuration import Config
from trainers.data.split import ArraySplit, Splits, StreamedSplit


class DataDescription(Config):
    """A data set, split."""

    name: str = Field(description="Of the set.")
    digest: str = Field(
        pattern="^[0-9a-f]{16}$",
        description="Of the content of all splits; of sets that are streamed, of the names of their files and their labels.",
    )
    sizes: dict[str, int] = Field(description="Images of each split.")
    image_shape: tuple[int, int, int] = Field(description="(C, H, W).")
    num_classes: int = Field(description="K.")


def describe(name: str, splits: Splits) -> DataDescription:
    """Return the description of a data set that was loaded."""
    parts = {"train": splits.train, "validation": splits.validation, "test": splits.test}
    digest = hashlib.blake2b(digest_size=8)
    for part, split in parts.items():
        digest.update(part.encode() + _content_of(split))
    sizes = {part: len(split) for part, split in parts.items()}
    return DataDescription(
        name=name, digest=digest.hexdigest(), sizes=sizes, image_shape=splits.image_shape, num_classes=splits.num_classes
    )


def describe_images(name: str, split: str, x: Tensor, y: Tensor, num_classes: int) -> DataDescription:
    """Return the description of the images (N, C, H, W) in [0,1] and labels that something was measured on."""
    digest = hashlib.blake2b(_bytes_of(x) + _bytes_of(y), digest_size=8).hexdigest()
    channels, height, width = x.shape[1:]
    shape = (channels, height, width)
    return DataDescription(name=f"{name} {split}", digest=digest, sizes={split: len(y)}, image_shape=shape, num_classes=num_classes)


def _content_of(split: ArraySplit | StreamedSplit) -> bytes:
    if isinstance(split, ArraySplit):
        return _bytes_of(split.images_NCHW) + _bytes_of(split.labels)
    names = "\n".join(split.files.files)
    return hashlib.blake2b(names.encode(errors="surrogateescape")).digest() + _bytes_of(split.labels)


def _bytes_of(tensor: Tensor) -> bytes:
    return hashlib.blake2b(tensor.detach().to("cpu").contiguous().numpy().tobytes()).digest()
