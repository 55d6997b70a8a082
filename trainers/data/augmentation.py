"""Random crops and flips of whole batches on the device.

Legend: B batch, C channels, H, W. Random numbers come from the generator that is passed in, never from a global one,
and drawing is apart from applying, so that every rank of a distributed run can draw for the whole epoch and use its own
rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from models.profiling import timed
from trainers.data.mixing import MixingName, draw_mixing
from trainers.data.policies import PolicyName, apply_policy

AugmentationName = Literal["none", "crop", "crop_flip", "random_resized_crop"]

STREAMED_AUGMENTATIONS: tuple[AugmentationName, ...] = ("none", "random_resized_crop")
"""What can be done to images that are decoded while training, where sizes differ."""
REFERENCE_SIDE = 32
"""Side in pixels at which `crop_padding` is stated."""
RESIZED_CROP_AREA = (0.08, 1.0)
"""Share of the image's area that a random resized crop keeps."""
RESIZED_CROP_ASPECT = (3 / 4, 4 / 3)
"""Width over height of a random resized crop, uniform on a log scale."""
RESIZED_CROP_TRIES = 10
"""Boxes tried before the whole image (cut to the allowed aspect) is taken."""


def scaled_padding(crop_padding: int, side: int) -> int:
    """Return the padding in pixels at an image's side, for a `crop_padding` stated at side 32.

    With 4: 1 pixel at side 8, 2 at 16, 4 at 28 and 32, 8 at 64. A padding above zero never shrinks to zero.
    """
    if crop_padding == 0:
        return 0
    return max(1, math.floor(crop_padding * side / REFERENCE_SIDE + 0.5))


def unit_interval(images: Tensor) -> Tensor:
    """Return uint8 pixels 0..255 as float32 in [0, 1], bit-identical on every device."""
    # A divisor on the same device: with a Python number CUDA multiplies by the reciprocal and is off by a last bit.
    return images.to(torch.float32) / torch.full((), 255.0, device=images.device)


