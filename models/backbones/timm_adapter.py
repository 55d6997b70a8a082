"""Architectures of the library timm as backbones, without pretrained weights: `vit_tiny` and any other as `timm:NAME`.

What the adapter changes in a timm model, each change leaving the function that it computes as it is:

* the classifier moves to the attribute `classifier`;
* a layer that normalizes and activates at once (timm: BatchNormAct2d) becomes a BatchNorm2d followed by its activation,
  so that a defence that replaces normalizations does not remove activations with them;
* in-place activations write to new memory, and hard sigmoids, which PyTorch differentiates only once, are composed of
  operations that it differentiates twice;
* attention is computed step by step, since the fused kernel can be differentiated only once, and neither in forward
  mode nor deterministically on every device. The option `fused_attention=True` trades that for speed.

The names of a model's parameters therefore differ in places from timm's own.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any, Literal, get_args

from torch import Tensor, nn

from models.backbones.base import CLASSIFIER_NAMES, Backbone, BackboneEntry, ImageShape, identity_taps, initialize_convolutions
from models.errors import UserError, nearest, unknown_name
from models.layer_replacement import of_type, replace_modules, set_module
from models.modes import probed

StemActivation = Literal["batch_norm_relu", "none"]

STEM_CHANNELS = (48, 96, 192, 384)
EMBEDDING_DIMENSION = 192
SMALLEST_TOKEN_GRID = 4


class TimmBackbone(Backbone):
    """Any timm classifier with a single linear layer at its end.

    Taps: 0 image; 1 feature map before pooling, where the model's features are a map (C, H, W).
    `main_path_convolutions` and `normalization_layers` are in the order of registration, which timm keeps to the
    forward order in all common families.
    """

    def __init__(self, model: nn.Module, image_shape: ImageShape, *, fused_attention: bool = False) -> None:
        super().__init__()
        named = {id(tensor): name for name, tensor in _named_tensors(model)}
        classifier = _take_classifier(model)
        _make_differentiable(model, fused_attention)
        self.taps = identity_taps(2)
        self.model: Any = model  # timm's models share no base class of their own
        self.classifier = classifier
        self.maps_are_channels_last = getattr(model, "output_fmt", "NCHW") == "NHWC"
        if not self._ends_in_feature_map(image_shape):
            del self.taps["1"]
        self.names_elsewhere = {named[id(tensor)]: name for name, tensor in _named_tensors(self) if id(tensor) in named}
        self.record_layers()

    def forward_features(self, x_BCHW: Tensor) -> Tensor:
        out = self.model.forward_features(self.taps["0"](x_BCHW))
        if "1" in self.taps:
            if self.maps_are_channels_last:
                out = self.taps["1"](out.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            else:
                out = self.taps["1"](out)
        return self.model.forward_head(out, pre_logits=True)

    def _ends_in_feature_map(self, image_shape: ImageShape) -> bool:
        with probed(self, image_shape) as x_BCHW:
            out = self.model.forward_features(x_BCHW)
            features_BD = self.model.forward_head(out, pre_logits=True)
        if features_BD.shape != (1, self.classifier.in_features):
            raise UserError(
                f"{type(self.model).__name__} gives features of shape {tuple(features_BD.shape)} where its classifier "
                f"takes (1, {self.classifier.in_features}); this model needs an adapter of its own."
            )
        return out.ndim == 4


class ConvolutionalStem(nn.Sequential):
    """Four 3x3 convolutions (48, 96, 192, 384 channels), then a 1x1 convolution: image (B, C, H, W) to (B, D, h, w).

    The first `num_strides` of them have stride 2.
    """

    def __init__(self, in_channels: int, num_strides: int, activation: StemActivation) -> None:
        super().__init__()
        plain = activation == "none"
        for number, channels in enumerate(STEM_CHANNELS, start=1):
            stride = 2 if number <= num_strides else 1
            self.add_module(f"conv{number}", nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=plain))
            self.add_module(f"bn{number}", nn.Identity() if plain else nn.BatchNorm2d(channels))
            self.add_module(f"relu{number}", nn.Identity() if plain else nn.ReLU())
            in_channels = channels
        self.projection = nn.Conv2d(in_channels, EMBEDDING_DIMENSION, 1)
        initialize_convolutions(self)


class ConvStemVisionTransformer(Backbone):
    """ViT-tiny (12 blocks, 192 dimensions, 3 heads, class token) on a convolutional stem.

    An image of 64 x 64 pixels or more passes four convolutions of stride 2: 224 x 224 gives 14 x 14 tokens. For a
    smaller one, only as many of the first convolutions have stride 2 as leave 4 x 4 tokens or more: three for 32 x 32
    (4 x 4 tokens), two for 28 x 28 (7 x 7), one for 8 x 8 (4 x 4). The option `num_strides` overrules that.

    Taps: 0 image, 1 the embedding (192, h, w) after the stem. A transformer has no feature map before pooling.

    Reference: Xiao et al., Early Convolutions Help Transformers See Better, which the DCS paper follows.
    Deviation: all 12 blocks stay, where that paper drops one for the stem. The authors' code of DCS has neither
    BatchNorm nor ReLU between the convolutions: `stem_activation="none"`.
    """

    names_elsewhere = (*CLASSIFIER_NAMES, (r"^(?=(blocks|norm|cls_token|pos_embed)\b)", "transformer."))

    def __init__(
        self,
        num_classes: int,
        image_shape: ImageShape,
        *,
        stem_activation: StemActivation = "batch_norm_relu",
        num_strides: int | None = None,
        fused_attention: bool = False,
    ) -> None:
        super().__init__()
        from timm.models.vision_transformer import VisionTransformer

        if stem_activation not in get_args(StemActivation):
            raise unknown_name("stem_activation", stem_activation, get_args(StemActivation))
        if num_strides is None:
            num_strides = default_num_strides(image_shape)
        elif not 0 <= num_strides <= len(STEM_CHANNELS):
            raise UserError(f"num_strides is {num_strides}; the stem takes 0 to {len(STEM_CHANNELS)} strides of 2.")
        height, width = (math.ceil(side / 2**num_strides) for side in image_shape[1:])

        self.taps = identity_taps(2)
        self.stem = ConvolutionalStem(image_shape[0], num_strides, stem_activation)
        self.transformer = VisionTransformer(
            img_size=(height, width),
            patch_size=1,
            num_classes=num_classes,
            embed_dim=EMBEDDING_DIMENSION,
            depth=12,
            num_heads=3,
            embed_layer=TokenInput,
        )
        self.classifier = _take_classifier(self.transformer)
        _make_differentiable(self.transformer, fused_attention)
        self.record_layers()

    def forward_features(self, x_BCHW: Tensor) -> Tensor:
        x_BDhw = self.taps["1"](self.stem(self.taps["0"](x_BCHW)))
        tokens_BTD = self.transformer.forward_features(x_BDhw.flatten(2).transpose(1, 2))
        return self.transformer.forward_head(tokens_BTD, pre_logits=True)


class TokenInput(nn.Module):
    """Stands where a timm vision transformer embeds patches, for tokens (B, T, D) that are embedded already."""

    def __init__(self, img_size: tuple[int, int], patch_size: int, **unused: object) -> None:
        super().__init__()
        self.patch_size = (patch_size, patch_size)
        self.grid_size = img_size
        self.num_patches = img_size[0] * img_size[1]

    def forward(self, tokens_BTD: Tensor) -> Tensor:
        return tokens_BTD


def default_num_strides(image_shape: ImageShape) -> int:
    """Return how many convolutions of `vit_tiny`'s stem have stride 2: at most 4, leaving 4 x 4 tokens or more.

    Raises:
        UserError: the image is smaller than 4 x 4 pixels.
    """
    smallest_side = min(image_shape[1:])
    if smallest_side < SMALLEST_TOKEN_GRID:
        raise UserError(f"vit_tiny needs images of at least 4 x 4 pixels, not {image_shape[1]} x {image_shape[2]}.")
    return min(len(STEM_CHANNELS), int(math.log2(smallest_side / SMALLEST_TOKEN_GRID)))


def _named_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def _take_classifier(model: Any) -> nn.Linear:
    """Remove the last linear layer from a timm model and return it."""
    classifier = model.get_classifier()
    if not isinstance(classifier, nn.Linear):
        kind = f"{len(classifier)} classifiers" if isinstance(classifier, tuple) else type(classifier).__name__
        raise UserError(f"{type(model).__name__} ends in {kind}; a backbone ends in a single linear layer.")
    name = next(name for name, module in model.named_modules() if module is classifier)
    set_module(model, name, nn.Identity())
    return classifier


class ComposedHardsigmoid(nn.Module):
    """relu6(x + 3) / 6, the hard sigmoid, twice differentiable."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.relu6(x + 3.0) / 6.0


