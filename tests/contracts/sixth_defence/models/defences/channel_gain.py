"""A toy defence for tests: a random gain of each channel of the feature map behind the stem."""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor, nn

from models.backbones.base import Backbone, ImageShape
from models.configuration import Config
from models.positions import tap
from models.randomness import DrawScope, RandomModule
from models.registry import DefenceModel


class ChannelGainConfig(Config):
    """Parameters of the toy."""

    sigma: float = Field(0.2, ge=0, le=1, description="Standard deviation of the gains around 1.")
    position: int = Field(1, ge=0, description="The tap whose channels are scaled.")
    draw_scope: DrawScope = Field("global", description="Who shares a draw.")


class ChannelGain(RandomModule):
    """Multiply each channel of (B, C, H, W) with a gain drawn from N(1, sigma^2)."""

    gain_C: Tensor

    def __init__(self, num_channels: int, sigma: float, draw_scope: DrawScope) -> None:
        super().__init__(draw_scope)
        self.sigma = sigma
        self.register_draw("gain_C", torch.ones(num_channels))
        self.take_first_draw()

    @property
    def num_configurations(self) -> float:
        """A continuum, or the one network without randomness."""
        return math.inf if self.sigma > 0 else 1

    def draw(self, generator: torch.Generator) -> None:
        self.set_draw("gain_C", 1 + self.sigma * torch.randn(self.gain_C.shape, generator=generator))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return x_BCHW * self.gain_C.to(x_BCHW.dtype)[:, None, None]


def add_gain(backbone: Backbone, config: ChannelGainConfig, image_shape: ImageShape) -> None:
    """Put the gain at the tap."""
    key = tap(backbone, config.position)
    place: nn.Module = ChannelGain(backbone.feature_shapes(image_shape)[key][0], config.sigma, config.draw_scope)
    backbone.taps[key] = place


DEFENCE_MODELS = (DefenceModel("channel_gain", "a random gain of each channel", ChannelGainConfig, add_gain),)
