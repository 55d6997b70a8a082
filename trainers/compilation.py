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

LEAST_PASSES = 100_000
"""Forward passes of a batch in a run that are worth a compilation of about a minute, at a tenth of a second each or less."""

_COMPILERS = ("c++", "g++", "clang++", "cl")

_logger = logging.getLogger(__name__)


def reason_for_eager(setting: Compile, device: torch.device, objective: ObjectiveConfig, num_passes: float) -> str | None:
    """Return why steps are not compiled; None: they are; empty: nobody asked.

    `auto` compiles on CUDA devices where Triton is there and the run is long. On a CPU it does not: see docs/training.md.

    Args:
        num_passes: forward passes of a batch in the whole run.
    """
    if setting == "off" or (setting == "auto" and (device.type != "cuda" or num_passes < LEAST_PASSES)):
        return ""
    if not objective.is_compilable:
        reason = f"objective {objective.name} differentiates twice, or computes with other weights than the model's own"
    elif device.type == "cpu" and not (os.environ.get("CXX") or any(shutil.which(name) for name in _COMPILERS)):
        reason = "this machine has no C++ compiler"
    elif device.type == "cuda" and importlib.util.find_spec("triton") is None:
        reason = "Triton is not installed"
    else:
        return None
    return reason if setting == "on" else ""


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
    model: nn.Module, setting: Compile, device: torch.device, objective: ObjectiveConfig, num_passes: float
) -> Callable[[], contextlib.AbstractContextManager[None]]:
    """Return the context of a training's steps: compiled or eager; the latter is said once where it was asked otherwise."""
    reason = reason_for_eager(setting, device, objective, num_passes)
    if reason is None:
        return CompiledForward(model)
    if reason:
        _logger.warning("training.compile is on, but steps are not compiled: %s", reason)
    return contextlib.nullcontext
