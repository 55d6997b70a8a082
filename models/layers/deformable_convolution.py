"""Deformable convolution whose offsets are computed from the input: deterministic, the baseline of DCS.

Shapes: B batch, C input channels, O output channels, H and W pixels, k kernel size.
Reference: Dai et al., "Deformable Convolutional Networks", ICCV 2017, section 2.1, by torchvision's operator.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class DeformableConv2d(nn.Module):
    """A convolution that samples its k*k taps at learned offsets, which a second convolution computes from the input.

    The offsets start at zero: with the weight of a plain convolution it then computes the same. torchvision's operator can be
    differentiated once only, so methods that need second derivatives of the network do not work with it.

    Args:
        conv: the convolution to take the place of; its weight, bias, stride, padding, dilation and groups are kept.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        height, width = conv.kernel_size
        self.weight, self.bias = conv.weight, conv.bias
        self.stride, self.padding, self.dilation = conv.stride, conv.padding, conv.dilation
        # The two-dimensional layer's settings are pairs of numbers; its annotations say tuples of any length.
        geometry: dict[str, Any] = {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation}
        self.offset = nn.Conv2d(conv.in_channels, 2 * height * width, (height, width), **geometry)
        for parameter in self.offset.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        offset = self.offset(x_BCHW)
        # The operator has no half-precision form on the CPU and loses the subpixel part of an offset in bf16.
        with torch.autocast(x_BCHW.device.type, enabled=False):
            from torchvision.ops import deform_conv2d  # here: its import would double the time that a command takes to start

            return deform_conv2d(
                x_BCHW.to(self.weight.dtype),
                offset.to(self.weight.dtype),
                self.weight,
                self.bias,
                self.stride,
                self.padding,
                self.dilation,
            ).to(x_BCHW.dtype)
