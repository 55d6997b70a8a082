"""RNA: random normalization aggregation; every layer draws one of several normalizations.

Reference: Dong, Chen, Wang, Xu, "Random Normalization Aggregation for Adversarial Defense", NeurIPS 2022.
Deviation: unchosen affine parameters get no gradient in eager mode, so an optimizer leaves them alone; the official code, written for
PyTorch 1.7, moves them by weight decay and momentum. `training.optimizer.gradients_when_unused: zero` does the same.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator
from torch import Tensor, nn

from models.backbones.base import Backbone, ImageShape
from models.configuration import Config
from models.errors import UserError
from models.layer_replacement import get_module, replace_named
from models.layers.channel_statistics import Normalization2d
from models.layers.random_normalization import RandomNormalization2d, check_pool
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
        description="`per_layer`: each layer chooses for itself, n**L paths; `per_network`: one choice for all layers, n paths.",
    )
    last_normalization: Literal["plain", "random"] = Field(
        "plain",
        description="The normalization after the last block of pre-activation networks (WRN, PreActResNet): `plain` keeps BatchNorm "
        "(official code).",
    )
    draw_scope: DrawScope = Field(
        "global", description="Who shares a draw: all ranks (`global`), a rank's batch (`per_rank`), nobody (`per_example`)."
    )

    @field_validator("pool")
    @classmethod
    def _pool_is_known(cls, pool: tuple[str, ...]) -> tuple[str, ...]:
        return check_pool(pool)


PRESETS: dict[str, dict] = {
    "paper": {"pool": ("bn", "in"), "choice": "per_layer"},
    "official": {"pool": ("bn", "gn_size_1"), "choice": "per_layer", "last_normalization": "plain"},
    "common": {"pool": ("bn", "in"), "choice": "per_layer"},
    "imagenet": {"pool": ("bgn_size_1", "gn_size_1", "bgn_size_2", "gn_size_2"), "choice": "per_layer"},
}
"""Parameters by source: the paper's text, the official code, the fair comparison, the paper's ImageNet pool."""


def add_random_normalizations(backbone: Backbone, config: RnaConfig, image_shape: ImageShape) -> None:
    """Replace the BatchNorm layers of `backbone` by random normalizations, in place.

    Every type starts from the affine parameters of the layer that it replaces, `bn` also from its running statistics.

    Raises:
        UserError: the backbone has no BatchNorm, or groups do not divide a layer's channels.
    """
    names = backbone.normalization_layers()
    if config.last_normalization == "plain":
        final = final_normalization(backbone, image_shape)
        names = [name for name in names if name != final]
    if not names:
        raise UserError(f"{type(backbone).__name__} has no BatchNorm layer, so there is no normalization to choose at random")

    def random_normalization(name: str, old: nn.Module) -> nn.Module:
        assert isinstance(old, nn.BatchNorm2d)
        try:
            new = RandomNormalization2d(
                old.num_features,
                config.pool,
                eps=old.eps,
                momentum=0.1 if old.momentum is None else old.momentum,
                draw_scope=config.draw_scope,
                stream_name="rna" if config.choice == "per_network" else None,
            )
        except UserError as error:
            raise UserError(f"layer {name}: {error}") from None
        for branch in new.branches.values():
            assert isinstance(branch, Normalization2d)
            branch.copy_from(old)
        return new

    replace_named(backbone, names, random_normalization)


def final_normalization(backbone: Backbone, image_shape: ImageShape) -> str | None:
    """Return the name of the last normalization if it stands alone behind the last block, else None.

    It stands alone if what it normalizes does not come straight out of a convolution.
    """
    names = backbone.normalization_layers()
    if not names:
        return None
    convolved: list[Tensor] = []
    follows_convolution: list[bool] = []

    def at_normalization(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        follows_convolution.append(any(inputs[0] is output for output in convolved))

    handles = [
        module.register_forward_hook(lambda _module, _inputs, output: convolved.append(output))
        for module in backbone.modules()
        if isinstance(module, nn.Conv2d)
    ]
    handles.append(get_module(backbone, names[-1]).register_forward_pre_hook(at_normalization))
    try:
        backbone.feature_shapes(image_shape)  # runs one image of zeros and leaves modes and buffers as they were
    finally:
        for handle in handles:
            handle.remove()
    return None if follows_convolution[-1] else names[-1]


DEFENCE_MODELS = (
    DefenceModel(
        "rna",
        "random normalization aggregation: each layer draws one of several normalizations",
        RnaConfig,
        add_random_normalizations,
        presets=PRESETS,
    ),
)
