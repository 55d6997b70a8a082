"""Input normalization as the first layer of a model: models take pixels in [0,1]."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class InputNormalization(nn.Module):
    """Map pixels of [0,1] to (x - mean) / std per channel.

    Args:
        mean: C channel means of pixels in [0,1].
        std: C channel standard deviations, all positive.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or min(std) <= 0:
            raise ValueError(f"mean {tuple(mean)} and std {tuple(std)} must have one entry per channel, std positive")
        # Constants of the model, written to config.json, hence not in the state dict.
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("inverse_std", 1 / torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return (x_BCHW - self.mean) * self.inverse_std
