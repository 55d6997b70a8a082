"""The images of an evaluation by survival: picture, perturbation, and what each attack left of them. T1 only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor
from torch.nn import functional

from analysis.evaluation.images import encode_png
from analysis.evaluation.measurements import measurements
from analysis.evaluation.points import KeptPoints
from analysis.result import EvaluationResult

MOST_SHOWN = 200
_LARGEST_SIDE = 64  # pixels of a thumbnail


@dataclass(frozen=True)
class ImageRow:
    """One image.

    Attributes:
        sample: its row in the test images. label: its class.
        survival: share of draws on which it is right under its worst attack. worst: that attack's name.
        shares: share of draws on which it is right, by attack, `clean` first; attacks that did not see it are missing.
        picture, perturbed, change: PNG in base64; None where images or points were not kept. The change is stretched to the full range.
        largest_change: linf distance between the two; None likewise.
    """

    sample: int
    label: int
    survival: float
    worst: str
    shares: Mapping[str, float]
    picture: str | None = None
    perturbed: str | None = None
    change: str | None = None
    largest_change: float | None = None


def image_rows(
    result: EvaluationResult, images: Tensor | None = None, points: KeptPoints | None = None, at_most: int = MOST_SHOWN
) -> tuple[list[ImageRow], int]:
    """Return the images of the headline, those that survive least first, and how many there are.

    Args:
        images: the test images (N, C, H, W) that the rows of the samples refer to. points: what the attacks made of them.
        at_most: of more images, so many are taken, evenly spaced along the order.
    """
    worst = result.worst
    if worst is None:
        return [], 0
    survival_S = worst.correct_SR.mean(1)
    order = sorted(range(len(worst.ids)), key=lambda place: (survival_S[place], int(worst.ids[place])))
    if len(order) > at_most:
        order = [order[place] for place in np.linspace(0, len(order) - 1, at_most).round().astype(int)]
    shares, labels = _shares(result)
    kept = {} if points is None else points.images((worst.chosen[place], int(worst.ids[place])) for place in order)
    rows = []
    for place in order:
        sample, attack = int(worst.ids[place]), worst.chosen[place]
        seen = {name: by_sample[sample] for name, by_sample in shares.items() if sample in by_sample}
        row = ImageRow(sample, labels[sample], float(survival_S[place]), attack, seen)
        rows.append(_with_pictures(row, images, kept.get((attack, sample))))
    return rows, len(worst.ids)


def _shares(result: EvaluationResult) -> tuple[dict[str, dict[int, float]], dict[int, int]]:
    """Return the share of draws that are right, by attack and sample, and the label of each sample."""
    shares: dict[str, dict[int, float]] = {}
    labels: dict[int, int] = {}
    for each in measurements(result.records):
        if each.kind in ("clean", "attack") and each.protocol == "T1":
            samples = [int(sample) for sample in each.ids]
            shares[each.name] = dict(zip(samples, each.matrix().mean(1).tolist(), strict=True))
            labels |= dict(zip(samples, each.column("labels"), strict=True))
    return shares, labels


def _with_pictures(row: ImageRow, images: Tensor | None, perturbed: Tensor | None) -> ImageRow:
    if images is None:
        return row
    image = images[row.sample].detach().cpu().float()
    facts = {**vars(row), "picture": encode_png(_thumbnail(image))}
    if perturbed is not None:
        change = perturbed.float() - image
        largest = float(change.abs().max())
        stretched = 0.5 + change / (2 * largest) if largest > 0 else 0.5 + change
        facts |= {"perturbed": encode_png(_thumbnail(perturbed)), "change": encode_png(_thumbnail(stretched)), "largest_change": largest}
    return ImageRow(**facts)


def _thumbnail(image_CHW: Tensor) -> Tensor:
    """Return the image, made smaller where a page of hundreds could not hold it."""
    largest = max(image_CHW.shape[-2:])
    if largest <= _LARGEST_SIDE:
        return image_CHW
    height, width = (max(round(side * _LARGEST_SIDE / largest), 1) for side in image_CHW.shape[-2:])
    return functional.interpolate(image_CHW[None].float(), size=(height, width), mode="area")[0]
