"""Modes of a model, changed for a while: for an attack, in which batch statistics may be used but not recorded, or for a probe."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import torch
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
    tracking = tracking_modules(model)
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


def tracking_modules(model: nn.Module) -> list[tuple[Any, bool]]:
    """Return the modules that may record batch statistics, each with whether it does now."""
    return [(module, module.track_running_stats) for module in model.modules() if hasattr(module, "track_running_stats")]  # type: ignore[misc] # by name


@contextlib.contextmanager
def probed(model: nn.Module, image_shape: tuple[int, int, int]) -> Iterator[torch.Tensor]:
    """Look into a model: give one image of zeros that it can be run on, without gradients and in eval mode, in which no buffer changes
    and, as always, no forward takes a draw. Afterwards every submodule is in its mode again, also after an exception.

    Args:
        model: any module with parameters; the image has their type and device.
        image_shape: (C, H, W).
    """
    like = next(model.parameters())
    with mode(model, "eval"), torch.no_grad():
        yield torch.zeros((1, *image_shape), dtype=like.dtype, device=like.device)