@dataclass(frozen=True)
class AugmentationDraw:
    """The random choices for B images: boxes_B4 (top, left, height, width; int64, pixels) and flips_B (bool); where there are such, seeds_B
    of a policy (int64) and the (B, 3) of `draw_mixing`."""

    boxes: Tensor
    flips: Tensor
    seeds: Tensor | None = None
    mixing: Tensor | None = None

    def __getitem__(self, rows: slice | Tensor) -> AugmentationDraw:
        return AugmentationDraw(*(None if value is None else value[rows] for value in self._values()))  # type: ignore[arg-type] # as they are

    def to(self, device: torch.device | str) -> AugmentationDraw:
        """Return the draw on another device."""
        return AugmentationDraw(*(None if value is None else value.to(device) for value in self._values()))  # type: ignore[arg-type] # as above

    def _values(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        return self.boxes, self.flips, self.seeds, self.mixing


@dataclass(frozen=True)
class Augmentation:
    """A training augmentation by name.

    `none`; `crop` (zero padding, random crop); `crop_flip` (and a mirror image half of the time); `random_resized_crop`
    (a box of 8 to 100 % of the area stretched to the full size, and a mirror image half of the time).
    """

    name: AugmentationName = "none"
    crop_padding: int = 4
    """Zero padding on each side for `crop` and `crop_flip`, in pixels of a 32x32 image (see `scaled_padding`)."""
    policy: PolicyName = "none"
    """What a library does to each image after crop and mirror image."""
    policy_magnitude: int = 9
    """How strongly `rand_augment` does, 0 to 30."""
    mixing: MixingName = "none"
    """Whether images are mixed in pairs; labels are then probabilities (B, K)."""
    mixing_alpha: float = 1.0
    """Shares are drawn from Beta(alpha, alpha)."""

    def draw(self, batch_size: int, height: int, width: int, generator: torch.Generator) -> AugmentationDraw:
        """Draw for `batch_size` images of one size, on the generator's device; `none` draws nothing.

        For `crop` and `crop_flip` boxes lie in the padded image, for `random_resized_crop` in the image itself.
        """
        draw = self._draw_crops(batch_size, height, width, generator)
        seeds_B = mixing_B3 = None
        if self.policy != "none":
            seeds_B = torch.randint(2**62, (batch_size,), generator=generator, device=generator.device)
        if self.mixing != "none":
            mixing_B3 = draw_mixing(batch_size, self.mixing_alpha, generator)
        return replace(draw, seeds=seeds_B, mixing=mixing_B3)

    def _draw_crops(self, batch_size: int, height: int, width: int, generator: torch.Generator) -> AugmentationDraw:
        device = generator.device
        flips_B = torch.zeros(batch_size, dtype=torch.bool, device=device)
        if self.name == "none":
            whole = torch.tensor([0, 0, height, width], device=device)
            return AugmentationDraw(whole.expand(batch_size, 4).contiguous(), flips_B)
        if self.name == "random_resized_crop":
            boxes_B4 = draw_resized_crop_boxes(batch_size, height, width, generator)
        else:
            boxes_B4 = self._draw_padded_crops(batch_size, height, width, generator)
        if self.name != "crop":
            flips_B = torch.rand(batch_size, generator=generator, device=device) < 0.5
        return AugmentationDraw(boxes_B4, flips_B)

    @timed("augmentation")
    def apply(self, images_BCHW: Tensor, draw: AugmentationDraw) -> Tensor:
        """Return the augmented uint8 images of the same shape as float32 in [0, 1], not mixed yet."""
        if draw.seeds is not None:
            return unit_interval(apply_policy(self.policy, self.policy_magnitude, self._cropped(images_BCHW, draw), draw.seeds))
        if self.name == "none":
            return unit_interval(images_BCHW)
        if self.name == "random_resized_crop":
            return resize_crops(unit_interval(images_BCHW), draw)
        return unit_interval(self._cropped(images_BCHW, draw))

    def _cropped(self, images_BCHW: Tensor, draw: AugmentationDraw) -> Tensor:
        if self.name == "none":
            return images_BCHW
        return crop_padded(images_BCHW, draw, *self.padding(*images_BCHW.shape[-2:]))

    def padding(self, height: int, width: int) -> tuple[int, int]:
        """Return the zero padding on each side, down and across, of `crop` and `crop_flip`."""
        return scaled_padding(self.crop_padding, height), scaled_padding(self.crop_padding, width)

    def _draw_padded_crops(self, batch_size: int, height: int, width: int, generator: torch.Generator) -> Tensor:
        device = generator.device
        offsets = [
            torch.randint(0, 2 * padding + 1, (batch_size,), generator=generator, device=device) for padding in self.padding(height, width)
        ]
        sizes = [torch.full((batch_size,), side, dtype=torch.int64, device=device) for side in (height, width)]
        return torch.stack([*offsets, *sizes], dim=1)


def crop_padded(images_BCHW: Tensor, draw: AugmentationDraw, padding_h: int, padding_w: int) -> Tensor:
    """Crop each image, padded with zeros, at its own offset and mirror the flipped ones; dtype and shape stay.

    Equal, image by image, to torchvision's `crop(pad(image), ...)` followed by `hflip`.
    """
    batch_size, channels, height, width = images_BCHW.shape
    padded_BCHW = F.pad(images_BCHW, (padding_w, padding_w, padding_h, padding_h))
    positions_BCP = crop_positions(draw, channels, padded_BCHW.shape[-1], height, width)
    return padded_BCHW.flatten(2).gather(2, positions_BCP).view(batch_size, channels, height, width)


def crop_positions(draw: AugmentationDraw, channels: int, padded_width: int, height: int, width: int) -> Tensor:
    """Return where in the padded image each pixel of the crop comes from, (B, C, height * width), counted row by row."""
    device = draw.boxes.device
    rows_BH = draw.boxes[:, 0, None] + torch.arange(height, device=device)
    columns_W = torch.arange(width, device=device)
    columns_BW = draw.boxes[:, 1, None] + torch.where(draw.flips[:, None], width - 1 - columns_W, columns_W)
    index_BHW = rows_BH[:, :, None] * padded_width + columns_BW[:, None, :]
    return index_BHW.reshape(len(draw.boxes), 1, height * width).expand(-1, channels, -1)


def draw_resized_crop_boxes(batch_size: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Draw boxes_B4 (top, left, height, width) with the distribution of torchvision's RandomResizedCrop.

    Each image takes the first of ten boxes that fits (area uniform in 8..100 %, log aspect uniform); if none fits, the
    largest centred box of an allowed aspect.
    """
    device = generator.device
    uniform_BT2 = torch.rand((batch_size, RESIZED_CROP_TRIES, 2), generator=generator, device=device, dtype=torch.float64)
    uniform_B2 = torch.rand((batch_size, 2), generator=generator, device=device, dtype=torch.float64)
    low, high = RESIZED_CROP_AREA
    area_BT = height * width * (low + (high - low) * uniform_BT2[..., 0])
    log_low, log_high = (math.log(aspect) for aspect in RESIZED_CROP_ASPECT)
    aspect_BT = torch.exp(log_low + (log_high - log_low) * uniform_BT2[..., 1])
    heights_BT = torch.sqrt(area_BT / aspect_BT).round().long()
    widths_BT = torch.sqrt(area_BT * aspect_BT).round().long()
    fits_BT = (heights_BT > 0) & (heights_BT <= height) & (widths_BT > 0) & (widths_BT <= width)
    first_B1 = fits_BT.int().argmax(dim=1, keepdim=True)
    fits_B = fits_BT.any(dim=1)
    fallback_height, fallback_width = _largest_allowed_box(height, width)
    heights_B = torch.where(fits_B, heights_BT.gather(1, first_B1).squeeze(1), fallback_height)
    widths_B = torch.where(fits_B, widths_BT.gather(1, first_B1).squeeze(1), fallback_width)
    tops_B = (uniform_B2[:, 0] * (height - heights_B + 1)).long()
    lefts_B = (uniform_B2[:, 1] * (width - widths_B + 1)).long()
    tops_B = torch.where(fits_B, tops_B, (height - heights_B) // 2)
    lefts_B = torch.where(fits_B, lefts_B, (width - widths_B) // 2)
    return torch.stack([tops_B, lefts_B, heights_B, widths_B], dim=1)


def _largest_allowed_box(height: int, width: int) -> tuple[int, int]:
    low, high = RESIZED_CROP_ASPECT
    if width / height < low:
        return round(width / low), width
    if width / height > high:
        return height, round(height * high)
    return height, width


def resize_crops(images_BCHW: Tensor, draw: AugmentationDraw) -> Tensor:
    """Stretch each image's box to the full size (bilinear) and mirror the flipped ones; float in, float out.

    A box is never larger than the output, so this is pure enlargement, where antialiasing changes nothing: it equals
    torchvision's `resized_crop` on float images.
    """
    batch_size, _, height, width = images_BCHW.shape
    axes = []
    for axis, side in ((0, height), (1, width)):
        start_B1 = draw.boxes[:, axis, None].to(images_BCHW.dtype)
        size_B1 = draw.boxes[:, axis + 2, None].to(images_BCHW.dtype)
        centres_S = torch.arange(side, device=images_BCHW.device, dtype=images_BCHW.dtype) + 0.5
        # Clamped to the box: pixels outside it must not bleed in at its border.
        inside_BS = torch.minimum((centres_S * (size_B1 / side) - 0.5).clamp_min(0), size_B1 - 1)
        axes.append((2 * (start_B1 + inside_BS) + 1) / side - 1)
    grid_y_BH, grid_x_BW = axes
    grid_x_BW = torch.where(draw.flips[:, None], grid_x_BW.flip(1), grid_x_BW)
    grid_BHW2 = torch.stack(
        [
            grid_x_BW[:, None, :].expand(batch_size, height, width),
            grid_y_BH[:, :, None].expand(batch_size, height, width),
        ],
        dim=-1,
    )
    resized_BCHW = F.grid_sample(images_BCHW, grid_BHW2, mode="bilinear", padding_mode="border", align_corners=False)
    return resized_BCHW.clamp_(0, 1)  # Rounding in the interpolation weights may leave the range by a last bit.
