"""Where in a backbone a random layer goes. There are two numberings, which count different things:

- a **tap**, from 0: places between layers, 0 on the image, 1 after the stem, then before each stage, last before the pooling (CTRW);
- a **convolution**, from 1: spatial convolutions of the main path, 1 the stem, 2 the next, and so on (DCS, DCN).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import AfterValidator, Field
from torch import nn

from models.backbones.base import Backbone
from models.errors import UserError
from models.layer_replacement import get_module
from models.modes import probed


def _each_once(positions: tuple[int, ...]) -> tuple[int, ...]:
    twice = next((position for position in positions if positions.count(position) > 1), None)
    if twice is not None:
        raise ValueError(f"position {twice} is given twice")
    return positions


Positions = Annotated[tuple[Annotated[int, Field(ge=1, le=1000)], ...], AfterValidator(_each_once)]
"""Numbers of convolutions, each once; whether a backbone has so many is known when it is built."""


def tap(backbone: Backbone, position: int) -> str:
    """Return the key of the tap at the 0-based `position`; an impossible one is a `UserError` that lists the possible ones."""
    key = str(position)
    if key not in backbone.taps:
        positions = ", ".join(backbone.taps)
        raise UserError(f"position {position} does not exist in {type(backbone).__name__}; it has positions {positions}")
    return key


def nearest_tap(backbone: Backbone, position: int) -> int:
    """Return a 0-based position, moved to the backbone's last tap if it lies beyond."""
    return min(position, len(backbone.taps) - 1)


def convolution_after_tap(backbone: Backbone, position: int, image_shape: tuple[int, int, int]) -> str:
    """Return the dotted name of the first main-path convolution that runs after the tap at `position`.

    Raises:
        UserError: no convolution follows (the last position).
    """
    key = tap(backbone, position)
    order: list[str] = []
    watched_names = set(backbone.main_path_convolutions())
    watched = {f"taps.{name}": module for name, module in backbone.taps.items()}
    watched |= {name: get_module(backbone, name) for name in watched_names}
    handles = [module.register_forward_pre_hook(lambda _module, _inputs, name=name: order.append(name)) for name, module in watched.items()]
    with probed(backbone, image_shape) as x_BCHW:
        backbone(x_BCHW)
    for handle in handles:
        handle.remove()
    following = [name for name in order[order.index(f"taps.{key}") :] if name in watched_names]
    if not following:
        raise UserError(f"no convolution follows position {position}: only variant `in` is possible there")
    return following[0]


def output_shape(backbone: Backbone, name: str, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """Return (C, H, W) of what the module called `name` puts out for one image of `image_shape`."""
    shapes: list[torch.Size] = []
    handle = get_module(backbone, name).register_forward_hook(lambda _module, _inputs, output: shapes.append(output.shape[1:]))
    with probed(backbone, image_shape) as x_BCHW:
        backbone(x_BCHW)
    handle.remove()
    channels, height, width = shapes[0]
    return channels, height, width


def spatial_convolutions(backbone: Backbone) -> list[str]:
    """Return the dotted names of the main path's convolutions with a kernel larger than 1x1, in forward order.

    Convolutions of 1x1 see no neighbourhood, so they do not count: number 2 of a ResNet-50 is the 3x3 convolution of its first
    bottleneck, as in the official code of DCS. Shortcuts do not count either.
    """
    return backbone.spatial_convolutions()


def convolutions(backbone: Backbone, positions: Sequence[int]) -> list[str]:
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


def nearest_convolutions(backbone: Backbone, positions: Sequence[int]) -> tuple[int, ...]:
    """Return 1-based positions with those beyond the backbone's convolutions moved to its last one, each once."""
    last = len(spatial_convolutions(backbone))
    return tuple(dict.fromkeys(min(position, last) for position in positions))


def keeps_size_when_padded(conv: nn.Conv2d) -> bool:
    """Return whether the convolution pads by half its kernel, so that any odd kernel can take its place."""
    return (
        not isinstance(conv.padding, str)
        and conv.padding_mode == "zeros"
        and tuple(conv.dilation) == (1, 1)
        and all(2 * pad == size - 1 for pad, size in zip(conv.padding, conv.kernel_size, strict=True))
    )