def _make_differentiable(model: nn.Module, fused_attention: bool) -> None:
    from timm.layers import BatchNormAct2d

    kinds = {type(module) for module in model.modules()}
    if any(issubclass(kind, BatchNormAct2d) for kind in kinds):
        replace_modules(model, of_type(BatchNormAct2d), _separate_activation)
    if nn.Hardsigmoid in kinds:
        replace_modules(model, of_type(nn.Hardsigmoid), lambda name, module: ComposedHardsigmoid())
    module: Any
    for module in model.modules():
        if getattr(module, "inplace", False):
            module.inplace = False
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused_attention


def _separate_activation(name: str, fused: Any) -> nn.Sequential:
    normalization = nn.BatchNorm2d(fused.num_features, fused.eps, fused.momentum, fused.affine, fused.track_running_stats)
    for key, value in ((key, getattr(fused, key)) for key in normalization.state_dict()):
        setattr(normalization, key, value)  # the tensors themselves: what timm calls them is known by them
    return nn.Sequential(OrderedDict(normalization=normalization, drop=fused.drop, activation=fused.act))


def build_vit_tiny(
    num_classes: int,
    image_shape: ImageShape,
    *,
    stem_activation: StemActivation = "batch_norm_relu",
    num_strides: int | None = None,
    fused_attention: bool = False,
) -> ConvStemVisionTransformer:
    """Build ViT-tiny on a convolutional stem."""
    return ConvStemVisionTransformer(
        num_classes,
        image_shape,
        stem_activation=stem_activation,
        num_strides=num_strides,
        fused_attention=fused_attention,
    )


