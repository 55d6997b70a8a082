"""VGG networks with batch normalization and one linear layer after average pooling, as used on CIFAR.

Reference: Simonyan and Zisserman, Very Deep Convolutional Networks, configuration D.
Deviation: batch normalization after each convolution, and average pooling with one linear layer in place of three.
"""

from __future__ import annotations

from torch import Tensor, nn

from models.backbones.base import (
    Backbone,
    BackboneEntry,
    ImageShape,
    identity_taps,
    initialize_classifier,
    initialize_convolutions,
)

VGG16_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGG(Backbone):
    """A first convolution as stem, five stages that end in 2x2 max-pooling, average pooling, linear classifier.

    Taps: 0 image, 1 after the stem (the first convolution with its BatchNorm and ReLU), i before stage i, 6 after the
    last max-pooling. For VGG-16 on 3x32x32:
    (3,32,32), (64,32,32), (64,16,16), (128,8,8), (256,4,4), (512,2,2), (512,1,1).
    """

    def __init__(self, stages: tuple[tuple[int, ...], ...], num_classes: int, image_shape: ImageShape) -> None:
        super().__init__()
        self.num_stages = len(stages)
        self.taps = identity_taps(self.num_stages + 2)
        in_channels = stages[0][0]
        self.stem = nn.Sequential(*_convolution(image_shape[0], in_channels))
        for number, widths in enumerate(stages, start=1):
            layers: list[nn.Module] = []
            for width in widths[1:] if number == 1 else widths:
                layers += _convolution(in_channels, width)
                in_channels = width
            # ceil_mode changes nothing for sides that are powers of two and keeps a 1x1 map of a small image alive.
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
            self.add_module(f"stage{number}", nn.Sequential(*layers))
        self.classifier = nn.Linear(in_channels, num_classes)

        initialize_convolutions(self)
        initialize_classifier(self.classifier, std=0.01)
        self.record_layers()

    def forward_features(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = self.stem(self.taps["0"](x_BCHW))
        for number in range(1, self.num_stages + 1):
            x_BCHW = self.taps[str(number)](x_BCHW)
            x_BCHW = getattr(self, f"stage{number}")(x_BCHW)
        x_BCHW = self.taps[str(self.num_stages + 1)](x_BCHW)
        return x_BCHW.mean(dim=(2, 3))


def _convolution(in_channels: int, channels: int) -> list[nn.Module]:
    return [nn.Conv2d(in_channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU()]


def build_vgg16(num_classes: int, image_shape: ImageShape) -> VGG:
    """Build VGG-16 with batch normalization: 13 convolutions and one linear layer."""
    return VGG(VGG16_STAGES, num_classes, image_shape)


BACKBONES = {
    "vgg16": BackboneEntry(build_vgg16, "VGG-16 with batch normalization and a single linear layer"),
}
