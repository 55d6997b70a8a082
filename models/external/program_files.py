"""Networks that are a file by themselves: TorchScript, and what `torch.export` saved."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from models.errors import UserError
from models.external.state_files import is_torchscript
from models.file_content import existing_file


class Program(nn.Module):
    """A network that is a finished program: it has no modes, and its weights are those of the file.

    Args:
        program: as it was loaded.
    """

    def __init__(self, program: Any) -> None:
        super().__init__()
        self.program = program
        for module in self.modules():  # set, not asked: a program of torch.export refuses `eval()`
            module.training = False

    def train(self, mode: bool = True) -> Self:
        """Leave the program in inference mode, which is the one that it can be judged in."""
        del mode
        return self

    def forward(self, x_BCHW: torch.Tensor) -> Any:
        return self.program(x_BCHW)


def torchscript(path: Path) -> nn.Module:
    """Return a network that `torch.jit.save` wrote. Its program runs in PyTorch's interpreter, which executes no Python.

    Raises:
        UserError: the file is no such network.
    """
    path = existing_file(path, "model")
    if not is_torchscript(path):
        raise UserError(
            f"{path} is no TorchScript file. If it holds weights, name the network that they are for: "
            f"`rayndom evaluate FILE.py:CALLABLE --weights {path.name} --data NAME`"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TorchScript is deprecated, which whoever has such a file cannot mend here
            program = torch.jit.load(str(path), map_location="cpu")
    except Exception as error:  # a damaged archive fails in many ways
        raise UserError(f"cannot read the TorchScript file {path}: {' '.join(str(error).split())[:300]}") from None
    return Program(program.eval())


def exported_program(path: Path) -> nn.Module:
    """Return a network that `torch.export.save` wrote. Reading it can execute code that was put into it.

    Raises:
        UserError: the file is no such network.
    """
    path = existing_file(path, "model")
    try:
        with warnings.catch_warnings(), _nothing_logged():
            warnings.simplefilter("ignore")
            program = torch.export.load(str(path)).module()
    except Exception as error:  # another's code: any kind, and it is told
        raise UserError(
            f"cannot read the file {path} of torch.export: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        ) from None
    return Program(program)


@contextlib.contextmanager
def _nothing_logged() -> Iterator[None]:
    """Keep torch.export from logging the stack of what it then raises."""
    logger = logging.getLogger("torch.export")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
