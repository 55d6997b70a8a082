"""One normalization in place of BatchNorm, nothing random: the baselines of the RNA paper (Tables 1 and 2).

Reference: Dong, Chen, Wang, Xu, "Random Normalization Aggregation for Adversarial Defense", NeurIPS 2022.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator
from torch import nn

from models.backbones.base import Backbone, ImageShape
from models.configuration import Config
from models.layer_replacement import replace_named
from models.layers.channel_statistics import Normalization2d, NormalizationType, parse_normalization
from models.normalization_layers import replaceable_normalizations
from models.registry import DefenceModel


class SingleNormalizationConfig(Config):
    """Parameters of the single-normalization baselines. The defaults of the groups are the paper's GN32 and BGN32."""

    normalization: Literal["bn", "bgn", "in", "gn", "ln"] = Field(
        "bn",
        description="`bn` BatchNorm, `bgn` BatchNorm over groups of channels, `in` InstanceNorm without affine parameters (as in the "
        "official code's baseline), `gn` GroupNorm, `ln` LayerNorm over (C, H, W).",
    )
    num_groups: int | None = Field(
        None, ge=1, le=4096, description="Number of groups of `gn` and `bgn`; none: 32, unless group_size is given."
    )
    group_size: int | None = Field(None, ge=1, le=4096, description="Channels per group of `gn` and `bgn`, instead of num_groups.")

    last_normalization: Literal["plain", "replaced"] = Field(
        "plain",
        description="The normalization after the last block of pre-activation networks (WRN, PreActResNet): `plain` keeps BatchNorm "
        "(official code, for every type).",
    )

    @model_validator(mode="after")
    def _groups_fit_the_normalization(self) -> SingleNormalizationConfig:
        if self.num_groups is not None and self.group_size is not None:
            raise ValueError("give num_groups or group_size, not both")
        if self.normalization not in ("gn", "bgn") and (self.num_groups or self.group_size):
            raise ValueError(f"normalization {self.normalization!r} has no choice of groups; `gn` and `bgn` have")
        return self

    @classmethod
    def stored_earlier(cls, parameters: dict[str, Any]) -> dict[str, Any]:
        """Return the parameters; networks of before `last_normalization` had all normalizations replaced."""
        return {"last_normalization": "replaced"} | parameters

    @property
    def revision(self) -> int:
        """1 where the last normalization of pre-activation networks used to be replaced with the others."""
        return int(self.normalization != "bn" and self.last_normalization == "plain")

    def kind(self) -> NormalizationType:
        """Return the normalization."""
        if self.normalization not in ("gn", "bgn"):
            return parse_normalization(self.normalization)
        if self.group_size is not None:
            return parse_normalization(f"{self.normalization}_size_{self.group_size}")
        return parse_normalization(f"{self.normalization}_groups_{self.num_groups or 32}")


def replace_normalizations(backbone: Backbone, config: SingleNormalizationConfig, image_shape: ImageShape) -> None:
    """Replace the BatchNorm layers of `backbone` by the configured normalization, in place.

    Raises:
        UserError: see `replaceable_normalizations`.
    """
    kind = config.kind()
    kinds = () if config.normalization == "bn" else (kind.name,)
    names = replaceable_normalizations(backbone, image_shape, kinds, config.last_normalization)
    if not kinds:
        return

    def normalization(_name: str, old: nn.Module) -> nn.Module:
        assert isinstance(old, nn.BatchNorm2d)
        assert old.momentum is not None
        new = Normalization2d(old.num_features, kind, old.eps, old.momentum, affine=config.normalization != "in")
        new.copy_from(old)
        return new

    replace_named(backbone, names, normalization)


DEFENCE_MODELS = (
    DefenceModel(
        "single_normalization",
        "one normalization (BN, BGN, IN, GN or LN) in place of BatchNorm, adversarially trained: baselines of RNA",
        SingleNormalizationConfig,
        replace_normalizations,
    ),
)
