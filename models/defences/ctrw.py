"""CTRW: constrained trainable random weights on a feature map.

Reference: Ma, Dong, Xu, "Adversarial Robustness through Random Weight Sampling", NeurIPS 2023.
Deviation: the bounds are kept per element when the feature map has another size than a CIFAR image (`bounds_refer_to`); the official
code keeps the sum for every position and puts a floor of 1.0 per element on ImageNet.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator
from torch import nn

from models.backbones.base import Backbone, ImageShape
from models.configuration import Config
from models.errors import UserError
from models.layer_replacement import get_module, plain_convolution, set_module
from models.layers.random_weight import RandomFeatureWeight, RandomFilterConv2d, SigmaBounds
from models.positions import convolution_after_tap, nearest_tap, output_shape, tap
from models.randomness import DrawScope
from models.registry import DefenceModel

CIFAR_IMAGE_SIZE = 3 * 32 * 32
LARGEST_SUM = 1e9
"""Of the sigmas of one weight: hundreds for each element of the largest feature maps."""


class CtrwConfig(Config):
    """Parameters of CTRW. The defaults are those of the official code (floor at 2048); the paper states A=1000, B=2400."""

    constraint: Literal["floor", "shift", "project", "none", "fixed"] = Field(
        "floor",
        description="How sigma is kept in bounds: `floor` (official code), `shift` (the paper's words), `project` (the only one that "
        "gives A <= sum sigma <= B), `none`, `fixed` (sigma = A/m, not trained).",
    )
    lower_bound: float = Field(2048.0, ge=0, le=LARGEST_SUM, description="A (`lb` of the code): lower bound of the sum of sigma.")
    upper_bound: float = Field(2400.0, gt=0, le=LARGEST_SUM, description="B: upper bound of the sum of sigma; only `project` uses it.")
    bounds_refer_to: Literal["cifar_image", "feature_map"] = Field(
        "cifar_image",
        description="`cifar_image`: A and B are for 3072 elements and are scaled to the size of the feature map; `feature_map`: they are "
        "the sums themselves, as in the official code. Not measured.",
    )
    position: int = Field(
        0, ge=0, le=100, description="Where: 0 on the image, 1 after the stem, then before each stage, last before the pooling."
    )
    variant: Literal["in", "out", "both", "filter"] = Field(
        "in",
        description="`in`: on the input of the layer at the position; `out`: on the output of its convolution; `both`; `filter`: on the "
        "convolution's weight (Table 4).",
    )
    initial_mu: float = Field(1.0, ge=-1000, le=1000, description="Start value of mu.")
    initial_sigma: float | None = Field(
        None, gt=0, le=1000, description="Start value of sigma; none: 1, or the middle of [A, B] under `project`."
    )
    draw_scope: DrawScope = Field(
        "global",
        description="Who shares a draw: all ranks (`global`, official code), a rank's batch (`per_rank`), nobody (`per_example`).",
    )

    @model_validator(mode="after")
    def _bounds_are_ordered(self) -> CtrwConfig:
        if self.constraint == "project" and self.lower_bound > self.upper_bound:
            raise ValueError(
                f"lower_bound {self.lower_bound:g} is above upper_bound {self.upper_bound:g}: no sigma satisfies A <= sum <= B"
            )
        if self.constraint == "fixed" and self.lower_bound == 0:
            raise ValueError("constraint `fixed` with lower_bound 0 is sigma = 0: nothing would be random; use the defence `at`")
        if self.variant == "filter" and self.draw_scope == "per_example":
            raise ValueError("variant `filter` is shared by the batch; draw_scope `per_example` needs `in`, `out` or `both`")
        return self

    def bounds(self, size: int, scale: float = 1.0) -> SigmaBounds:
        """Return the constraint for a weight of `size` elements; `scale` multiplies both bounds."""
        factor = scale * (size / CIFAR_IMAGE_SIZE if self.bounds_refer_to == "cifar_image" else 1.0)
        return SigmaBounds(self.constraint, self.lower_bound * factor, self.upper_bound * factor)

    def start_sigma(self, bounds: SigmaBounds, size: int, scale: float = 1.0) -> float:
        """Return sigma's start value for a weight of `size` elements."""
        if self.initial_sigma is not None:
            return self.initial_sigma * scale
        if self.constraint == "project":
            return (bounds.lower + bounds.upper) / 2 / size
        return scale


PRESETS: dict[str, dict] = {
    "paper": {"constraint": "project", "lower_bound": 1000.0, "upper_bound": 2400.0, "position": 0},
    "official": {"constraint": "floor", "lower_bound": 2048.0, "position": 0},
}
"""Parameters by source: the paper's text, the official code."""


def add_random_weights(backbone: Backbone, config: CtrwConfig, image_shape: ImageShape) -> None:
    """Put CTRW's random weights into `backbone`, in place.

    Raises:
        UserError: the position does not exist, no convolution follows it though the variant needs one, another layer stands there, or
            the filter is not that of a plain convolution.
    """
    key = tap(backbone, config.position)
    if config.variant != "in":
        name = convolution_after_tap(backbone, config.position, image_shape)
        conv = get_module(backbone, name)
    if config.variant in ("in", "both"):
        if type(backbone.taps[key]) is not nn.Identity:
            raise UserError(
                f"position {config.position} holds a {type(backbone.taps[key]).__name__} already; a second one would replace it"
            )
        backbone.taps[key] = _feature_weight(backbone.feature_shapes(image_shape)[key], config)
    if config.variant in ("out", "both"):
        weight = _feature_weight(output_shape(backbone, name, image_shape), config)
        set_module(backbone, name, nn.Sequential(conv, weight))
    if config.variant == "filter":
        conv = plain_convolution(name, conv)
        # A filter's elements are far smaller than 1, so bounds and start are relative to its root mean square.
        assert isinstance(conv, nn.Conv2d)
        scale = conv.weight.detach().square().mean().sqrt().item()
        if scale == 0:
            raise UserError(f"the filter of {name} starts at zero, so no bound can be relative to it: take another position or variant")
        size = conv.weight.numel()
        bounds = config.bounds(size, scale)
        set_module(backbone, name, RandomFilterConv2d(conv, config.start_sigma(bounds, size, scale), bounds, config.draw_scope))


def _feature_weight(shape: tuple[int, int, int], config: CtrwConfig) -> RandomFeatureWeight:
    size = shape[0] * shape[1] * shape[2]
    bounds = config.bounds(size)
    return RandomFeatureWeight(shape, config.initial_mu, config.start_sigma(bounds, size), bounds, draw_scope=config.draw_scope)


def fit(config: CtrwConfig, backbone: Backbone) -> CtrwConfig:
    """Return the parameters with a position that the backbone has."""
    return config.changed(position=nearest_tap(backbone, config.position))


DEFENCE_MODELS = (
    DefenceModel("ctrw", "constrained trainable random weights on a feature map", CtrwConfig, add_random_weights, fit=fit, presets=PRESETS),
)
