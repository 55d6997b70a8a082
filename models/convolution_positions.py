"""Convolutions of a backbone by number: 1 is the stem, 2 the next spatial convolution of the main path, and so on."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from models.backbones.base import Backbone
from models.errors import UserError
from models.layer_replacement import get_module


def spatial_convolutions(backbone: Backbone) -> list[str]:
    """Return the dotted names of the main path's convolutions with a kernel larger than 1x1, in forward order.

    Convolutions of 1x1 see no neighbourhood, so they do not count: number 2 of a ResNet-50 is the 3x3 convolution of its first
    bottleneck, as in the official code of DCS. Shortcuts do not count either.
    """
    names = []
    for name in backbone.main_path_convolutions():
        module = get_module(backbone, name)
        if isinstance(module, nn.Conv2d) and max(module.kernel_size) > 1:
            names.append(name)
    return names


def convolutions_at(backbone: Backbone, positions: Sequence[int]) -> list[str]:
    """Return the names of the convolutions at 1-based `positions`.

    Raises:
        UserError: a position does not exist or is given twice; the message lists the possible ones.
    """
    names = spatial_convolutions(backbone)
    for position in positions:
        if not 1 <= position <= len(names):
            raise UserError(
                f"position {position} does not exist: {type(backbone).__name__} has {len(names)} spatial convolutions on its main path, "
                f"numbered from 1 ({', '.join(f'{index} {name}' for index, name in enumerate(names[:6], start=1))}"
                f"{', ...' if len(names) > 6 else ''})"
            )
        if list(positions).count(position) > 1:
            raise UserError(f"position {position} is given twice")
    return [names[position - 1] for position in positions]


def keeps_size_when_padded(conv: nn.Conv2d) -> bool:
    """Return whether the convolution pads by half its kernel, so that any odd kernel can take its place."""
    return (
        not isinstance(conv.padding, str)
        and conv.padding_mode == "zeros"
        and tuple(conv.dilation) == (1, 1)
        and all(2 * pad == size - 1 for pad, size in zip(conv.padding, conv.kernel_size, strict=True))
    )
