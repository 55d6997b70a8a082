"""Modes of a model in which batch statistics are used but not recorded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal

from torch import nn

AttackMode = Literal["train", "eval", "train_without_update"]


@contextlib.contextmanager
def mode(model: nn.Module, name: AttackMode) -> Iterator[None]:
    """Put `model` in a mode and restore the mode of every submodule afterwards, also after an exception.

    Args:
        model: any module.
        name: `train`; `eval`; `train_without_update`: normalizations use batch statistics and leave running ones alone.
            A module takes part if it has the attribute `track_running_stats`, as PyTorch's normalizations do.
    """
    training = [(module, module.training) for module in model.modules()]
    tracking = [(module, module.track_running_stats) for module in model.modules() if hasattr(module, "track_running_stats")]
    try:
        model.train(name != "eval")
        if name == "train_without_update":
            for module, _ in tracking:
                module.track_running_stats = False
        yield
    finally:
        for module, was_training in training:
            module.training = was_training
        for module, was_tracking in tracking:
            module.track_running_stats = was_tracking
