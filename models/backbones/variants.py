"""How published networks of one architecture differ: activation, padding of strided convolutions, what a shortcut sees.

Robust networks of DeepMind (Gowal et al. 2020, Rebuffi et al. 2021, and who builds on their code, as RobustBench's leaders do) have SiLU
and TensorFlow's padding: a convolution of stride 2 sees one more row below and column to the right instead of one on each side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from torch import nn

from models.errors import unknown_name

Activation = Literal["relu", "silu"]
Padding = Literal["symmetric", "same"]


def activation_of(name: Activation) -> nn.Module:
    """Return a new activation."""
    return nn.ReLU() if name == "relu" else nn.SiLU()


def padded_conv3x3(in_channels: int, channels: int, stride: int, padding: Padding) -> tuple[nn.Module, nn.Conv2d]:
    """Return what stands before a 3x3 convolution, and the convolution; its output has side / stride pixels on either padding."""
    if padding == "same" and stride == 2:
        return nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(in_channels, channels, 3, stride, bias=False)
    return nn.Identity(), nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)


def check_choice(option: str, value: str, allowed: object) -> None:
    """Raise a `UserError` with near names unless an option of a backbone has one of the values of a `Literal`."""
    names: Sequence[str] = get_args(allowed)
    if value not in names:
        raise unknown_name(option, str(value), names)
