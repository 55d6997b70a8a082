"""What every backbone offers a defence: positions, named convolutions, named normalizations, pooled features.

Shapes: B batch, C channels, H and W pixels, D features, K classes.

A *position* is a place between two layers where a defence may put a random layer on the feature map. A backbone marks
each one with a tap: an `nn.Identity` in `taps` that its forward runs there. Position 0 is the image that the stem sees,
1 the output of the stem, then comes one before each later stage, and the last is the feature map before global pooling.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol, get_args

from torch import Tensor, nn

from models.errors import UserError, unknown_name
from models.modes import probed

ImageShape = tuple[int, int, int]
Stem = Literal["auto", "cifar", "imagenet"]

# Larger images get the strides of the ImageNet networks; 64 keeps Tiny ImageNet at full resolution, as the papers do.
LARGEST_CIFAR_STEM_IMAGE = 64

# Parts of a dotted name that mark a branch beside the main path: shortcuts (timm: downsample), squeeze-and-excitation.
SIDE_BRANCHES = frozenset({"shortcut", "downsample", "se"})

CLASSIFIER_NAMES: tuple[tuple[str, str], ...] = ((r"^(fc|linear|head|logits)\.", "classifier."),)
"""What the last layer is called in torchvision, in the codes of papers, in timm and by DeepMind."""


class GivesFeatures(Protocol):
    """A network that can show what it gives to its last linear layer."""

    def forward_features(self, x_BCHW: Tensor, /) -> Tensor:
        """Return the pooled features (B, D) of images (B, C, H, W)."""
        ...


class Backbone(nn.Module, abc.ABC):
    """A classifier whose forward is `classifier(forward_features(x))`, with taps where random layers can go.

    A subclass registers `taps` (use `identity_taps`), its layers in the order in which its forward runs them, and
    `classifier`, then calls `record_layers()` as the last line of its constructor. Activations are modules of their own
    (`nn.ReLU`, never in place), so that they can be replaced and the network differentiated twice.
    """

    taps: nn.ModuleDict
    classifier: nn.Linear
    names_elsewhere: Sequence[tuple[str, str]] | Mapping[str, str] = CLASSIFIER_NAMES
    """How other libraries call the tensors of this network: patterns and what they become here, one after the other; or names -> names."""
    _convolutions: tuple[str, ...] | None = None
    _spatial_convolutions: tuple[str, ...] = ()
    _normalizations: tuple[str, ...] | None = None

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return logits (B, K) for images (B, C, H, W)."""
        return self.classifier(self.forward_features(x_BCHW))

    @abc.abstractmethod
    def forward_features(self, x_BCHW: Tensor) -> Tensor:
        """Return the pooled features (B, D) that the classifier sees, for images (B, C, H, W)."""

    def record_layers(self) -> None:
        """Note the names of the convolutions and normalizations as built.

        The names mark places of the architecture: they stay the same when a defence has replaced what stands there.
        """
        named = [(name, module) for name, module in self.named_modules() if not name.startswith("taps.")]
        self._convolutions = tuple(
            name for name, module in named if isinstance(module, nn.Conv2d) and SIDE_BRANCHES.isdisjoint(name.split("."))
        )
        # Noted here, because a layer that a defence puts in the place of a convolution is none by its type.
        self._spatial_convolutions = tuple(name for name, module in named if name in self._convolutions and max(_kernel_size(module)) > 1)
        self._normalizations = tuple(name for name, module in named if isinstance(module, nn.BatchNorm2d))

    def main_path_convolutions(self) -> list[str]:
        """Return the dotted names of the convolutions of the main path, in forward order, the stem first.

        Convolutions of shortcuts do not count, 1x1 convolutions inside a block do.
        """
        assert self._convolutions is not None, "the constructor of a backbone ends with record_layers()"
        return list(self._convolutions)

    def spatial_convolutions(self) -> list[str]:
        """Return the names of the main path's convolutions whose kernel was built larger than 1x1, in forward order."""
        return list(self._spatial_convolutions)

    @property
    def stem_convolution(self) -> str:
        """The dotted name of the first convolution.

        Raises:
            UserError: the backbone has no convolution.
        """
        names = self.main_path_convolutions()
        if not names:
            raise UserError(f"{type(self).__name__} has no convolution, so it has no stem convolution.")
        return names[0]

    def normalization_layers(self) -> list[str]:
        """Return the dotted names of all BatchNorm2d layers, those of shortcuts included, in forward order."""
        assert self._normalizations is not None, "the constructor of a backbone ends with record_layers()"
        return list(self._normalizations)

    def feature_shapes(self, image_shape: ImageShape) -> dict[str, tuple[int, int, int]]:
        """Return the (C, H, W) of the feature map that enters each tap, for images of shape (C, H, W).

        One forward of a zero image in eval mode; the mode of every module is restored, no buffer changes.
        """
        shapes: dict[str, tuple[int, int, int]] = {}

        def note(key: str, tap: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            _, channels, height, width = inputs[0].shape
            shapes[key] = (channels, height, width)

        hooks = [tap.register_forward_pre_hook(partial(note, key)) for key, tap in self.taps.items()]
        try:
            with probed(self, image_shape) as x_BCHW:
                self.forward_features(x_BCHW)
        finally:
            for hook in hooks:
                hook.remove()
        return {key: shapes[key] for key in self.taps}


@dataclass(frozen=True)
class BackboneEntry:
    """One line of a module's `BACKBONES` table.

    `build(num_classes, image_shape, **options)` returns a `Backbone`; its keyword-only parameters are the options.
    A family (`is_family`) stands for many architectures of one source: its users write `family:variant`, and its build
    function gets the part after the colon as the option `variant`.
    """

    build: Callable[..., Backbone]
    description: str
    aliases: tuple[str, ...] = ()
    is_family: bool = False


def _kernel_size(module: nn.Module) -> tuple[int, ...]:
    return module.kernel_size if isinstance(module, nn.Conv2d) else (0,)


def identity_taps(count: int) -> nn.ModuleDict:
    """Return taps "0" to "count - 1", each an `nn.Identity`."""
    return nn.ModuleDict({str(position): nn.Identity() for position in range(count)})


def resolve_stem(stem: Stem, image_shape: ImageShape) -> Literal["cifar", "imagenet"]:
    """Turn `auto` into `cifar` for images of at most 64 x 64 pixels and `imagenet` for larger ones.

    Raises:
        UserError: `stem` is none of auto, cifar, imagenet.
    """
    if stem not in get_args(Stem):
        raise unknown_name("stem", stem, get_args(Stem))
    if stem == "auto":
        return "cifar" if max(image_shape[1:]) <= LARGEST_CIFAR_STEM_IMAGE else "imagenet"
    return stem


def initialize_convolutions(root: nn.Module) -> None:
    """Draw the weights of every Conv2d from N(0, 2 / fan_out) and set its bias to zero.

    Reference: He et al., Delving Deep into Rectifiers, section 2.2.
    """
    for module in root.modules():
        # Weights on the meta device have no values; the first random fill there costs seconds of imports.
        if isinstance(module, nn.Conv2d) and not module.weight.is_meta:
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def initialize_classifier(classifier: nn.Linear, std: float | None = None) -> None:
    """Set the bias to zero and, where `std` is given, draw the weight from N(0, std^2)."""
    if std is not None and not classifier.weight.is_meta:
        nn.init.normal_(classifier.weight, std=std)
    nn.init.zeros_(classifier.bias)
