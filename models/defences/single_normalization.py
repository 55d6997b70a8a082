"""One normalization in place of every BatchNorm, nothing random: the baselines of the RNA paper (Tables 1 and 2).

Reference: Dong, Chen, Wang, Xu, "Random Normalization Aggregation for Adversarial Defense", NeurIPS 2022.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator
from torch import nn

from models.backbones.base import Backbone, ImageShape
from models.configuration import Config
from models.errors import UserError
from models.layer_replacement import replace_named
from models.layers.channel_statistics import Normalization2d, NormalizationType, parse_normalization
from models.registry import DefenceModel


class SingleNormalizationConfig(Config):
    """Parameters of the single-normalization baselines. The defaults of the groups are the paper's GN32 and BGN32."""

    normalization: Literal["bn", "bgn", "in", "gn", "ln"] = Field(
        "bn",
        description="`bn` BatchNorm, `bgn` BatchNorm over groups of channels, `in` InstanceNorm without affine parameters (as in the "
        "official code's baseline), `gn` GroupNorm, `ln` LayerNorm over (C, H, W).",
    )
    num_groups: int | None = Field(None, ge=1, description="Number of groups of `gn` and `bgn`; none: 32, unless group_size is given.")
    group_size: int | None = Field(None, ge=1, description="Channels per group of `gn` and `bgn`, instead of num_groups.")

    @model_validator(mode="after")
    def _groups_fit_the_normalization(self) -> SingleNormalizationConfig:
        if self.num_groups is not None and self.group_size is not None:
            raise ValueError("give num_groups or group_size, not both")
        if self.normalization not in ("gn", "bgn") and (self.num_groups or self.group_size):
            raise ValueError(f"normalization {self.normalization!r} has no choice of groups; `gn` and `bgn` have")
        return self

    def kind(self) -> NormalizationType:
        """Return the normalization."""
        if self.normalization not in ("gn", "bgn"):
            return parse_normalization(self.normalization)
        if self.group_size is not None:
            return parse_normalization(f"{self.normalization}_size_{self.group_size}")
        return parse_normalization(f"{self.normalization}_groups_{self.num_groups or 32}")


PRESETS: dict[str, dict] = {
    "bn": {"normalization": "bn"},
    "bgn32": {"normalization": "bgn", "num_groups": 32},
    "in": {"normalization": "in"},
    "gn32": {"normalization": "gn", "num_groups": 32},
    "ln": {"normalization": "ln"},
}
"""The rows of the paper's Tables 1 and 2."""


def replace_normalizations(backbone: Backbone, config: SingleNormalizationConfig, image_shape: ImageShape) -> None:
    """Replace every BatchNorm of `backbone` by the configured normalization, in place.

    Raises:
        UserError: the backbone has no BatchNorm, or groups do not divide a layer's channels.
    """
    names = backbone.normalization_layers()
    if not names:
        raise UserError(f"{type(backbone).__name__} has no BatchNorm layer to replace by {config.normalization!r}")
    if config.normalization == "bn":
        return
    kind = config.kind()

    def normalization(name: str, old: nn.Module) -> nn.Module:
        assert isinstance(old, nn.BatchNorm2d)
        momentum = 0.1 if old.momentum is None else old.momentum
        try:
            new = Normalization2d(old.num_features, kind, old.eps, momentum, affine=config.normalization != "in")
        except UserError as error:
            raise UserError(f"layer {name}: {error}") from None
        new.copy_from(old)
        return new

    replace_named(backbone, names, normalization)


DEFENCE_MODELS = (
    DefenceModel(
        "single_normalization",
        "one normalization everywhere (BN, BGN, IN, GN or LN), adversarially trained: baselines of RNA",
        SingleNormalizationConfig,
        replace_normalizations,
        presets=PRESETS,
    ),
)
