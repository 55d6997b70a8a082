"""What a home holds that no command needs any more: states of finished runs, files of Tune's own, leftovers of kills.

What trains now is left alone. Of a finished run weights, results and configuration stay: it is reused and evaluated like before. Weights
that runs kept on the way go where that is asked for.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from models.files import UNFINISHED
from orchestration import storage
from orchestration.home import Home, readable
from orchestration.run_folder import RunFolder
from orchestration.single_process import is_held
from trainers.checkpoint import STATE_FILE
from trainers.within_epoch import FOLDER as WITHIN_EPOCH

STATES = "states of finished runs, to train on from"
CHECKPOINTS = "weights of epochs that --keep-every leaves out"
OWN_FILES = "files of Tune's and Ray Train's own, of starts that are over"
LEFTOVERS = "what killed processes left half written"


@dataclass(frozen=True)
class Removable:
    """A file or folder that may go, and its bytes."""

    path: Path
    size: int


def removable(home: Home, *, keep_last: bool, keep_every: int | None = None) -> dict[str, list[Removable]]:
    """Return what may go, by kind.

    Args:
        keep_last: keep the state after the last epoch of finished runs.
        keep_every: of the weights that runs kept on the way (`checkpoints.every`) only those of every so many epochs stay; 0: none of them
            does; None: all do.
    """
    found: dict[str, list[Path]] = {STATES: [], CHECKPOINTS: [], OWN_FILES: [], LEFTOVERS: []}
    if keep_every is not None:
        for checkpoints in readable(_checkpoints_of, [RunFolder(path) for path in home.entries("runs/*")]):
            found[CHECKPOINTS] += [path for epoch, path in checkpoints.items() if keep_every == 0 or epoch % keep_every]
    if not keep_last:
        for states in readable(_states_of, [RunFolder(path) for path in home.entries("runs/*")]):
            found[STATES] += states
    busy = any(is_held(lock) for lock in home.entries("sweeps/*/lock")) or any(is_held(lock) for lock in home.entries("**/command.lock"))
    if not busy:
        found[OWN_FILES] = [*home.entries("sweeps/*/tune"), *home.entries("sweeps/*/train"), *home.entries("tune"), *home.entries("train")]
        found[LEFTOVERS] = [path for path in home.entries(f"**/.*{UNFINISHED}") if path.is_file()]
    return {kind: [Removable(path, _bytes(path)) for path in paths] for kind, paths in found.items() if paths}


def clean(found: Mapping[str, list[Removable]]) -> int:
    """Remove it, in the home's store as well; return the bytes that were freed here."""
    freed = 0
    for each in (item for items in found.values() for item in items):
        storage.forget(each.path)
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(each.path) if each.path.is_dir() else each.path.unlink()
            freed += each.size
    return freed


def _states_of(folder: RunFolder) -> list[Path]:
    """Return what is there to resume a run that is finished and whole; nothing of another."""
    if is_held(folder.lock) or folder.result() is None:
        return []
    return [path for path in (folder.path / STATE_FILE, folder.path / WITHIN_EPOCH) if path.exists()]


def kept_on_the_way(home: Home) -> int:
    """Return the bytes of the weights that runs kept on the way."""
    runs = [RunFolder(path) for path in home.entries("runs/*")]
    return sum(_bytes(path) for run in runs for path in run.checkpoints().values())


def _checkpoints_of(folder: RunFolder) -> dict[int, Path]:
    """Return what a run kept on the way; nothing of one that trains now."""
    return {} if is_held(folder.lock) else folder.checkpoints()


def _bytes(path: Path) -> int:
    return sum(_size_of(file) for file in _files(path))


def _files(path: Path) -> Iterator[Path]:
    if path.is_dir():
        yield from (each for each in path.rglob("*") if each.is_file() and not each.is_symlink())
    else:
        yield path


def _size_of(path: Path) -> int:
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return 0
