"""Deformable convolution whose offsets are computed from the input: deterministic, the baseline of DCS.

Shapes: B batch, C input channels, O output channels, H and W pixels, k kernel size.
Reference: Dai et al., "Deformable Convolutional Networks", ICCV 2017, section 2.1; on GPUs by torchvision's operator.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class DeformableConv2d(nn.Module):
    """A convolution that samples its k*k taps at learned offsets, which a second convolution computes from the input.

    The offsets start at zero: with the weight of a plain convolution it then computes the same. Its sampling can be
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
        # No operator has a half-precision form on the CPU, and bf16 loses the subpixel part of an offset.
        with torch.autocast(x_BCHW.device.type, enabled=False):
            image, offset = x_BCHW.to(self.weight.dtype), offset.to(self.weight.dtype)
            geometry: tuple[Any, ...] = (self.stride, self.padding, self.dilation)
            if x_BCHW.device.type == "cuda":
                from torchvision.ops import deform_conv2d  # here: its import would double the time that a command takes to start

                return deform_conv2d(image, offset, self.weight, self.bias, *geometry).to(x_BCHW.dtype)
            return sampled_convolution(image, offset, self.weight, self.bias, *geometry).to(x_BCHW.dtype)


def sampled_convolution(
    x_BCHW: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> Tensor:
    """Return what `torchvision.ops.deform_conv2d` does, by bilinear samples of the image and one matrix product.

    On a CPU torchvision's operator takes seven times as long (`benchmarks.layers`). Here too gradients can be taken once only.

    Args:
        x_BCHW: float. offset: (B, 2 * k * k, H', W'), for each tap how far down and how far right it looks beside its place.
        weight: (O, C / groups, k, k). bias: (O,) or None.
    """
    (batch, channels, height, width), (rows, columns) = x_BCHW.shape, offset.shape[-2:]
    filters, channels_of_group, *kernel = weight.shape
    offset = offset.unflatten(1, (-1, 2))
    places = []
    for axis, (size, outputs) in enumerate(((height, rows), (width, columns))):
        along = torch.arange(outputs, dtype=offset.dtype, device=offset.device) * stride[axis] - padding[axis]
        taps = torch.arange(kernel[axis], dtype=offset.dtype, device=offset.device) * dilation[axis]
        grid = taps.view(-1, 1, 1, 1) if axis == 0 else taps.view(1, -1, 1, 1)
        grid = grid + (along[:, None] if axis == 0 else along)
        regular = grid.expand(kernel[0], kernel[1], rows, columns).flatten(0, 1)
        # Pixel centres in the coordinates of `grid_sample`, whose image reaches from -1 to 1.
        places.append((2 * (regular + offset[:, :, axis]) + 1) / size - 1)
    grid_BTHW2 = torch.stack(places[::-1], dim=-1)
    samples = functional.grid_sample(x_BCHW, grid_BTHW2.flatten(1, 2), mode="bilinear", padding_mode="zeros", align_corners=False)
    groups = channels // channels_of_group
    samples = samples.reshape(batch, groups, channels_of_group * kernel[0] * kernel[1], rows * columns)
    out = (weight.reshape(groups, filters // groups, -1) @ samples).view(batch, filters, rows, columns)
    return out if bias is None else out + bias[:, None, None]
