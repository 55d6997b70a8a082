"""The sampled form of a deformable convolution is torchvision's operator: values and gradients, in float64, for generated geometries."""

from __future__ import annotations

import itertools

import pytest
import torch
from torchvision.ops import deform_conv2d

from models.layers.deformable_convolution import sampled_convolution

CASES = [
    (size, kernel, stride, padding, dilation, groups)
    for size, kernel, stride, padding, dilation, groups in itertools.product(
        ((1, 1), (7, 5), (8, 8)), ((3, 3), (5, 3)), ((1, 1), (2, 1)), ((1, 1), (2, 3)), ((1, 1), (1, 2)), (1, 2)
    )
    if all(size[axis] + 2 * padding[axis] > dilation[axis] * (kernel[axis] - 1) for axis in range(2))
]


@pytest.mark.parametrize(("size", "kernel", "stride", "padding", "dilation", "groups"), CASES)
def test_it_is_torchvisions_operator(size, kernel, stride, padding, dilation, groups):
    generator = torch.Generator().manual_seed(hash((size, kernel, stride, padding, dilation, groups)) % 2**31)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    x, weight, bias = random(2, 4, *size), random(6, 4 // groups, *kernel), random(6)
    outputs = [(size[axis] + 2 * padding[axis] - dilation[axis] * (kernel[axis] - 1) - 1) // stride[axis] + 1 for axis in range(2)]
    offset = (3 * random(2, 2 * kernel[0] * kernel[1], *outputs)).detach().requires_grad_()
    inputs = (x, offset, weight, bias)
    expected = deform_conv2d(*inputs, stride, padding, dilation)
    found = sampled_convolution(
        x.to(memory_format=torch.channels_last), offset, weight.to(memory_format=torch.channels_last), bias, stride, padding, dilation
    )
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    cotangent = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(
        torch.autograd.grad(found, inputs, cotangent), torch.autograd.grad(expected, inputs, cotangent), rtol=1e-8, atol=1e-8
    )
