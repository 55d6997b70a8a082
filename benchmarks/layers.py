"""Implementations of the random layers against each other, forward and input gradient, in one run.

    python -m benchmarks.layers

The figures behind `StochasticConv2d._cheapest` and behind the two implementations of `RandomNormalization2d`. Each draw of a
stochastic convolution is timed in every implementation; medians over draws. Also the two forms of a deformable convolution.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

from benchmarks.timing import Timing, describe_hardware, hardware, interleaved
from models.layers.deformable_convolution import sampled_convolution
from models.layers.random_normalization import RandomNormalization2d
from models.layers.stochastic_convolution import StochasticConv2d
from models.randomness import resample

ROUNDS = 11
CONVOLUTIONS = [  # input channels, output channels, pixels, stride, k, n
    (64, 64, 32, 1, 3, 2),
    (64, 64, 32, 1, 3, 4),
    (64, 64, 32, 1, 5, 2),
    (64, 64, 32, 1, 5, 4),
    (64, 128, 32, 2, 5, 2),
    (16, 160, 32, 1, 5, 2),
]
MAPS = [(16, 32), (64, 32), (256, 8)]  # channels, pixels


def input_gradient(layer: nn.Module, x: Tensor) -> Callable[[], object]:
    """Return a function that runs the layer forward and backward to its input."""
    upstream = torch.ones_like(layer(x))
    return lambda: torch.autograd.grad(layer(x), x, upstream)


def channels_last_maps(channels: int, pixels: int) -> Tensor:
    """Return a batch of 16 maps that require a gradient."""
    return torch.randn(16, channels, pixels, pixels).to(memory_format=torch.channels_last).requires_grad_()


def measure_convolution(shape: tuple[int, ...]) -> dict[str, Timing]:
    """Time every implementation; all of them move on to the same new mask at each round."""
    channels, out_channels, pixels, stride, k, n = shape
    x = channels_last_maps(channels, pixels)
    dense = nn.Conv2d(channels, out_channels, k, stride, k // 2, bias=False).to(memory_format=torch.channels_last)
    variants: dict[str, Any] = {f"dense {k}x{k}": input_gradient(dense, x)}
    for name in ("masked", "crop", "gather", "auto"):
        site = StochasticConv2d(channels, out_channels, k, n, (stride, stride)).to(memory_format=torch.channels_last)
        site.implementation = name

        variants[name] = _with_next_mask(site, x)
    return interleaved(variants, ROUNDS)


def _with_next_mask(site: StochasticConv2d, x: Tensor) -> Callable[[], None]:
    run = input_gradient(site, x)

    def step() -> None:
        resample(site)
        run()

    return step


def measure_normalization(channels: int, pixels: int) -> dict[str, Timing]:
    """Time BatchNorm2d and both implementations for each choice, in training mode."""
    x = channels_last_maps(channels, pixels)
    variants: dict[str, Any] = {"nn.BatchNorm2d": input_gradient(nn.BatchNorm2d(channels), x)}
    for implementation in ("selected", "one_formula"):
        for index, choice in enumerate(("bn", "in")):
            site = RandomNormalization2d(channels, ("bn", "in"))
            site.implementation = implementation
            site.set_configuration(index)
            variants[f"{choice} {implementation}"] = input_gradient(site, x)
    return interleaved(variants, ROUNDS)


def measure_deformable(channels: int, pixels: int, k: int = 5) -> dict[str, Timing]:
    """Time both forms of a deformable convolution, gradients of image, offsets and weight included."""
    x = torch.randn(16, channels, pixels, pixels)
    offset, weight = torch.randn(16, 2 * k * k, pixels, pixels), torch.randn(channels, channels, k, k)
    inputs = [each.requires_grad_() for each in (x, offset, weight)]
    upstream = torch.ones_like(x)
    geometry = ((1, 1), (k // 2, k // 2), (1, 1))

    def step_of(operator: Callable[..., Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(operator(*inputs, None, *geometry), inputs, upstream)

    return interleaved({"sampled": step_of(sampled_convolution), "torchvision's": step_of(deform_conv2d)}, ROUNDS)


def _line(timings: dict[str, Timing]) -> str:
    return ", ".join(f"{name} {timing.median:.2f}" for name, timing in timings.items())


def main() -> int:
    """Print the tables."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(describe_hardware(hardware()))
    print("stochastic convolution, batch 16, forward and input gradient, median CPU ms")
    for shape in CONVOLUTIONS:
        channels, out_channels, pixels, stride, k, n = shape
        print(f"  {channels}->{out_channels}, {pixels}x{pixels}, stride {stride}, k={k}, n={n}: {_line(measure_convolution(shape))}")
    print("normalization, batch 16")
    for channels, pixels in MAPS:
        print(f"  {channels} channels, {pixels}x{pixels}: {_line(measure_normalization(channels, pixels))}")
    print("deformable convolution, batch 16, k=5, all gradients")
    for channels, pixels in MAPS[:2]:
        print(f"  {channels} channels, {pixels}x{pixels}: {_line(measure_deformable(channels, pixels))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
