"""Residual networks for small and for large images.

Reference: He et al., Deep Residual Learning for Image Recognition. ResNet-50 has its stride in the 3x3 convolution, as
all common implementations since.
Deviation: where the shape changes, ResNet-8 and ResNet-20 have a 1x1 convolution with BatchNorm as shortcut (option B)
in place of the parameter-free padding (option A) of the CIFAR section, like their larger siblings.
"""

from __future__ import annotations

from torch import Tensor, nn

from models.backbones.base import (
    CLASSIFIER_NAMES,
    Backbone,
    BackboneEntry,
    ImageShape,
    Stem,
    identity_taps,
    initialize_classifier,
    initialize_convolutions,
    resolve_stem,
)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = _shortcut(in_channels, channels, stride)
        self.relu2 = nn.ReLU()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        out_BCHW = self.relu1(self.bn1(self.conv1(x_BCHW)))
        out_BCHW = self.bn2(self.conv2(out_BCHW))
        return self.relu2(out_BCHW + self.shortcut(x_BCHW))


class Bottleneck(nn.Module):
    """A 1x1, a 3x3 and a widening 1x1 convolution, and a shortcut."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        out_channels = channels * self.expansion
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.shortcut = _shortcut(in_channels, out_channels, stride)
        self.relu3 = nn.ReLU()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        out_BCHW = self.relu1(self.bn1(self.conv1(x_BCHW)))
        out_BCHW = self.relu2(self.bn2(self.conv2(out_BCHW)))
        out_BCHW = self.bn3(self.conv3(out_BCHW))
        return self.relu3(out_BCHW + self.shortcut(x_BCHW))


class ResNet(Backbone):
    """A stem, stages `layer1`, `layer2`, ... of blocks, average pooling and a linear classifier.

    Taps: 0 image, 1 after the stem (before layer1), i before layer i, last before pooling. For ResNet-18 on 3x32x32:
    (3,32,32), (64,32,32), (64,32,32), (128,16,16), (256,8,8), (512,4,4).
    """

    names_elsewhere = (*CLASSIFIER_NAMES, (r"\.downsample\.", ".shortcut."))

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        num_blocks: tuple[int, ...],
        channels: tuple[int, ...],
        num_classes: int,
        image_shape: ImageShape,
        stem: Stem = "auto",
    ) -> None:
        super().__init__()
        self.num_stages = len(num_blocks)
        self.taps = identity_taps(self.num_stages + 2)
        if resolve_stem(stem, image_shape) == "cifar":
            self.conv1 = nn.Conv2d(image_shape[0], channels[0], 3, padding=1, bias=False)
            pool: nn.Module = nn.Identity()
        else:
            self.conv1 = nn.Conv2d(image_shape[0], channels[0], 7, stride=2, padding=3, bias=False)
            pool = nn.MaxPool2d(3, stride=2, padding=1)
        self.bn1 = nn.BatchNorm2d(channels[0])
        self.relu = nn.ReLU()
        self.maxpool = pool

        in_channels = channels[0]
        for stage, (depth, width) in enumerate(zip(num_blocks, channels, strict=True), start=1):
            blocks = []
            for index in range(depth):
                stride = 2 if stage > 1 and index == 0 else 1
                blocks.append(block(in_channels, width, stride))
                in_channels = width * block.expansion
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
        self.classifier = nn.Linear(in_channels, num_classes)

        initialize_convolutions(self)
        initialize_classifier(self.classifier, std=0.001)
        self.record_layers()

    def forward_features(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = self.taps["0"](x_BCHW)
        x_BCHW = self.maxpool(self.relu(self.bn1(self.conv1(x_BCHW))))
        for stage in range(1, self.num_stages + 1):
            x_BCHW = self.taps[str(stage)](x_BCHW)
            x_BCHW = getattr(self, f"layer{stage}")(x_BCHW)
        x_BCHW = self.taps[str(self.num_stages + 1)](x_BCHW)
        return x_BCHW.mean(dim=(2, 3))


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
        nn.BatchNorm2d(out_channels),
    )


def build_resnet8(num_classes: int, image_shape: ImageShape) -> ResNet:
    """Build ResNet-8: widths 16, 32, 64, one basic block each; for demonstrations and tests on a CPU."""
    return ResNet(BasicBlock, (1, 1, 1), (16, 32, 64), num_classes, image_shape, stem="cifar")


def build_resnet20(num_classes: int, image_shape: ImageShape) -> ResNet:
    """Build ResNet-20: widths 16, 32, 64, three basic blocks each."""
    return ResNet(BasicBlock, (3, 3, 3), (16, 32, 64), num_classes, image_shape, stem="cifar")


def build_resnet18(num_classes: int, image_shape: ImageShape, *, stem: Stem = "auto") -> ResNet:
    """Build ResNet-18: widths 64 to 512, two basic blocks each."""
    return ResNet(BasicBlock, (2, 2, 2, 2), (64, 128, 256, 512), num_classes, image_shape, stem)


def build_resnet34(num_classes: int, image_shape: ImageShape, *, stem: Stem = "auto") -> ResNet:
    """Build ResNet-34: widths 64 to 512, 3, 4, 6 and 3 basic blocks."""
    return ResNet(BasicBlock, (3, 4, 6, 3), (64, 128, 256, 512), num_classes, image_shape, stem)


def build_resnet50(num_classes: int, image_shape: ImageShape, *, stem: Stem = "auto") -> ResNet:
    """Build ResNet-50: widths 64 to 512 times four, 3, 4, 6 and 3 bottlenecks."""
    return ResNet(Bottleneck, (3, 4, 6, 3), (64, 128, 256, 512), num_classes, image_shape, stem)


BACKBONES = {
    "resnet8": BackboneEntry(build_resnet8, "ResNet-8, widths 16-32-64, one block per stage: small enough for a CPU"),
    "resnet18": BackboneEntry(build_resnet18, "ResNet-18; 3x3 stem up to 64 pixels, ImageNet stem above"),
    "resnet20": BackboneEntry(build_resnet20, "ResNet-20 for CIFAR, widths 16-32-64, three blocks per stage"),
    "resnet34": BackboneEntry(build_resnet34, "ResNet-34; 3x3 stem up to 64 pixels, ImageNet stem above"),
    "resnet50": BackboneEntry(build_resnet50, "ResNet-50 of bottlenecks; 3x3 stem up to 64 pixels, ImageNet stem above"),
}