def build_timm(
    num_classes: int, image_shape: ImageShape, *, variant: str, fused_attention: bool = False, **model_options: Any
) -> TimmBackbone:
    """Build the timm model `variant` without pretrained weights; further options go to `timm.create_model`.

    Raises:
        UserError: timm has no such model, or not one that takes these images, options or a single linear classifier.
    """
    import timm

    if not timm.is_model(variant):
        close = nearest(variant, timm.list_models())
        hint = f" Did you mean {' or '.join(repr(candidate) for candidate in close)}?" if close else ""
        raise UserError(f"unknown timm model {variant!r}.{hint} timm.list_models() lists them all.")
    configuration = timm.get_pretrained_cfg(variant)
    if configuration is not None and configuration.fixed_input_size:
        model_options = {"img_size": image_shape[1:], **model_options}
    try:
        model = timm.create_model(variant, pretrained=False, num_classes=num_classes, in_chans=image_shape[0], **model_options)
        return TimmBackbone(model, image_shape, fused_attention=fused_attention)
    except UserError:
        raise
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        # timm reports an option or an image size that does not fit in many ways, all of them at this point.
        raise UserError(
            f"timm cannot build {variant!r} for images of shape {tuple(image_shape)}"
            f"{f' with {model_options}' if model_options else ''}: {error}"
        ) from error


BACKBONES = {
    "vit_tiny": BackboneEntry(build_vit_tiny, "ViT-tiny on a convolutional stem, as in the DCS paper"),
    "timm": BackboneEntry(build_timm, "any model of the library timm, untrained, written timm:NAME", is_family=True),
}
