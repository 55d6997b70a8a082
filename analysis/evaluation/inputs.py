"""Images and labels as users have them: tensors, arrays, lists; brought to what attacks and scores work with where the meaning is plain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.errors import UserError
from trainers.attacks import check_pixels

_ROUNDING = 1e-4  # of the pixel range, a fortieth of a grey level: what resizing and half precision leave outside [0,1]


def images_of(x: Any) -> Tensor:
    """Return images as a tensor (N, C, H, W) in [0,1], float32 or float64: a tensor that is one already is returned itself.

    Args:
        x: tensor, array or list of either; values that rounding moved out of [0,1] are clipped.

    Raises:
        UserError: not floating-point images in [0,1], or none.
    """
    images = _tensor(x, "images").detach()
    if images.dim() != 4 or not images.is_floating_point():
        raise UserError(f"images must be floating-point pixels in [0,1] of shape (N, C, H, W), not {images.dtype} {tuple(images.shape)}")
    if images.numel() == 0:
        raise UserError("there are no images to evaluate on")
    if images.dtype not in (torch.float32, torch.float64):
        images = images.float()
    if outside_by_rounding(images):
        images = images.clamp(0, 1)
    check_pixels(images)
    return images


def labels_of(y: Any, num_images: int) -> Tensor:
    """Return labels as a tensor of integers (N,); `False` is class 0 and `True` class 1.

    Raises:
        UserError: not one integer per image.
    """
    labels = _tensor(y, "labels").detach()
    if labels.shape != (num_images,) or labels.is_floating_point() or labels.is_complex():
        raise UserError(f"labels must be {num_images} integers, one per image, not {labels.dtype} of shape {tuple(labels.shape)}")
    return labels.long()


def rows_of(values: Any, rows: Sequence[int]) -> Any:
    """Return some rows of a tensor, an array or a list."""
    if isinstance(values, Tensor | np.ndarray):
        return values[list(rows)]
    return [values[row] for row in rows]


def outside_by_rounding(images: Tensor) -> bool:
    """Return whether pixels are outside [0,1], none by more than rounding explains."""
    lowest, highest = (bound.item() for bound in images.aminmax())
    return (lowest < 0 or highest > 1) and lowest >= -_ROUNDING and highest <= 1 + _ROUNDING


def remarks_on(x: Any, y: Any, labels: Tensor, num_classes: int) -> list[str]:
    """Return what a user should know of how the images and labels were read, one sentence each."""
    found = []
    pixels = _tensor(x, "images")
    if pixels.is_floating_point() and outside_by_rounding(pixels.float()):
        lowest, highest = (bound.item() for bound in pixels.aminmax())
        found.append(f"pixels are up to {max(-lowest, highest - 1):.1g} outside [0,1], as rounding leaves them: they are clipped")
    if _tensor(y, "labels").dtype == torch.bool:
        found.append("labels are truth values: False is class 0, True is class 1")
    used = int(labels.max()) + 1
    if used < num_classes:
        found.append(f"the model has {num_classes} classes, labels use {used}: an answer among the others counts as an error")
    return found


def _tensor(values: Any, what: str) -> Tensor:
    if isinstance(values, Tensor):
        return values.clone() if values.is_inference() else values  # such a tensor cannot be part of a graph
    try:
        if isinstance(values, list | tuple) and values and all(isinstance(value, Tensor) for value in values):
            return torch.stack([value.cpu() for value in values])
        return torch.as_tensor(np.asarray(values))
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{what} must be a tensor, an array or a list of equal shapes, not {type(values).__name__}: {error}") from None
