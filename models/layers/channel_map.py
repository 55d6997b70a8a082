"""Affine maps y * scale + shift of the channels: what batch normalization is in eval mode, and what a convolution can take over.

A layer says what it is by having the method, so that nobody has to know it by its class. Shapes: O output channels.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn


@runtime_checkable
class GivesChannelMap(Protocol):
    """A layer that may be an affine map of its channels."""

    def channel_map(self) -> tuple[Tensor, Tensor] | None:
        """Return scale and shift, both (O,) in float64; None: the layer as it is now (its mode, its statistics) is no such map."""


@runtime_checkable
class TakesChannelMap(Protocol):
    """A convolution that can take over an affine map of its output channels."""

    def take_channel_map(self, scale_O: Tensor, shift_O: Tensor) -> None:
        """Become, in place and for every draw, the layer that was, followed by y * scale_O + shift_O; both in float64."""


def batch_norm_map(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor] | None:
    """Return the map that a plain batch normalization is in eval mode, as `GivesChannelMap` has it."""
    if norm.training or norm.running_mean is None or norm.running_var is None:
        return None
    with torch.no_grad():
        scale_O = torch.rsqrt(norm.running_var.double() + norm.eps)
        if norm.weight is not None:
            scale_O = scale_O * norm.weight.double()
        shift_O = -norm.running_mean.double() * scale_O
        if norm.bias is not None:
            shift_O = shift_O + norm.bias.double()
    return scale_O, shift_O


@torch.no_grad()
def scale_filters(filters: tuple[Tensor, ...], bias: Tensor | None, scale_O: Tensor, shift_O: Tensor) -> nn.Parameter:
    """Scale `filters` (O, C, k, k) of a convolution in place, and return its bias (O,) after the map."""
    for filter_OCkk in filters:
        filter_OCkk.copy_(filter_OCkk.double() * scale_O.view(-1, 1, 1, 1))
    if bias is not None:
        shift_O = shift_O + bias.double() * scale_O
    return nn.Parameter(shift_O.to(filters[0].dtype), requires_grad=False)
