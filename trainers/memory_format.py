"""The layout of image tensors in memory: channels last, which is faster for convolutions on CPUs and GPUs alike."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def channels_last(x: Tensor) -> Tensor:
    """Return x in channels-last layout if it has 4 dimensions, else as it is; values and shape stay the same."""
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def to_channels_last_(model: nn.Module) -> nn.Module:
    """Lay out the 4-dimensional parameters and buffers of `model` channels last, in place, and return it.

    Values, names, shapes and identities of the parameters stay the same: optimizers built before keep working.
    """
    return model.to(memory_format=torch.channels_last)
