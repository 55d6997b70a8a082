"""What a layer says of its cost where the operations that it happens to compute with do not say it.

A layer answers by having the method, so that nobody has to know it by its class.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class CountsMacs(Protocol):
    """A layer of which one form computes more than another, or than its paper's."""

    def macs_for(self, output: Tensor) -> int:
        """Return the multiply-accumulates that the layer, as its paper writes it, needs for this output."""


@runtime_checkable
class GeneratesWeights(Protocol):
    """A module that makes the weights of other layers out of parameters of its own."""

    def generate_now(self) -> tuple[Tensor, ...]:
        """Return the generated weights, computed from the present parameters whatever is kept of an earlier time."""
