"""Residual networks with full pre-activation.

Reference: He et al., Identity Mappings in Deep Residual Networks. The last stage is followed by BatchNorm and ReLU, and
a shortcut that changes the shape is a 1x1 convolution of the activated input, both as in that paper.
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


class PreActBlock(nn.Module):
    """BatchNorm, ReLU and 3x3 convolution, twice, and a shortcut."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.changes_shape = stride != 1 or in_channels != channels
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.shortcut: nn.Module = nn.Identity()
        if self.changes_shape:
            self.shortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        active_BCHW = self.relu1(self.bn1(x_BCHW))
        out_BCHW = self.conv1(active_BCHW)
        out_BCHW = self.conv2(self.relu2(self.bn2(out_BCHW)))
        return out_BCHW + self.shortcut(active_BCHW if self.changes_shape else x_BCHW)


class PreActResNet(Backbone):
    """A 3x3 stem, stages `layer1` to `layer4`, BatchNorm, ReLU, average pooling, linear classifier.

    Taps: 0 image, 1 after the stem (before layer1), i before layer i, 5 after the last ReLU.
    """

    names_elsewhere = (*CLASSIFIER_NAMES, (r"\.shortcut\.0\.", ".shortcut."))

    def __init__(self, num_blocks: tuple[int, int, int, int], num_classes: int, image_shape: ImageShape) -> None:
        super().__init__()
        self.taps = identity_taps(6)
        self.conv1 = nn.Conv2d(image_shape[0], 64, 3, padding=1, bias=False)
        self.layer1 = _stage(num_blocks[0], 64, 64, stride=1)
        self.layer2 = _stage(num_blocks[1], 64, 128, stride=2)
        self.layer3 = _stage(num_blocks[2], 128, 256, stride=2)
        self.layer4 = _stage(num_blocks[3], 256, 512, stride=2)
        self.bn = nn.BatchNorm2d(512)
        self.relu = nn.ReLU()
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


def _stage(num_blocks: int, in_channels: int, channels: int, stride: int) -> nn.Sequential:
    first = PreActBlock(in_channels, channels, stride)
    return nn.Sequential(first, *(PreActBlock(channels, channels, stride=1) for _ in range(num_blocks - 1)))


def build_preact_resnet18(num_classes: int, image_shape: ImageShape) -> PreActResNet:
    """Build PreActResNet-18: widths 64 to 512, two blocks each."""
    return PreActResNet((2, 2, 2, 2), num_classes, image_shape)


BACKBONES = {
    "preact_resnet18": BackboneEntry(build_preact_resnet18, "PreActResNet-18, small network of the AWP and RAT papers"),
}
