"""Steps of a training as compiled code (`torch.compile`): when, and how.

Draws are data of the compiled code, not part of it: layers keep them in buffers, and a redraw exchanges a buffer. So one compilation serves
all draws. Attack step and training step are compiled each for itself, for one asks for gradients of the images and one for those of the
weights. What validates, measures and saves stays eager: it comes with other modes and sizes, each of which would be compiled anew.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import nn

from trainers.objective import ObjectiveConfig

Compile = Literal["auto", "off", "on"]

_COMPILERS = ("c++", "g++", "clang++", "cl")

_logger = logging.getLogger(__name__)


def reason_for_eager(setting: Compile, device: torch.device, objective: ObjectiveConfig) -> str | None:
    """Return why steps are not compiled; None: they are; empty: nobody asked.

    `auto` is for devices where compiled steps were seen to pay; so far there is none: see docs/training.md.
    """
    if setting != "on":
        return ""
    if not objective.is_compilable:
        reason = f"objective {objective.name} differentiates twice, or computes with other weights than the model's own"
    elif device.type == "cpu" and not (os.environ.get("CXX") or any(shutil.which(name) for name in _COMPILERS)):
        reason = "this machine has no C++ compiler"
    elif device.type == "cuda" and importlib.util.find_spec("triton") is None:
        reason = "Triton is not installed"
    else:
        return None
    return reason


class CompiledForward:
    """`with compiled: ...`: calls of the model inside run compiled code, made at the first of them.

    Args:
        model: whose `forward` is compiled; copies and saved weights of it know nothing of it.
        backend: of `torch.compile`.
    """

    def __init__(self, model: nn.Module, backend: str = "inductor") -> None:
        self.model = model
        self._forward = torch.compile(functools.partial(type(model).forward, model), dynamic=False, backend=backend)

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """Run compiled code inside."""
        self.model.__dict__["forward"] = self._forward  # an attribute of the instance hides the method of its class
        try:
            yield
        finally:
            del self.model.__dict__["forward"]


def compiled_steps(
    model: nn.Module, setting: Compile, device: torch.device, objective: ObjectiveConfig
) -> Callable[[], contextlib.AbstractContextManager[None]]:
    """Return the context of a training's steps: compiled or eager; the latter is said once where it was asked otherwise."""
    reason = reason_for_eager(setting, device, objective)
    if reason is None:
        return CompiledForward(model)
    if reason:
        _logger.warning("training.compile is on, but steps are not compiled: %s", reason)
    return contextlib.nullcontext
