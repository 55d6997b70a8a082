"""Splits: disjoint, stratified, chosen by index, the same on every machine. Legend: N images, C channels, H, W."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from models.errors import UserError
from trainers.data.config import DataConfig
from trainers.data.image_tree import ImageFiles

Batch = tuple[Tensor, Tensor]
"""(x_BCHW float32 in [0, 1], y_B int64)."""

DERIVED_VALIDATION_SHARE = 10
DERIVED_VALIDATION_MAX = 5_000
MAX_STATISTICS_IMAGES = 10_000


@dataclass(frozen=True)
class ArraySplit:
    """Images of one split, all on one device: images_NCHW uint8 0..255 (contiguous) and labels N, int64 in 0..K-1."""

    images_NCHW: Tensor
    labels: Tensor
    indices: Tensor
    """Position of each image in the data set's own training or test list; int64, on the CPU."""
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    """Channel means of pixels in [0, 1], for the model's normalization."""
    std: tuple[float, ...]
    """Channel standard deviations of pixels in [0, 1], for the model's normalization."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def epoch_length(self) -> int:
        """Images of an epoch of training."""
        return len(self)

    def epoch_order(self, generator: torch.Generator) -> Tensor:
        """Return the rows of an epoch of training, in a new order."""
        return torch.randperm(len(self), generator=generator, device=generator.device)

    @property
    def num_classes(self) -> int:
        """K, also where a split holds no image of some class."""
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        channels, height, width = self.images_NCHW.shape[1:]
        return channels, height, width

    @property
    def device(self) -> torch.device:
        """Where the images live."""
        return self.images_NCHW.device

    def to(self, device: torch.device | str) -> ArraySplit:
        """Return the split on another device."""
        return replace(self, images_NCHW=self.images_NCHW.to(device), labels=self.labels.to(device))

    def subset(self, rows: Tensor | range) -> ArraySplit:
        """Return the split that holds the given rows, in the given order."""
        rows = torch.as_tensor(rows, dtype=torch.int64)
        on_device = rows.to(self.device)
        return replace(
            self,
            images_NCHW=self.images_NCHW[on_device],
            labels=self.labels[on_device],
            indices=self.indices[rows.cpu()],
        )


@dataclass(frozen=True)
class StreamedSplit:
    """Image files of one split, decoded when they are needed. Batches arrive on `device`."""

    files: ImageFiles
    indices: Tensor
    """Position of each file in the data set's own training or test list; int64."""
    image_size: int
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    """Channel means of pixels in [0, 1], for the model's normalization."""
    std: tuple[float, ...]
    """Channel standard deviations of pixels in [0, 1], for the model's normalization."""
    device: torch.device
    num_workers: int | None = None
    """Decoding processes; None: the processors, at most 8; 0: decode in the calling process."""

    def __len__(self) -> int:
        return len(self.files)

    @property
    def epoch_length(self) -> int:
        """Images of an epoch of training."""
        return len(self)

    @property
    def labels(self) -> Tensor:
        """The labels in order; int64, on the CPU."""
        return self.files.labels

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(3, side, side)."""
        return 3, self.image_size, self.image_size

    def subset(self, rows: Tensor | range) -> StreamedSplit:
        """Return the split that holds the given rows, in the given order."""
        rows = torch.as_tensor(rows, dtype=torch.int64).cpu()
        return replace(self, files=self.files.subset(rows), indices=self.indices[rows])


@dataclass(frozen=True)
class Splits:
    """The three splits of one data set. Models are selected on `validation`; `test` is for reporting only."""

    train: ArraySplit | StreamedSplit
    validation: ArraySplit | StreamedSplit
    test: ArraySplit | StreamedSplit

    @property
    def class_names(self) -> tuple[str, ...]:
        """Class names in label order."""
        return self.train.class_names

    @property
    def num_classes(self) -> int:
        """K."""
        return self.train.num_classes

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.train.image_shape

    @property
    def mean(self) -> tuple[float, ...]:
        """Channel means of pixels in [0, 1]."""
        return self.train.mean

    @property
    def std(self) -> tuple[float, ...]:
        """Channel standard deviations of pixels in [0, 1]."""
        return self.train.std


@dataclass(frozen=True)
class SplitIndices:
    """Ascending positions: train and validation in the published training list, test in the published test list."""

    train: Tensor
    validation: Tensor
    test: Tensor


def split_indices(train_labels_N: Tensor, test_labels_N: Tensor, config: DataConfig) -> SplitIndices:
    """Choose the images of the three splits from the labels alone.

    Limits are applied after the validation images are held out, so they never change those. Raises UserError if the
    validation set would take all training images.
    """
    validation_size = derived_validation_size(len(train_labels_N), config.validation_size)
    train, validation = stratified_holdout(train_labels_N, validation_size, config.split_seed)
    test = torch.arange(len(test_labels_N))
    if config.limit_train is not None:
        train = train[class_balanced_prefix(train_labels_N[train], config.limit_train)]
    if config.limit_test is not None:
        test = class_balanced_prefix(test_labels_N, config.limit_test)
    return SplitIndices(train, validation, test)


def derived_validation_size(num_train: int, validation_size: int | None) -> int:
    """Return the number of validation images: as asked, or a tenth of the training images but at most 5,000."""
    if validation_size is None:
        return min(num_train // DERIVED_VALIDATION_SHARE, DERIVED_VALIDATION_MAX)
    if validation_size >= num_train:
        raise UserError(f"data.validation_size is {validation_size}, but there are only {num_train} training images")
    return validation_size


def stratified_holdout(labels_N: Tensor, num_held: int, seed: int) -> tuple[Tensor, Tensor]:
    """Split positions 0..N-1 into (kept, held), both ascending, with the same share of each class, to within one image.

    The number held of a class is its share of `num_held`, rounded by largest remainder (ties to the lower class); which
    ones is decided by `seed` on the CPU, so it does not depend on machine or device.
    """
    labels_N = labels_N.cpu()
    num_examples = len(labels_N)
    assert 0 <= num_held <= num_examples
    counts_K = torch.bincount(labels_N).tolist()
    exact = [num_held * count for count in counts_K]  # In units of 1/N, so that everything stays in integers.
    quotas = [share // max(num_examples, 1) for share in exact]
    remainders = [share % max(num_examples, 1) for share in exact]
    by_remainder = sorted(range(len(counts_K)), key=lambda label: (-remainders[label], label))
    for label in by_remainder[: num_held - sum(quotas)]:
        quotas[label] += 1
    shuffled_N = torch.randperm(num_examples, generator=torch.Generator().manual_seed(seed))
    held_mask_N = torch.zeros(num_examples, dtype=torch.bool)
    held_mask_N[shuffled_N] = _occurrence(labels_N[shuffled_N]) < torch.tensor(quotas)[labels_N[shuffled_N]]
    return (~held_mask_N).nonzero().squeeze(1), held_mask_N.nonzero().squeeze(1)


def class_balanced_prefix(labels_N: Tensor, limit: int) -> Tensor:
    """Return ascending positions of at most `limit` images: the first of each class, then the second, and so on.

    A smaller limit's images are always among a larger one's.
    """
    labels_N = labels_N.cpu()
    round_robin_N = _occurrence(labels_N) * (int(labels_N.max()) + 1 if len(labels_N) else 1) + labels_N
    return round_robin_N.argsort(stable=True)[:limit].sort().values


def _occurrence(labels_N: Tensor) -> Tensor:
    """Return, for each position, how many earlier positions carry the same label."""
    by_label_N = labels_N.argsort(stable=True)
    counts_K = torch.bincount(labels_N)
    starts_K = counts_K.cumsum(0) - counts_K
    occurrence_N = torch.empty_like(labels_N)
    occurrence_N[by_label_N] = torch.arange(len(labels_N)) - starts_K[labels_N[by_label_N]]
    return occurrence_N


def resize_square(images_NCHW: Tensor, side: int, chunk: int = 4096) -> Tensor:
    """Resize uint8 images to side x side (bilinear, antialiased; aspect ratio is not kept), rounded to uint8 again."""
    if tuple(images_NCHW.shape[-2:]) == (side, side):
        return images_NCHW
    resized_NCHW = images_NCHW.new_empty((*images_NCHW.shape[:2], side, side))
    for start in range(0, len(images_NCHW), chunk):
        part = images_NCHW[start : start + chunk].float()
        part = F.interpolate(part, size=(side, side), mode="bilinear", antialias=True, align_corners=False)
        resized_NCHW[start : start + chunk] = part.round_().clamp_(0, 255).to(torch.uint8)
    return resized_NCHW


def pixel_statistics(images_NCHW: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return (mean, std) of each channel over the pixels in [0, 1] of at most 10,000 evenly spaced uint8 images.

    A standard deviation below one grey level is raised to it, so that a model can divide by it.
    """
    step = -(-len(images_NCHW) // MAX_STATISTICS_IMAGES) or 1
    sample_CP = images_NCHW[::step].transpose(0, 1).flatten(1).cpu()
    # Through a histogram: exact, and without a floating-point copy of all pixels.
    levels_L = torch.arange(256, dtype=torch.float64) / 255
    mean, std = [], []
    for channel_P in sample_CP:
        weights_L = torch.bincount(channel_P.int(), minlength=256).double() / channel_P.numel()
        centre = (weights_L * levels_L).sum()
        mean.append(round(float(centre), 6))
        std.append(round(max(float((weights_L * (levels_L - centre) ** 2).sum().sqrt()), 1 / 255), 6))
    return tuple(mean), tuple(std)
