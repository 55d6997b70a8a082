"""Images that another library hands over encoded, each with its label: decoded as image files are, and their labels numbered.

Legend: N images, C channels, H, W.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from PIL import Image
from torch import Tensor

from models.errors import UserError
from models.file_content import expanded
from trainers.data.array_files import RawImages
from trainers.data.config import DataConfig
from trainers.data.decoding import Progress, decode_images, decoded_rgb
from trainers.data.location import data_root
from trainers.data.sets import DATASETS

TRAIN_WORDS = ("train", "training")
TEST_WORDS = ("test", "testing")
VALIDATION_WORDS = ("validation", "valid", "val", "dev")
"""What a split may be called. The validation split of others is the test set where there is no other; ours is held out of training."""
MOST_CLASSES = 100_000

Label = int | str
Part = TypeVar("Part")

_log = logging.getLogger(__name__)


@dataclass
class EncodedImages:
    """The images of one split in order: a name of each for messages, the bytes of an image file, and a label."""

    names: list[str] = field(default_factory=list)
    contents: list[bytes] = field(default_factory=list)
    labels: list[Label] = field(default_factory=list)

    def add(self, name: str, content: bytes, label: Label) -> None:
        """Append an image."""
        self.names.append(name)
        self.contents.append(content)
        self.labels.append(label)

    def __len__(self) -> int:
        return len(self.names)


def missing(data_set: str, package: str, error: ImportError) -> UserError:
    """Return what to say where the optional library of a data set is not installed."""
    return UserError(f"data set {data_set!r} needs the package {package} ({error}): `pip install {package}`, or the extra `data`")


def named_folder(root: Path, config: DataConfig) -> Path:
    """Return the folder of a data set that has no place of its own.

    Raises:
        UserError: it is not there.
    """
    info = DATASETS[config.name]
    assert config.folder is not None  # as the config checks
    folder = data_root(root) / expanded(config.folder)  # An absolute folder replaces the root.
    if not folder.is_dir():
        raise UserError(f"data set {config.name!r}: there is no folder {folder}. {info.how_to_obtain}")
    return folder


def kinds_in(words: Iterable[str]) -> set[str]:
    """Return which of `train`, `test` and `validation` the words name."""
    kinds = {"train": TRAIN_WORDS, "test": TEST_WORDS, "validation": VALIDATION_WORDS}
    return {kind for kind, names in kinds.items() if not set(names).isdisjoint(words)}


def train_and_test(splits: Mapping[str, Part], place: Path) -> tuple[Part, Part]:
    """Return what is trained on and what is reported on, from splits by kind.

    Raises:
        UserError: one of them is not there.
    """
    if "test" in splits and "validation" in splits:
        _log.warning("%s: its validation split is not used; ours is held out of the training images", place)
    test = splits.get("test", splits.get("validation"))
    if "train" not in splits or test is None:
        raise UserError(f"{place} has the splits {', '.join(splits) or 'none'}; train and test (or validation) are needed")
    return splits["train"], test


def raw_images(
    train: EncodedImages,
    test: EncodedImages,
    class_names: tuple[str, ...] | None,
    place: Path,
    image_size: int | None,
    progress: Progress | None = None,
) -> RawImages:
    """Decode all images and number their labels.

    Args:
        class_names: in label order; None: labels are numbered as they are, or, where they are words, by their sorted names.
        place: in messages. image_size: side that images are resized to; None: they must all have one size.

    Returns:
        Images of three channels, or of one where every image of both splits is grey.

    Raises:
        UserError: an image cannot be decoded or has another size, a label is none of the classes, or a split is empty.
    """
    for part, images in (("train", train), ("test", test)):
        if not len(images):
            raise UserError(f"{place} has no images in its split {part}")
    names = class_names or _class_names(train, place)
    numbers = {name: number for number, name in enumerate(names)}
    labels = [torch.tensor([_number(*each, numbers) for each in zip(images.names, images.labels, strict=True)]) for images in (train, test)]
    total = len(train) + len(test)
    decoded = []
    for images, before in ((train, 0), (test, len(train))):
        report = None if progress is None else (lambda done, _, before=before: progress(before + done, total))
        decoded.append(decode_images(images.names, _Decoder(images), image_size, report))
    train_NCHW, test_NCHW = decoded
    if train_NCHW.shape[1:] != test_NCHW.shape[1:]:
        raise UserError(
            f"{place}: training images are {tuple(train_NCHW.shape[-2:])}, test images {tuple(test_NCHW.shape[-2:])} "
            "(height, width); set data.image_size to resize them all"
        )
    if _is_grey(train_NCHW) and _is_grey(test_NCHW):
        train_NCHW, test_NCHW = train_NCHW[:, :1].clone(), test_NCHW[:, :1].clone()
    return RawImages(train_NCHW, labels[0], test_NCHW, labels[1], names)


@dataclass
class _Decoder:
    images: EncodedImages

    def __call__(self, row: int) -> Image.Image:
        return decoded_rgb(io.BytesIO(self.images.contents[row]), self.images.names[row])


def _class_names(train: EncodedImages, place: Path) -> tuple[str, ...]:
    kinds = {type(label) for label in train.labels}
    if kinds == {str}:
        return tuple(sorted({str(label) for label in train.labels}))
    if kinds != {int}:
        raise UserError(f"{place}: some labels are numbers and some are words; use one of the two")
    lowest, highest = min(train.labels), max(train.labels)  # type: ignore[type-var]  # all are numbers
    if not 0 <= int(lowest) <= int(highest) < MOST_CLASSES:
        raise UserError(f"{place}: labels run from {lowest} to {highest}; they should count from 0 (to {MOST_CLASSES - 1:,} at most)")
    return tuple(str(number) for number in range(int(highest) + 1))


def _number(name: str, label: Label, numbers: Mapping[str, int]) -> int:
    if isinstance(label, int) and 0 <= label < len(numbers):
        return label
    if isinstance(label, str) and label in numbers:
        return numbers[label]
    raise UserError(f"{name} has the label {label!r:.60}, which is none of the {len(numbers)} classes of the training split")


def _is_grey(images_NCHW: Tensor) -> bool:
    return all(bool((part[:, :1] == part).all()) for part in images_NCHW.split(1024))
