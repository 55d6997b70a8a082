"""Perturbations that one epoch leaves to the next: the attack on an image begins where the last one on it ended.

Shapes: N images of the training set, B batch, C channels, H, W. Kept in half precision and in the frame of the image before its crop and
mirror image, so that they follow the image wherever the next epoch's crop puts it; pixels that a crop did not show keep what they had.

Reference: Zheng et al., Efficient Adversarial Training with Transferable Adversarial Examples, CVPR 2020, section 4 (ATTA; inverse data
augmentation, and forgetting everything every few epochs).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from models.errors import UserError
from trainers.data import ArraySplit, Augmentation, StreamedSplit
from trainers.data.augmentation import AugmentationDraw, crop_padded, crop_positions
from trainers.distributed import world

FOLLOWED = ("none", "crop", "crop_flip")
"""Augmentations after which it is known where a pixel was."""


@dataclass
class ShownImages:
    """Which images a batch shows (B,), and how they were cropped and mirrored."""

    rows_B: Tensor
    draw: AugmentationDraw

    def part(self, part: int, parts: int) -> ShownImages:
        """Return one of so many equal parts."""
        size = len(self.rows_B) // parts
        rows = slice(part * size, (part + 1) * size)
        return ShownImages(self.rows_B[rows], self.draw[rows])


class WarmStart:
    """The perturbations of a training set's images.

    Args:
        split: the training images. augmentation: of them. forget_every: epochs after which all are forgotten.

    Raises:
        UserError: it is not known where the pixels of an augmented image were.
    """

    def __init__(self, split: ArraySplit | StreamedSplit, augmentation: Augmentation, forget_every: int) -> None:
        if not isinstance(split, ArraySplit):
            raise UserError("training.attack.warm_start keeps a perturbation for each image, which streamed sets have no room for")
        if augmentation.name not in FOLLOWED or augmentation.policy != "none" or augmentation.mixing != "none":
            raise UserError("training.attack.warm_start follows images through crops and mirror images, not through other augmentation")
        self.augmentation, self.forget_every = augmentation, forget_every
        self.delta_NCHW = torch.zeros(split.images_NCHW.shape, dtype=torch.float16, device=split.device)
        self.known_N = torch.zeros(len(split), dtype=torch.bool, device=split.device)
        self.changed_N = torch.zeros_like(self.known_N)

    def begin_epoch(self, epoch: int) -> None:
        """Forget everything where it is time; `epoch`: from 0."""
        if epoch % self.forget_every == 0:
            self.delta_NCHW.zero_()
            self.known_N.zero_()
        self.changed_N.zero_()

    def starts(self, shown: ShownImages, x_BCHW: Tensor, others_BCHW: Tensor) -> Tensor:
        """Return where the attack begins: at the image with its perturbation, or at another point where it has none yet."""
        delta_BCHW = crop_padded(self.delta_NCHW[shown.rows_B], shown.draw, *self._padding()).to(x_BCHW.dtype)
        return torch.where(self.known_N[shown.rows_B].view(-1, 1, 1, 1), x_BCHW + delta_BCHW, others_BCHW)

    def keep(self, shown: ShownImages, delta_BCHW: Tensor) -> None:
        """Keep the perturbations of a batch."""
        before_BCHW = self.delta_NCHW[shown.rows_B]
        height, width = before_BCHW.shape[-2:]
        padding_h, padding_w = self._padding()
        padded_BCHW = functional.pad(before_BCHW, (padding_w, padding_w, padding_h, padding_h))
        positions_BCP = crop_positions(shown.draw, padded_BCHW.shape[1], padded_BCHW.shape[-1], height, width)
        padded_BCHW.flatten(2).scatter_(2, positions_BCP, delta_BCHW.to(torch.float16).flatten(2))
        self.delta_NCHW[shown.rows_B] = padded_BCHW[..., padding_h : padding_h + height, padding_w : padding_w + width]
        self.known_N[shown.rows_B] = True
        self.changed_N[shown.rows_B] = True

    def end_epoch(self) -> None:
        """Give every worker what the others kept in this epoch: each image was shown to one of them."""
        if world()[1] == 1:
            return
        mine_NCHW = torch.where(self.changed_N.view(-1, 1, 1, 1), self.delta_NCHW, 0).float()
        changed_N = self.changed_N.float()
        dist.all_reduce(mine_NCHW)
        dist.all_reduce(changed_N)
        self.delta_NCHW = torch.where((changed_N > 0).view(-1, 1, 1, 1), mine_NCHW.to(torch.float16), self.delta_NCHW)
        self.known_N |= changed_N > 0

    def _padding(self) -> tuple[int, int]:
        if self.augmentation.name == "none":
            return 0, 0
        return self.augmentation.padding(*self.delta_NCHW.shape[-2:])

    def state_dict(self) -> dict[str, Any]:
        """Return what an epoch leaves to the next, on the CPU."""
        return {"delta": self.delta_NCHW.cpu().clone(), "known": self.known_N.cpu().clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned.

        Raises:
            KeyError, RuntimeError: it is of other images.
        """
        self.delta_NCHW.copy_(state["delta"])
        self.known_N.copy_(state["known"])
