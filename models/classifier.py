"""A network with its input normalization inside, and the record of how it was built."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from models.backbones.base import Backbone
from models.configuration import Config
from models.errors import UserError

MOST_CLASSES = 100_000
LARGEST_SIDE = 4096
MOST_PIXELS = 2**24
"""Of one image, all channels together. A configuration that asks for more is broken, and must not allocate memory first."""


class ModelSpec(Config):
    """Everything needed to build a model again: what `config.json` of an export holds."""

    defence: str = Field(description="Name of the defence, e.g. `ctrw`.")
    defence_parameters: dict[str, Any] = Field(default_factory=dict, description="Its parameters, JSON types.")
    backbone: str = Field(description="Name of the backbone, e.g. `resnet18`.")
    backbone_options: dict[str, Any] = Field(default_factory=dict, description="Its options, e.g. the stem.")
    num_classes: int = Field(ge=2, le=MOST_CLASSES, description="K, number of classes.")
    image_shape: tuple[int, int, int] = Field(description="(C, H, W) of the input.")
    mean: tuple[float, ...] = Field(description="Channel means of pixels in [0,1], subtracted first.")
    std: tuple[float, ...] = Field(description="Channel standard deviations of pixels in [0,1].")

    @model_validator(mode="after")
    def _sizes_fit(self) -> ModelSpec:
        channels, height, width = self.image_shape
        if min(self.image_shape) < 1 or max(height, width) > LARGEST_SIDE or channels * height * width > MOST_PIXELS:
            raise ValueError(f"image_shape {self.image_shape}: sides are 1 to {LARGEST_SIDE}, and C x H x W at most {MOST_PIXELS:,}")
        if not len(self.mean) == len(self.std) == channels:
            raise ValueError(f"mean {self.mean} and std {self.std} must have one entry for each of the {channels} channels")
        if min(self.std) <= 0:
            raise ValueError(f"std {self.std} must be positive")
        return self


class InputNormalization(nn.Module):
    """Map pixels of [0,1] to (x - mean) / std per channel.

    Args:
        mean: C channel means of pixels in [0,1].
        std: C channel standard deviations, all positive.
    """

    mean: Tensor
    inverse_std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or min(std) <= 0:
            raise ValueError(f"mean {tuple(mean)} and std {tuple(std)} must have one entry per channel, std positive")
        # Constants of the model, written to config.json, hence not in the state dict.
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("inverse_std", 1 / torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return (x_BCHW - self.mean) * self.inverse_std


class Classifier(nn.Module):
    """Input normalization and a backbone. Takes pixels in [0,1] of shape (B, C, H, W), returns logits of shape (B, K).

    Args:
        normalization, backbone: its parts.
        image_shape: (C, H, W) of the images; others are a `UserError`. None: whatever the backbone takes.
    """

    spec: ModelSpec | None = None

    def __init__(self, normalization: InputNormalization, backbone: Backbone, image_shape: tuple[int, int, int] | None = None) -> None:
        super().__init__()
        self.image_shape = None if image_shape is None else torch.Size(image_shape)
        self.normalization = normalization
        self.backbone = backbone

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.backbone(self._normalized(x_BCHW))

    def forward_features(self, x_BCHW: Tensor) -> Tensor:
        """Return the pooled features (B, D) in front of the last linear layer."""
        return self.backbone.forward_features(self._normalized(x_BCHW))

    def _normalized(self, x_BCHW: Tensor) -> Tensor:
        # Without this, one channel or one pixel would be broadcast to a whole image and answered.
        if self.image_shape is not None and x_BCHW.shape[1:] != self.image_shape:
            expected = ", ".join(map(str, self.image_shape))
            raise UserError(f"images have shape {tuple(x_BCHW.shape)}; this model takes (B, {expected})")
        return self.normalization(x_BCHW)
