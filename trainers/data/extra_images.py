"""Further training images from a file, mixed with a data set's own at a given share of every batch.

Reference: Gowal et al., Improving Robustness using Generated Data, NeurIPS 2021; Wang et al., Better Diffusion Models Further Improve
Adversarial Training, ICML 2023.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from models.errors import UserError
from models.file_content import check_ordinary
from trainers.data.split import ArraySplit, resize_square

IMAGES, LABELS = ("images", "image"), ("labels", "label")
"""What arrays of the file may be called: ours, and those of the published files."""


@dataclass(frozen=True)
class MixedSplit(ArraySplit):
    """A training split whose rows are a set's own images, then further ones.

    An epoch passes all own images once; of every 1 / (1 - share) positions in a row, 1 is an own image's, and the others are those of
    further images, in an order of their own that begins anew when all were seen.
    """

    num_own: int = 0
    extra_share: float = 0.0

    @property
    def epoch_length(self) -> int:
        """Images of an epoch."""
        return round(self.num_own / (1 - self.extra_share))

    def epoch_order(self, generator: torch.Generator) -> Tensor:
        """Return the rows of an epoch."""
        length, device = self.epoch_length, generator.device
        own_N = torch.randperm(self.num_own, generator=generator, device=device)
        num_extra, wanted = len(self) - self.num_own, length - self.num_own
        rounds = [torch.randperm(num_extra, generator=generator, device=device) for _ in range(-(-wanted // num_extra))]
        extra_M = self.num_own + torch.cat(rounds)[:wanted] if rounds else own_N[:0]
        # Position p is an own image's where the count of own ones up to it rises: evenly in every batch and in every worker's part of it.
        due = torch.arange(length + 1, device=device, dtype=torch.float64).mul_(self.num_own / length).add_(1e-9).floor_()
        is_own = due[1:] > due[:-1]
        order = torch.empty(length, dtype=torch.int64, device=device)
        order[is_own], order[~is_own] = own_N[: int(is_own.sum())], extra_M[: int((~is_own).sum())]
        return order


def with_extra_images(train: ArraySplit, path: Path, share: float, image_size: int | None) -> MixedSplit:
    """Return a training split with the images of a file.

    Args:
        path: `.npz` with `images` (M, H, W, C) or (M, C, H, W), uint8, and `labels` (M,), whole numbers in 0..K-1.
        share: of every batch that is theirs, above 0 and below 1.
        image_size: side that they are resized to; None: they must have the set's own.

    Raises:
        UserError: the file is not there, or does not hold such images.
    """
    images, labels = _arrays(path)
    if images.dtype != np.uint8 or images.ndim != 4 or len(images) == 0:
        raise UserError(f"data.extra_images: {path}: images are {images.dtype} of shape {images.shape}; uint8 (M, H, W, C) is needed")
    channels, height, width = train.image_shape
    if images.shape[1] != channels or (images.shape[3] == channels and images.shape[1:] != train.image_shape):
        images = images.transpose(0, 3, 1, 2)
    pixels = torch.from_numpy(np.ascontiguousarray(images))
    if image_size is not None and pixels.shape[1] == channels:
        pixels = resize_square(pixels, image_size)
    if pixels.shape[1:] != train.image_shape:
        raise UserError(f"data.extra_images: {path}: images have shape {tuple(pixels.shape[1:])}, the set's {(channels, height, width)}")
    if labels.shape != (len(images),) or labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= train.num_classes:
        raise UserError(
            f"data.extra_images: {path}: labels are {labels.dtype} of shape {labels.shape}; {len(images)} whole numbers in "
            f"0..{train.num_classes - 1} are needed"
        )
    return MixedSplit(
        images_NCHW=torch.cat([train.images_NCHW, pixels.to(train.device)]),
        labels=torch.cat([train.labels, torch.from_numpy(labels.astype(np.int64)).to(train.device)]),
        indices=torch.cat([train.indices, torch.full((len(images),), -1)]),
        class_names=train.class_names,
        mean=train.mean,
        std=train.std,
        num_own=len(train),
        extra_share=share,
    )


def _arrays(path: Path) -> tuple[np.ndarray, np.ndarray]:
    check_ordinary(path)
    try:
        with np.load(path, allow_pickle=False) as content:
            names = list(content.files)
            found = [next((name for name in allowed if name in names), None) for allowed in (IMAGES, LABELS)]
            if None in found:
                raise UserError(f"data.extra_images: {path} holds {', '.join(names[:10]) or 'nothing'}; `images` and `labels` are needed")
            images, labels = (content[name] for name in found)
    except (OSError, ValueError, EOFError, KeyError, AttributeError, zipfile.BadZipFile) as error:
        raise UserError(f"data.extra_images: cannot read {path}: {' '.join(str(error).split())[:200]}") from None
    return images, labels
