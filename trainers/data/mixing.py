"""Images mixed in pairs.

Legend: B batch, C channels, H, W, K classes. Whatever is random is drawn for the whole epoch before, so that every rank of a distributed
run mixes the same pairs alike.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

MixingName = Literal["none", "mixup", "cutmix"]


def draw_mixing(count: int, alpha: float, generator: torch.Generator) -> Tensor:
    """Return for each of N images (N, 3) in [0,1]: its own share, drawn from Beta(alpha, alpha), and the centre of a box (down, right)."""
    first, second = (torch._standard_gamma(torch.full((count,), alpha, dtype=torch.float64), generator=generator) for _ in range(2))
    share_N = torch.where(first + second > 0, first / (first + second), 0.5)
    return torch.cat([share_N[:, None], torch.rand((count, 2), generator=generator, dtype=torch.float64)], dim=1)


def mix(
    name: MixingName, x_BCHW: Tensor, others_BCHW: Tensor, labels_B: Tensor, others_B: Tensor, draw_B3: Tensor, num_classes: int
) -> tuple[Tensor, Tensor]:
    """Return images mixed with others, and their labels (B, K), which sum to 1.

    Args:
        name: `mixup`: share x + (1 - share) other; `cutmix`: a box of area 1 - share, cut at the border, shows the other image; the labels'
            shares are those of the pixels.
        x_BCHW, others_BCHW: float. labels_B, others_B: int64.
        draw_B3: of `draw_mixing`.

    Reference: Zhang et al., mixup, ICLR 2018; Yun et al., CutMix, ICCV 2019, Algorithm A1.
    Deviation: a share and a box for each image instead of one for the batch, as torchvision has it.
    """
    share_B = draw_B3[:, 0]
    if name == "cutmix":
        inside_BHW = _boxes(draw_B3, *x_BCHW.shape[-2:])
        share_B = 1 - inside_BHW.double().mean((1, 2))
        mixed_BCHW = torch.where(inside_BHW[:, None], others_BCHW, x_BCHW)
    else:
        weight_B111 = share_B.to(x_BCHW.dtype)[:, None, None, None]
        mixed_BCHW = weight_B111 * x_BCHW + (1 - weight_B111) * others_BCHW
    own_BK, other_BK = (functional.one_hot(labels, num_classes).to(x_BCHW.dtype) for labels in (labels_B, others_B))
    weight_B1 = share_B.to(x_BCHW.dtype)[:, None]
    return mixed_BCHW, weight_B1 * own_BK + (1 - weight_B1) * other_BK


def _boxes(draw_B3: Tensor, height: int, width: int) -> Tensor:
    """Return which pixels (B, H, W) lie in each image's box: sides sqrt(1 - share) of the image's, around the centre, cut at the border."""
    half_B = 0.5 * (1 - draw_B3[:, 0]).clamp_min(0).sqrt()
    insides = []
    for axis, side in ((1, height), (2, width)):
        centre_B1 = (draw_B3[:, axis, None] * side).floor()
        reach_B1 = (half_B[:, None] * side).floor()
        pixels_S = torch.arange(side, device=draw_B3.device)
        insides.append((pixels_S >= centre_B1 - reach_B1) & (pixels_S < centre_B1 + reach_B1))
    return insides[0][:, :, None] & insides[1][:, None, :]
