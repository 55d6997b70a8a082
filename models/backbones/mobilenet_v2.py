"""MobileNetV2.

Reference: Sandler et al., MobileNetV2: Inverted Residuals and Linear Bottlenecks, Table 2.
Deviation: for small images the stem and the second stage have stride 1 in place of 2; no dropout before the classifier.
"""

from __future__ import annotations

from torch import Tensor, nn

from models.backbones.base import (
    Backbone,
    BackboneEntry,
    ImageShape,
    Stem,
    identity_taps,
    initialize_classifier,
    initialize_convolutions,
    resolve_stem,
)

# (expansion t, channels c, blocks n, stride s)
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
STEM_CHANNELS = 32
LAST_CHANNELS = 1280


class InvertedResidual(nn.Module):
    """A widening 1x1, a depthwise 3x3 and a narrowing 1x1 convolution; the input is added where the shape stays."""

    def __init__(self, in_channels: int, channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        self.keeps_shape = stride == 1 and in_channels == channels
        hidden = in_channels * expansion
        self.expand = _convolution(in_channels, hidden, kernel_size=1) if expansion != 1 else nn.Identity()
        self.depthwise = _convolution(hidden, hidden, kernel_size=3, stride=stride, groups=hidden)
        self.project = nn.Sequential(nn.Conv2d(hidden, channels, 1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        out_BCHW = self.project(self.depthwise(self.expand(x_BCHW)))
        return x_BCHW + out_BCHW if self.keeps_shape else out_BCHW


class MobileNetV2(Backbone):
    """A 3x3 stem, seven stages of inverted residuals, a last 1x1 convolution, average pooling, linear classifier.

    The activations are `nn.ReLU6`, as in the paper.
    Taps: 0 image, 1 after the stem, i before stage i, 8 after the last convolution.
    """

    def __init__(self, num_classes: int, image_shape: ImageShape, stem: Stem = "auto") -> None:
        super().__init__()
        small = resolve_stem(stem, image_shape) == "cifar"
        self.taps = identity_taps(len(STAGES) + 2)
        self.stem = _convolution(image_shape[0], STEM_CHANNELS, kernel_size=3, stride=1 if small else 2)
        in_channels = STEM_CHANNELS
        for number, (expansion, channels, num_blocks, stride) in enumerate(STAGES, start=1):
            blocks = []
            for index in range(num_blocks):
                block_stride = stride if index == 0 and not (small and number == 2) else 1
                blocks.append(InvertedResidual(in_channels, channels, block_stride, expansion))
                in_channels = channels
            self.add_module(f"stage{number}", nn.Sequential(*blocks))
        self.last = _convolution(in_channels, LAST_CHANNELS, kernel_size=1)
        self.classifier = nn.Linear(LAST_CHANNELS, num_classes)

        initialize_convolutions(self)
        initialize_classifier(self.classifier, std=0.01)
        self.record_layers()

    def forward_features(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = self.stem(self.taps["0"](x_BCHW))
        for number in range(1, len(STAGES) + 1):
            x_BCHW = self.taps[str(number)](x_BCHW)
            x_BCHW = getattr(self, f"stage{number}")(x_BCHW)
        x_BCHW = self.taps[str(len(STAGES) + 1)](self.last(x_BCHW))
        return x_BCHW.mean(dim=(2, 3))


def _convolution(in_channels: int, channels: int, *, kernel_size: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, kernel_size, stride, padding=kernel_size // 2, groups=groups, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU6(),
    )


def build_mobilenet_v2(num_classes: int, image_shape: ImageShape, *, stem: Stem = "auto") -> MobileNetV2:
    """Build MobileNetV2 of width 1; `stem` chooses between the strides for small and for large images."""
    return MobileNetV2(num_classes, image_shape, stem)


BACKBONES = {
    "mobilenet_v2": BackboneEntry(build_mobilenet_v2, "MobileNetV2 of width 1; fewer strides up to 64 pixels"),
}
