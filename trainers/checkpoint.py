"""The resumable state of a run and how it is written: atomically, into a folder that also holds the model for use.

A checkpoint folder holds `training.pt` (weights, optimizer, streams, draws, progress; loaded with `weights_only=True`).
"""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from models.errors import UserError
from models.files import whole_file

STATE_FILE = "training.pt"


def write_state(state: dict[str, Any], folder: Path) -> Path:
    """Write `state` to `folder`. A full disk or a kill leaves the previous file as it was.

    Raises:
        OSError: the disk is full or the folder cannot be written.
    """
    path = folder / STATE_FILE
    try:
        with whole_file(path) as file:
            torch.save(state, file)
    except RuntimeError as error:
        # PyTorch's zip writer reports a full disk as a RuntimeError.
        raise OSError(f"cannot write the checkpoint {path}: {error}") from error
    return path


def read_state(folder: Path) -> dict[str, Any]:
    """Read what `write_state` wrote.

    Raises:
        UserError: the file is missing, truncated or not a checkpoint.
    """
    path = folder / STATE_FILE
    if not path.is_file():
        raise UserError(f"no checkpoint in {folder}: {STATE_FILE} is missing")
    try:
        if not zipfile.is_zipfile(path):
            raise EOFError("it is not whole")
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        raise UserError(f"cannot read the checkpoint {path}: {error}. Delete the folder to train from the beginning.") from error
