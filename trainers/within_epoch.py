"""The state of a training between two steps of an epoch: what is written when a machine says that it will be taken away.

Every worker writes its own file, because running statistics and draws may differ between workers until the epoch ends. The two newest steps
are kept, so that a kill amid the writing leaves a step that all workers have. It is good for the same number of workers alone: with another
number the epoch begins again.
"""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from models.errors import first_line
from models.files import whole_file

_logger = logging.getLogger(__name__)
FOLDER = "within_epoch"
KEPT_STEPS = 2
_NAME = re.compile(r"(\d+)-(\d+)-(\d+)of(\d+)\.pt")
_PARTS = {
    "seed": int,
    "weights": dict,
    "optimizer": dict,
    "generators": dict,
    "randomness": dict,
    "totals": dict,
    "objective": dict,
    "clipped_steps": torch.Tensor,
    "seconds": float,
}
"""What such a state is made of."""


def write_within_epoch(state: dict[str, Any], folder: Path, epoch: int, step: int, rank: int, size: int) -> None:
    """Write a worker's state after `step` steps (from 1) of `epoch` (from 0), and forget its older ones.

    Raises:
        OSError: the disk is full or the folder cannot be written.
    """
    place = folder / FOLDER
    place.mkdir(parents=True, exist_ok=True)
    with whole_file(place / f"{epoch}-{step}-{rank}of{size}.pt") as file:
        torch.save(state, file)
    own = sorted(number for each, number, writer, workers in _states(folder) if (each, writer, workers) == (epoch, rank, size))
    for old in own[:-KEPT_STEPS]:
        (place / f"{epoch}-{old}-{rank}of{size}.pt").unlink(missing_ok=True)


def read_within_epoch(folder: Path, epoch: int, rank: int, size: int) -> tuple[int, dict[str, Any]] | None:
    """Return (finished steps, state of this worker) of the last step of `epoch` that all workers have written, None if there is none.

    A file that cannot be read counts as none: the epoch is then trained from its beginning.
    """
    steps = [step for each, step, _, workers in _states(folder) if (each, workers) == (epoch, size)]
    whole = [step for step in set(steps) if steps.count(step) == size]
    if not whole:
        return None
    try:
        state = torch.load(folder / FOLDER / f"{epoch}-{max(whole)}-{rank}of{size}.pt", map_location="cpu", weights_only=True)
    except Exception as error:  # a changed file makes PyTorch raise nearly anything; the epoch's beginning is always there
        _logger.warning("the state amid epoch %d in %s cannot be read, the epoch begins again: %s", epoch + 1, folder, first_line(error))
        return None
    fits = isinstance(state, dict) and all(isinstance(state.get(name), kind) for name, kind in _PARTS.items())
    return (max(whole), state) if fits else None


def forget_within_epoch(folder: Path) -> None:
    """Remove what was written within epochs: the epoch is over."""
    shutil.rmtree(folder / FOLDER, ignore_errors=True)


def _states(folder: Path) -> list[tuple[int, int, int, int]]:
    """Return (epoch, step, rank, number of workers) of each file."""
    place = folder / FOLDER
    names = [_NAME.fullmatch(path.name) for path in place.iterdir()] if place.is_dir() else []
    return [(int(found[1]), int(found[2]), int(found[3]), int(found[4])) for found in names if found]
