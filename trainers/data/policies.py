"""Policies that change single images, of torchvision or composed of its transforms: each image under a seed of its own."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

PolicyName = Literal["none", "rand_augment", "auto_augment", "trivial_augment", "idbh_weak", "idbh_strong"]

LARGEST_CROP = 10 / 32
"""How much of its sides an image loses at most, both directions together (IDBH on CIFAR-10: 10 of 32 pixels)."""


def apply_policy(name: PolicyName, magnitude: int, images_BCHW: Tensor, seeds_B: Tensor) -> Tensor:
    """Return uint8 images, each changed under a seed of its own; the global generator is as before afterwards.

    Args:
        name: `rand_augment`: two operations of a strength (Cubuk et al. 2020); `auto_augment`: the policies found on CIFAR-10 (Cubuk et al.
            2019); `trivial_augment` (Müller and Hutter 2021); `idbh_weak`, `idbh_strong`: see `improved_diversity`.
        magnitude: of `rand_augment`.
        images_BCHW: uint8, one or three channels.
    """
    policy = _policy(name, magnitude)
    changed = []
    with torch.random.fork_rng(devices=[]):
        for image_CHW, seed in zip(images_BCHW.cpu(), seeds_B.tolist(), strict=True):
            torch.manual_seed(seed)
            changed.append(policy(image_CHW))
    return torch.stack(changed).to(images_BCHW.device)


def _policy(name: PolicyName, magnitude: int) -> Any:
    from torchvision.transforms import v2  # takes a second, and few trainings need it

    if name == "rand_augment":
        return v2.RandAugment(magnitude=magnitude)
    if name == "auto_augment":
        return v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)
    return v2.TrivialAugmentWide() if name == "trivial_augment" else improved_diversity(0.5 if name == "idbh_weak" else 1.0)


def improved_diversity(erased: float) -> Any:
    """Return IDBH, improved diversity and balanced hardness: a window of the image at another place, one change of colour or shape, and an
    erased box.

    Args:
        erased: probability of the box (weak: 0.5, strong: 1).

    Reference: Li and Spratling, Data augmentation alone can improve adversarial training, ICLR 2023; ranges from its code for CIFAR-10,
    TreeLLi/DA-Alone-Improves-AT. Deviation: the mirror image is `data.augmentation`'s.
    """
    from torchvision.transforms import v2

    def turned(low: float, high: float) -> Any:
        return v2.RandomChoice([v2.RandomRotation((low, high)), v2.RandomRotation((-high, -low))])

    def sheared(low: float, high: float) -> Any:
        low, high = math.degrees(low), math.degrees(high)
        sides = [(low, high, 0, 0), (-high, -low, 0, 0), (0, 0, low, high), (0, 0, -high, -low)]
        return v2.RandomChoice([v2.RandomAffine(0, shear=list(side)) for side in sides])

    changes = [
        v2.ColorJitter(saturation=(0.1, 1.9)),
        v2.ColorJitter(brightness=(0.5, 1.9)),
        v2.ColorJitter(contrast=(0.5, 1.9)),
        _sharpen,
        v2.RandomAutocontrast(p=1),
        v2.RandomEqualize(p=1),
        sheared(0.05, 0.15),
        turned(1, 10),
    ]
    return v2.Compose([crop_and_shift, v2.RandomChoice(changes), v2.RandomErasing(p=erased)])


def crop_and_shift(image_CHW: Tensor) -> Tensor:
    """Return a window of the image at another place on black; how many rows and columns it has is random, as are both places."""
    height, width = image_CHW.shape[-2:]
    lost = _whole(int(LARGEST_CROP * min(height, width)))
    rows = _whole(lost)
    columns = lost - rows
    tall, wide = height - rows, width - columns
    (top, left), (down, right) = ((_whole(rows), _whole(columns)) for _ in range(2))
    moved_CHW = torch.zeros_like(image_CHW)
    moved_CHW[..., down : down + tall, right : right + wide] = image_CHW[..., top : top + tall, left : left + wide]
    return moved_CHW


def _whole(most: int) -> int:
    """Draw a whole number from 0 to `most`."""
    return int(torch.randint(most + 1, ()))


def _sharpen(image_CHW: Tensor) -> Tensor:
    from torchvision.transforms.v2 import functional

    return functional.adjust_sharpness(image_CHW, 0.1 + 1.8 * float(torch.rand(())))
