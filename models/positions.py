"""Where in a backbone a random layer goes: positions are the backbone's taps, numbered from the image to the last features."""

from __future__ import annotations

import torch
from torch import nn

from models.backbones.base import Backbone
from models.errors import UserError
from models.layer_replacement import get_module


def check_position(backbone: Backbone, position: int) -> str:
    """Return the tap's key for `position`; an impossible one is a `UserError` that lists the possible ones."""
    key = str(position)
    if key not in backbone.taps:
        positions = ", ".join(backbone.taps)
        raise UserError(f"position {position} does not exist in {type(backbone).__name__}; it has positions {positions}")
    return key


def convolution_after(backbone: Backbone, position: int, image_shape: tuple[int, int, int]) -> str:
    """Return the dotted name of the first main-path convolution that runs after a position.

    Raises:
        UserError: no convolution follows (the last position).
    """
    key = check_position(backbone, position)
    order: list[str] = []
    convolutions = set(backbone.main_path_convolutions())
    watched = {f"taps.{name}": tap for name, tap in backbone.taps.items()}
    watched |= {name: get_module(backbone, name) for name in convolutions}
    handles = [module.register_forward_pre_hook(lambda _module, _inputs, name=name: order.append(name)) for name, module in watched.items()]
    _probe(backbone, image_shape)
    for handle in handles:
        handle.remove()
    following = [name for name in order[order.index(f"taps.{key}") :] if name in convolutions]
    if not following:
        raise UserError(f"no convolution follows position {position}: only variant `in` is possible there")
    return following[0]


def output_shape(backbone: Backbone, name: str, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """Return (C, H, W) of what the module called `name` puts out for one image of `image_shape`."""
    shapes: list[torch.Size] = []
    handle = get_module(backbone, name).register_forward_hook(lambda _module, _inputs, output: shapes.append(output.shape[1:]))
    _probe(backbone, image_shape)
    handle.remove()
    channels, height, width = shapes[0]
    return channels, height, width


@torch.no_grad()
def _probe(backbone: nn.Module, image_shape: tuple[int, int, int]) -> None:
    """Run one image of zeros in eval mode, leaving modes and buffers as they were."""
    training = [(module, module.training) for module in backbone.modules()]
    like = next(backbone.parameters())
    backbone.eval()
    try:
        backbone(torch.zeros((1, *image_shape), device=like.device, dtype=like.dtype))
    finally:
        for module, was_training in training:
            module.training = was_training
