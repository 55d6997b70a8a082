"""The normalizations of a backbone that a defence may replace, and what each of them sees.

Reference: Dong, Chen, Wang, Xu, "Random Normalization Aggregation for Adversarial Defense", NeurIPS 2022; its official code.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from models.backbones.base import Backbone, ImageShape
from models.errors import UserError
from models.layer_replacement import get_module, plain_batch_norm
from models.layers.channel_statistics import NormalizationType, parse_normalization


@dataclass(frozen=True)
class NormalizationLayer:
    """One BatchNorm2d of a backbone as images of one shape meet it.

    Attributes:
        name: dotted.
        shape: (C, H, W) of the smallest map that it normalizes.
        follows_convolution: whether what it normalizes comes straight out of a convolution.
    """

    name: str
    shape: tuple[int, int, int]
    follows_convolution: bool


def normalization_layers(backbone: Backbone, image_shape: ImageShape) -> list[NormalizationLayer]:
    """Return the BatchNorm2d layers of `backbone`, shortcuts included, in its own order, for images of shape (C, H, W)."""
    convolved: list[Tensor] = []
    seen: dict[str, list[tuple[tuple[int, int, int], bool]]] = {}

    def note(name: str, x_BCHW: Tensor) -> None:
        _, channels, height, width = x_BCHW.shape
        seen.setdefault(name, []).append(((channels, height, width), any(x_BCHW is output for output in convolved)))

    # By name too: what another defence has put in the place of a convolution still is one.
    names = set(backbone.main_path_convolutions())
    handles = [
        module.register_forward_hook(lambda _module, _inputs, output: convolved.append(output))
        for name, module in backbone.named_modules()
        if name in names or isinstance(module, nn.Conv2d)
    ]
    handles += [
        get_module(backbone, name).register_forward_pre_hook(lambda _module, inputs, name=name: note(name, inputs[0]))
        for name in backbone.normalization_layers()
    ]
    try:
        backbone.feature_shapes(image_shape)  # runs one image of zeros and leaves modes and buffers as they were
    finally:
        for handle in handles:
            handle.remove()
    layers = []
    for name in backbone.normalization_layers():
        if name in seen:
            shapes, convolutions = zip(*seen[name], strict=True)
            layers.append(NormalizationLayer(name, min(shapes, key=lambda shape: shape[1] * shape[2]), all(convolutions)))
    return layers


def replaceable_normalizations(
    backbone: Backbone,
    image_shape: ImageShape,
    kinds: Iterable[str],
    last: Literal["plain", "replaced"],
) -> list[str]:
    """Return the names of the BatchNorm2d layers in whose place normalizations of `kinds` can stand.

    Args:
        last: `plain` leaves out the last normalization if it stands alone behind the last block (WRN, PreActResNet), that is if what
            it normalizes does not come straight out of a convolution. The official code keeps batch normalization there whatever the
            others are: behind it there is only the pooling, and instance statistics would take away what the classifier reads.

    Raises:
        UserError: the backbone has none; one is not a plain `nn.BatchNorm2d`; the channels of one cannot be split into a kind's groups;
            or its map is so small that a kind would answer with a constant.
    """
    layers = normalization_layers(backbone, image_shape)
    if not layers:
        raise UserError(f"{type(backbone).__name__} has no BatchNorm layer, so there is no normalization to replace")
    if last == "plain" and not layers[-1].follows_convolution:
        layers = layers[:-1]
    parsed = [parse_normalization(kind) for kind in kinds]
    for layer in layers if parsed else ():
        plain_batch_norm(layer.name, get_module(backbone, layer.name))
        for kind in parsed:
            _check_fit(layer, kind, image_shape)
    return [layer.name for layer in layers]


def fitting_kinds(backbone: Backbone, kinds: Iterable[str]) -> tuple[str, ...]:
    """Return those kinds whose groups divide the channels of each of the backbone's BatchNorm2d layers."""
    channels = {plain_batch_norm(name, get_module(backbone, name)).num_features for name in backbone.normalization_layers()}

    def fits(kind: str) -> bool:
        try:
            return all(parse_normalization(kind).groups(number) for number in channels)
        except UserError:
            return False

    return tuple(filter(fits, kinds))


def _check_fit(layer: NormalizationLayer, kind: NormalizationType, image_shape: ImageShape) -> None:
    channels, height, width = layer.shape
    try:
        groups = kind.groups(channels)
    except UserError as error:
        raise UserError(f"layer {layer.name}: {error}") from None
    if not kind.over_batch and channels // groups * height * width == 1:
        raise UserError(
            f"layer {layer.name}: normalization {kind.name!r} of its {height}x{width} maps (images are {image_shape[1]}x{image_shape[2]}) "
            "has one value per mean and gives a constant, whatever the image; take larger images, a backbone with fewer strides, or "
            "normalizations over the batch or over several channels"
        )
