"""Wide residual networks.

Reference: Zagoruyko and Komodakis, Wide Residual Networks. Depth 6 n + 4, three groups of n pre-activation blocks.
The RNA paper writes "WideResNet32" for depth 34 (its depth rule excludes 32), hence the alias `wrn32`.
"""

from __future__ import annotations

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

STEM_CHANNELS = 16


class WideBlock(nn.Module):
    """BatchNorm, activation and 3x3 convolution, twice; a 1x1 convolution as shortcut where the number of channels changes.

    Such a shortcut takes the activated input, every other one the raw input.
    """

    def __init__(
        self, in_channels: int, channels: int, stride: int, activation: Activation = "relu", padding: Padding = "symmetric"
    ) -> None:
        super().__init__()
        self.changes_channels = in_channels != channels
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu1 = activation_of(activation)
        self.pad1, self.conv1 = padded_conv3x3(in_channels, channels, stride, padding)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = activation_of(activation)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.shortcut: nn.Module = nn.Identity()
        if self.changes_channels:
            self.shortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        active_BCHW = self.relu1(self.bn1(x_BCHW))
        out_BCHW = self.conv1(self.pad1(active_BCHW))
        out_BCHW = self.conv2(self.relu2(self.bn2(out_BCHW)))
        return out_BCHW + self.shortcut(active_BCHW if self.changes_channels else x_BCHW)


class WideGroup(nn.Module):
    """A group of blocks of one width; the first block carries the stride."""

    def __init__(self, num_blocks: int, in_channels: int, channels: int, stride: int, activation: Activation, padding: Padding) -> None:
        super().__init__()
        first = WideBlock(in_channels, channels, stride, activation, padding)
        others = (WideBlock(channels, channels, 1, activation, padding) for _ in range(num_blocks - 1))
        self.layer = nn.Sequential(first, *others)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.layer(x_BCHW)


class WideResNet(Backbone):
    """A 3x3 stem with 16 channels, groups `block1` to `block3`, BatchNorm, activation, average pooling, linear classifier.

    Taps: 0 image, 1 after the stem, 2 before block2, 3 before block3, 4 after the last activation. For WRN-34-10 on 3x32x32:
    (3,32,32), (16,32,32), (160,32,32), (320,16,16), (640,8,8).
    """

    names_elsewhere = (
        *CLASSIFIER_NAMES,
        (r"\.convShortcut\.", ".shortcut."),
        # DeepMind's names:
        (r"^init_conv\.", "conv1."),
        (r"^layer\.0\.block\.", "block1.layer."),
        (r"^layer\.1\.block\.", "block2.layer."),
        (r"^layer\.2\.block\.", "block3.layer."),
        (r"\bbatchnorm\.", "bn1."),
        (r"\bbatchnorm_0\.", "bn1."),
        (r"\bbatchnorm_1\.", "bn2."),
        (r"\.conv_0\.", ".conv1."),
        (r"\.conv_1\.", ".conv2."),
    )

    def __init__(
        self,
        depth: int,
        widen_factor: int,
        num_classes: int,
        image_shape: ImageShape,
        activation: Activation = "relu",
        padding: Padding = "symmetric",
    ) -> None:
        super().__init__()
        check_choice("activation", activation, Activation)
        check_choice("padding", padding, Padding)
        assert (depth - 4) % 6 == 0, "the depth of a wide residual network is 6 n + 4"
        num_blocks = (depth - 4) // 6
        widths = [STEM_CHANNELS * widen_factor * factor for factor in (1, 2, 4)]
        self.taps = identity_taps(5)
        self.conv1 = nn.Conv2d(image_shape[0], STEM_CHANNELS, 3, padding=1, bias=False)
        self.block1 = WideGroup(num_blocks, STEM_CHANNELS, widths[0], 1, activation, padding)
        self.block2 = WideGroup(num_blocks, widths[0], widths[1], 2, activation, padding)
        self.block3 = WideGroup(num_blocks, widths[1], widths[2], 2, activation, padding)
        self.bn1 = nn.BatchNorm2d(widths[2])
        self.relu = activation_of(activation)
        self.classifier = nn.Linear(widths[2], num_classes)

        initialize_convolutions(self)
        initialize_classifier(self.classifier)
        self.record_layers()

    def forward_features(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = self.conv1(self.taps["0"](x_BCHW))
        x_BCHW = self.block1(self.taps["1"](x_BCHW))
        x_BCHW = self.block2(self.taps["2"](x_BCHW))
        x_BCHW = self.block3(self.taps["3"](x_BCHW))
        x_BCHW = self.taps["4"](self.relu(self.bn1(x_BCHW)))
        return x_BCHW.mean(dim=(2, 3))


def build_wrn16_4(
    num_classes: int, image_shape: ImageShape, *, activation: Activation = "relu", padding: Padding = "symmetric"
) -> WideResNet:
    """Build WRN-16-4: two blocks per group, widths 64, 128, 256."""
    return WideResNet(16, 4, num_classes, image_shape, activation, padding)


def build_wrn28_10(num_classes: int, image_shape: ImageShape, *, activation: Activation = "silu", padding: Padding = "same") -> WideResNet:
    """Build WRN-28-10: four blocks per group, widths 160, 320, 640; as DeepMind trains it, with `relu` and `symmetric` as TRADES does."""
    return WideResNet(28, 10, num_classes, image_shape, activation, padding)


def build_wrn70_16(num_classes: int, image_shape: ImageShape, *, activation: Activation = "silu", padding: Padding = "same") -> WideResNet:
    """Build WRN-70-16: eleven blocks per group, widths 256, 512, 1024; as DeepMind trains it."""
    return WideResNet(70, 16, num_classes, image_shape, activation, padding)


def build_wrn34_10(
    num_classes: int, image_shape: ImageShape, *, activation: Activation = "relu", padding: Padding = "symmetric"
) -> WideResNet:
    """Build WRN-34-10: five blocks per group, widths 160, 320, 640."""
    return WideResNet(34, 10, num_classes, image_shape, activation, padding)


BACKBONES = {
    "wrn16_4": BackboneEntry(build_wrn16_4, "WRN-16-4, a small wide residual network"),
    "wrn28_10": BackboneEntry(build_wrn28_10, "WRN-28-10 with SiLU and TensorFlow's padding, as on RobustBench"),
    "wrn70_16": BackboneEntry(build_wrn70_16, "WRN-70-16 with SiLU and TensorFlow's padding, largest of RobustBench's leaders"),
    "wrn34_10": BackboneEntry(build_wrn34_10, "WRN-34-10, the large network of the robustness papers", aliases=("wrn32",)),
}
