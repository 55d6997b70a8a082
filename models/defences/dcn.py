"""DCN: deformable convolution (version 1) at the position of DCS, nothing random: the baseline of the DCS paper (Table 1).

Reference: Dai et al., "Deformable Convolutional Networks", ICCV 2017; the DCS paper does not say which variant it compares with.
"""

from __future__ import annotations

from pydantic import Field
from torch import nn

from models.backbones.base import Backbone, ImageShape
from models.configuration import Config
from models.errors import UserError
from models.layer_replacement import plain_convolution, replace_named
from models.layers.deformable_convolution import DeformableConv2d
from models.positions import Positions, convolutions, nearest_convolutions
from models.registry import DefenceModel


class DcnConfig(Config):
    """Parameters of DCN."""

    positions: Positions = Field(
        (2,),
        min_length=1,
        description="Which spatial convolutions of the main path become deformable, counted from 1, the stem.",
    )


def add_deformable_convolutions(backbone: Backbone, config: DcnConfig, image_shape: ImageShape) -> None:
    """Replace the convolutions at the configured positions, in place; an impossible one is a `UserError`."""

    def deformable(name: str, module: nn.Module) -> nn.Module:
        conv = plain_convolution(name, module)
        if isinstance(conv.padding, str):
            raise UserError(f"convolution {name} pads by {conv.padding!r}; deformable ones take a number of pixels")
        return DeformableConv2d(conv)

    replace_named(backbone, convolutions(backbone, config.positions), deformable)


def fit(config: DcnConfig, backbone: Backbone) -> DcnConfig:
    """Return the parameters with positions that the backbone has."""
    return config.changed(positions=nearest_convolutions(backbone, config.positions))


DEFENCE_MODELS = (
    DefenceModel(
        "dcn",
        "deformable convolution with learned offsets, deterministic: baseline of DCS",
        DcnConfig,
        add_deformable_convolutions,
        fit=fit,
    ),
)
