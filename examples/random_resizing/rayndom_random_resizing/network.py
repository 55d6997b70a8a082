"""The random layer, and how it is put in front of a network. Needs nothing of Rayndom but `models`: an export loads without Ray."""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from models.backbones.base import Backbone, ImageShape
from models.configuration import Config
from models.errors import UserError
from models.host_mirror import HostMirror
from models.positions import tap
from models.randomness import RandomModule
from models.registry import DefenceModel


class RandomResizingConfig(Config):
    """Parameters of random resizing and padding."""

    growth: float = Field(331 / 299, gt=1, le=2, description="Side of the padded image over that of the image; the paper's is 331/299.")


class RandomResizing(RandomModule):
    """Resize a batch to a random side and put it at a random place of a larger square of zeros.

    Args:
        side: S of the images. growth: the square has side ceil(growth * S).

    Reference: Xie et al. 2018, section 3.2. The side is uniform in [S, ceil(growth * S)), the place uniform.
    Deviation: zeros are put into the normalized image, and one draw serves a whole batch.
    """

    place: Tensor

    def __init__(self, side: int, growth: float) -> None:
        super().__init__("global")
        self.square = math.ceil(growth * side)
        if self.square <= side:
            raise UserError(
                f"random_resizing: growth {growth:g} leaves images of side {side} as they are; at least {(side + 1) / side:.4g}"
            )
        self.sides = range(side, self.square)
        self.register_draw("place", torch.zeros(3, dtype=torch.int64))
        self.mirror = HostMirror()
        self.take_first_draw()

    @property
    def num_configurations(self) -> int:
        """Sides and places."""
        return sum(self._places(side) ** 2 for side in self.sides)

    def _places(self, side: int) -> int:
        return self.square - side + 1

    def draw(self, generator: torch.Generator) -> None:
        """Take a side, then a place for it."""
        side = self.sides[int(torch.randint(len(self.sides), (), generator=generator))]
        top, left = torch.randint(self._places(side), (2,), generator=generator).tolist()
        self.set_draw("place", torch.tensor([side, top, left]))

    def set_configuration(self, index: int) -> None:
        """Count through sides, and for each through its places."""
        for side in self.sides:
            count = self._places(side) ** 2
            if index < count:
                self.set_draw("place", torch.tensor([side, index // self._places(side), index % self._places(side)]))
                return
            index -= count
        raise IndexError("no such configuration")

    def configuration_probability(self, index: int) -> float:
        """Return the probability of a configuration: all sides are equally likely, and all places of a side."""
        for side in self.sides:
            count = self._places(side) ** 2
            if index < count:
                return 1 / (len(self.sides) * count)
            index -= count
        raise IndexError("no such configuration")

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return images (B, C, square, square)."""
        side, top, left = self.mirror.read(self.place)
        if x_BCHW.shape[-1] != side:
            x_BCHW = functional.interpolate(x_BCHW, size=(side, side), mode="nearest")
        rest = self.square - side
        return functional.pad(x_BCHW, (left, rest - left, top, rest - top))


def put_in_front(backbone: Backbone, config: RandomResizingConfig, image_shape: ImageShape) -> None:
    """Put the layer on the image that a backbone sees."""
    backbone.taps[tap(backbone, 0)] = RandomResizing(max(image_shape[1:]), config.growth)


DEFENCE_MODELS = (DefenceModel("random_resizing", "Random resizing and padding of the image", RandomResizingConfig, put_in_front),)
