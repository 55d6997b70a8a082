"""DCS: a convolution that keeps n of its k*k taps per draw, and GSAT, which trains on taps that the attack did not use.

Reference: Ma, Huang, Dong, You, Xu, "Adversarial Robustness via Deformable Convolution with Stochasticity", ICML 2025.
Deviation: one mask for all pixels of a draw, as in the official code; the paper's K_l reads as one mask per location.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator
from torch import nn

from models.backbones.base import Backbone, ImageShape
from models.configuration import Config
from models.errors import UserError
from models.layer_replacement import plain_convolution, replace_named
from models.layers.stochastic_convolution import StochasticConv2d
from models.layers.tap_masks import TapMaskSpace
from models.positions import Positions, convolutions, keeps_size_when_padded, nearest_convolutions
from models.randomness import DrawScope
from models.registry import DefenceModel


class DcsConfig(Config):
    """Parameters of DCS. The defaults are the paper's: k=5, n=2, GSAT, second convolution."""

    kernel_size: int = Field(5, ge=1, le=31, description="k: side of the full kernel, odd.")
    num_taps: int = Field(2, ge=1, description="n: taps kept per draw, at most k*k.")
    gsat: Literal["off", "attack", "chain"] = Field(
        "attack",
        description="Gradient-selective adversarial training: `attack` draws the training step's taps from those that the attack did not "
        "use, `chain` also the next attack's from those that the training step did not use (official code), `off` draws independently. "
        "Evaluation draws are always independent.",
    )
    sampling: Literal["uniform", "stratified2"] = Field(
        "uniform",
        description="`uniform`: every set of n taps; `stratified2`: one tap in each of the first n of the four parity classes of row and "
        'column (the paper\'s "cancel X^u", as the official code has it for n = 1, 3, 4; n = 2 is our reading).',
    )
    positions: Positions = Field(
        (2,),
        min_length=1,
        description="Which spatial convolutions of the main path become random, counted from 1, the stem. Those of a ViT are in its "
        "convolutional stem.",
    )
    initialization: Literal["fresh", "centred"] = Field(
        "fresh",
        description="`fresh`: new weights for the whole kernel; `centred`: the replaced convolution's weights in the middle, zeros around "
        "(for pretrained backbones). The official code begins with new ones.",
    )
    draw_scope: DrawScope = Field(
        "global",
        description="Who shares a draw: all ranks (`global`, official code), a rank's batch (`per_rank`), nobody (`per_example`).",
    )

    @field_validator("kernel_size")
    @classmethod
    def _kernel_is_odd(cls, kernel_size: int) -> int:
        if kernel_size % 2 == 0:
            raise ValueError(f"k must be odd, so that the kernel has a middle; nearest: {kernel_size - 1}, {kernel_size + 1}")
        return kernel_size

    @model_validator(mode="after")
    def _masks_exist(self) -> DcsConfig:
        space = TapMaskSpace(self.kernel_size, self.num_taps, self.sampling)
        if self.gsat != "off":
            space.check_disjoint()
        if self.gsat == "chain" and self.draw_scope == "per_example":
            raise ValueError("gsat `chain` needs a mask that the batch shares; draw_scope `per_example` works with `attack`")
        return self

    @property
    def revision(self) -> int:
        """1 where `stratified2` used to draw the classes at random."""
        return int(self.sampling == "stratified2" and self.num_taps < 4)


PRESETS: dict[str, dict] = {
    "official": {"kernel_size": 5, "num_taps": 2, "gsat": "chain", "positions": (2,)},
    "common": {"kernel_size": 5, "num_taps": 2, "gsat": "attack", "positions": (2,)},
}
"""Parameters by source: the official code, the fair comparison."""


def add_stochastic_convolutions(backbone: Backbone, config: DcsConfig, image_shape: ImageShape) -> None:
    """Replace the convolutions at the configured positions, in place.

    Raises:
        UserError: a position does not exist, its convolution is not a plain one that is padded by half its kernel, or the kernel is larger
            than the image.
    """
    side = min(image_shape[1:])
    if config.kernel_size > side:
        largest = side - 1 + side % 2
        raise UserError(f"defence.kernel_size {config.kernel_size} is larger than the image ({side} pixels); at most {largest}")

    def stochastic(name: str, module: nn.Module) -> nn.Module:
        conv = plain_convolution(name, module)
        if not keeps_size_when_padded(conv):
            raise UserError(
                f"convolution {name} has kernel {conv.kernel_size}, padding {conv.padding} and dilation {conv.dilation}: "
                "no kernel of another size can take its place"
            )
        new = StochasticConv2d(
            conv.in_channels,
            conv.out_channels,
            config.kernel_size,
            config.num_taps,
            stride=(conv.stride[0], conv.stride[1]),
            groups=conv.groups,
            bias=conv.bias is not None,
            sampling=config.sampling,
            gsat=config.gsat,
            draw_scope=config.draw_scope,
        )
        if config.initialization == "centred":
            new.embed(conv)
        return new

    replace_named(backbone, convolutions(backbone, config.positions), stochastic)


def fit(config: DcsConfig, backbone: Backbone) -> DcsConfig:
    """Return the parameters with positions that the backbone has."""
    return config.changed(positions=nearest_convolutions(backbone, config.positions))


DEFENCE_MODELS = (
    DefenceModel(
        "dcs",
        "deformable convolution with stochasticity: n of k*k taps per draw, with GSAT",
        DcsConfig,
        add_stochastic_convolutions,
        fit=fit,
        presets=PRESETS,
    ),
)
