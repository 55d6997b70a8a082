"""Residual networks with full pre-activation.

Reference: He et al., Identity Mappings in Deep Residual Networks. The last stage is followed by BatchNorm and ReLU, and
a shortcut that changes the shape is a 1x1 convolution of the activated input, both as in that paper.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from models.backbones.base import (
    CLASSIFIER_NAMES,
    Backbone,
    BackboneEntry,
    ImageShape,
    identity_taps,
    initialize_classifier,
    initialize_convolutions,
)
from models.backbones.variants import Activation, Padding, activation_of, check_choice, padded_conv3x3

Shortcut = Literal["activated", "raw", "raw_3x3"]
"""What a shortcut that changes the shape does: a 1x1 convolution of the activated input (the paper), of the raw one (RobustBench's
`PreActBlock`), or a 3x3 one of the raw input (DeepMind)."""


class PreActBlock(nn.Module):
    """BatchNorm, activation and 3x3 convolution, twice, and a shortcut."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int,
        activation: Activation = "relu",
        padding: Padding = "symmetric",
        shortcut: Shortcut = "activated",
    ) -> None:
        super().__init__()
        changes_shape = stride != 1 or in_channels != channels
        self.shortcut_is_activated = changes_shape and shortcut == "activated"
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu1 = activation_of(activation)
        self.pad1, self.conv1 = padded_conv3x3(in_channels, channels, stride, padding)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = activation_of(activation)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.pad_shortcut: nn.Module = nn.Identity()
        self.shortcut: nn.Module = nn.Identity()
        if changes_shape and shortcut == "raw_3x3":
            self.pad_shortcut, self.shortcut = padded_conv3x3(in_channels, channels, stride, padding)
        elif changes_shape:
            self.shortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        active_BCHW = self.relu1(self.bn1(x_BCHW))
        out_BCHW = self.conv1(self.pad1(active_BCHW))
        out_BCHW = self.conv2(self.relu2(self.bn2(out_BCHW)))
        return out_BCHW + self.shortcut(self.pad_shortcut(active_BCHW if self.shortcut_is_activated else x_BCHW))


class PreActResNet(Backbone):
    """A 3x3 stem, stages `layer1` to `layer4`, BatchNorm, activation, average pooling, linear classifier.

    Taps: 0 image, 1 after the stem (before layer1), i before layer i, 5 after the last activation.
    """

    names_elsewhere = (
        *CLASSIFIER_NAMES,
        (r"\.shortcut\.0\.", ".shortcut."),
        # DeepMind's names, the stages from the last on: each takes the name of the one before.
        (r"^conv_2d\.", "conv1."),
        (r"^layer_3\.", "layer4."),
        (r"^layer_2\.", "layer3."),
        (r"^layer_1\.", "layer2."),
        (r"^layer_0\.", "layer1."),
        (r"^batchnorm\.", "bn."),
        (r"\.batchnorm_0\.", ".bn1."),
        (r"\.batchnorm_1\.", ".bn2."),
        (r"\.conv_2d_1\.", ".conv1."),
        (r"\.conv_2d_2\.", ".conv2."),
    )

    def __init__(
        self,
        num_blocks: tuple[int, int, int, int],
        num_classes: int,
        image_shape: ImageShape,
        activation: Activation = "relu",
        padding: Padding = "symmetric",
        shortcut: Shortcut = "activated",
        last_normalization: bool = True,
    ) -> None:
        super().__init__()
        check_choice("activation", activation, Activation)
        check_choice("padding", padding, Padding)
        check_choice("shortcut", shortcut, Shortcut)
        variant = (activation, padding, shortcut)
        self.taps = identity_taps(6)
        self.conv1 = nn.Conv2d(image_shape[0], 64, 3, padding=1, bias=False)
        self.layer1 = _stage(num_blocks[0], 64, 64, 1, variant)
        self.layer2 = _stage(num_blocks[1], 64, 128, 2, variant)
        self.layer3 = _stage(num_blocks[2], 128, 256, 2, variant)
        self.layer4 = _stage(num_blocks[3], 256, 512, 2, variant)
        self.bn: nn.Module = nn.BatchNorm2d(512) if last_normalization else nn.Identity()
        self.relu = activation_of(activation) if last_normalization else nn.Identity()
        self.classifier = nn.Linear(512, num_classes)

        initialize_convolutions(self)
        initialize_classifier(self.classifier)
        self.record_layers()

    def forward_features(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = self.conv1(self.taps["0"](x_BCHW))
        x_BCHW = self.layer1(self.taps["1"](x_BCHW))
        x_BCHW = self.layer2(self.taps["2"](x_BCHW))
        x_BCHW = self.layer3(self.taps["3"](x_BCHW))
        x_BCHW = self.layer4(self.taps["4"](x_BCHW))
        x_BCHW = self.taps["5"](self.relu(self.bn(x_BCHW)))
        return x_BCHW.mean(dim=(2, 3))


def _stage(num_blocks: int, in_channels: int, channels: int, stride: int, variant: tuple[Activation, Padding, Shortcut]) -> nn.Sequential:
    first = PreActBlock(in_channels, channels, stride, *variant)
    return nn.Sequential(first, *(PreActBlock(channels, channels, 1, *variant) for _ in range(num_blocks - 1)))


def build_preact_resnet18(
    num_classes: int,
    image_shape: ImageShape,
    *,
    activation: Activation = "relu",
    padding: Padding = "symmetric",
    shortcut: Shortcut = "activated",
    last_normalization: bool = True,
) -> PreActResNet:
    """Build PreActResNet-18: widths 64 to 512, two blocks each.

    RobustBench's `PreActResNet18` has `shortcut=raw` and no last normalization; DeepMind's has `silu`, `same` and `raw_3x3`.
    """
    return PreActResNet((2, 2, 2, 2), num_classes, image_shape, activation, padding, shortcut, last_normalization)


BACKBONES = {
    "preact_resnet18": BackboneEntry(build_preact_resnet18, "PreActResNet-18, small network of the AWP and RAT papers"),
}
