"""RNA: random normalization aggregation; every layer draws one of several normalizations.

Reference: Dong, Chen, Wang, Xu, "Random Normalization Aggregation for Adversarial Defense", NeurIPS 2022.
Deviation: unchosen affine parameters get no gradient in eager mode, so an optimizer leaves them alone; the official code, written for
PyTorch 1.7, moves them by weight decay and momentum. `training.optimizer.gradients_when_unused: zero` does the same.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator
from torch import nn

from models.backbones.base import Backbone, ImageShape
from models.configuration import Config
from models.layer_replacement import replace_named
from models.layers.random_normalization import RandomNormalization2d, check_pool
from models.normalization_layers import fitting_kinds, replaceable_normalizations
from models.randomness import DrawScope
from models.registry import DefenceModel


class RnaConfig(Config):
    """Parameters of RNA. The defaults are the paper's for CIFAR."""

    pool: tuple[str, ...] = Field(
        ("bn", "in"),
        description="The n normalizations to choose from: `bn`, `in`, `ln`, `gn_groups_G`, `gn_size_S`, `bgn_groups_G`, `bgn_size_S` "
        "with G groups or S channels per group. Each has affine parameters of its own.",
    )
    choice: Literal["per_layer", "per_network"] = Field(
        "per_layer",
        description="`per_layer`: each layer chooses for itself, n**L paths (the paper); `per_network`: one for all layers, n paths.",
    )
    last_normalization: Literal["plain", "random"] = Field(
        "plain",
        description="The normalization after the last block of pre-activation networks (WRN, PreActResNet): `plain` keeps BatchNorm "
        "(official code).",
    )
    draw_scope: DrawScope = Field(
        "global",
        description="Who shares a draw: all ranks (`global`, official code), a rank's batch (`per_rank`), nobody (`per_example`).",
    )

    @field_validator("pool")
    @classmethod
    def _pool_is_known(cls, pool: tuple[str, ...]) -> tuple[str, ...]:
        return check_pool(pool)


PRESETS: dict[str, dict] = {"official": {"pool": ("bn", "gn_size_1"), "choice": "per_layer", "last_normalization": "plain"}}
"""Parameters by source: the official code."""


def add_random_normalizations(backbone: Backbone, config: RnaConfig, image_shape: ImageShape) -> None:
    """Replace the BatchNorm layers of `backbone` by random normalizations, in place.

    Every type starts from the affine parameters of the layer that it replaces, `bn` also from its running statistics.

    Raises:
        UserError: see `replaceable_normalizations`.
    """
    last: Literal["plain", "replaced"] = "plain" if config.last_normalization == "plain" else "replaced"
    names = replaceable_normalizations(backbone, image_shape, config.pool, last)

    def random_normalization(name: str, old: nn.Module) -> nn.Module:
        assert isinstance(old, nn.BatchNorm2d)
        assert old.momentum is not None
        new = RandomNormalization2d(
            old.num_features,
            config.pool,
            eps=old.eps,
            momentum=old.momentum,
            draw_scope=config.draw_scope,
            stream_name="rna" if config.choice == "per_network" else None,
        )
        for kind in new.pool:
            new.branches[kind].copy_from(old)
        return new

    replace_named(backbone, names, random_normalization)


def fit(config: RnaConfig, backbone: Backbone) -> RnaConfig:
    """Return the parameters with those normalizations that the backbone's layers can have."""
    return config.changed(pool=fitting_kinds(backbone, config.pool))


DEFENCE_MODELS = (
    DefenceModel(
        "rna",
        "random normalization aggregation: each layer draws one of several normalizations",
        RnaConfig,
        add_random_normalizations,
        fit=fit,
        presets=PRESETS,
    ),
)
