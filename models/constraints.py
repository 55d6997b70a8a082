"""Constraints on parameters that hold after every optimizer step."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import nn


@runtime_checkable
class Constrained(Protocol):
    """A module whose parameters must stay in a set."""

    def constrain(self) -> None:
        """Move the parameters into the set, in place. Idempotent."""


def apply_constraints(model: nn.Module) -> None:
    """Call `constrain` of every constrained module: at construction and after each optimizer step."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Constrained):
                module.constrain()
