"""How files are written: a file is whole or as it was."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, TypeVar

Entry = TypeVar("Entry")

_logger = logging.getLogger(__name__)

UNFINISHED = ".part"
"""How the names of files end that are being written, or were when their process was killed; they begin with a dot."""


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[BinaryIO]:
    """Give a binary file to write to, which becomes `path` at the end: readers see the old content or the new one, never a part.

    What is written is on the disk (`fsync`) before it gets its name, so it survives a power cut. An exception, a full disk or a kill
    leave the previous file as it was. Permissions follow the umask. Several processes may write the same path: the last one to end wins.
    What a killed process left half-written is removed by the next one that writes the same path.

    Args:
        path: the file; its folder is made if it does not exist.

    Raises:
        OSError: the disk is full or the folder cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # At most 40 characters of the name: with up to four bytes each it stays below the 255 bytes of a file name.
    prefix = f".{path.name[:40]}."
    _remove_abandoned(path.parent, prefix)
    part, file = _begin(path.parent, prefix)
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(part, path)
    except RuntimeError as error:
        part.unlink(missing_ok=True)
        # A library that cannot write may say it in its own words, as PyTorch's "unexpected pos 64 vs 0" on a full disk.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
    except BaseException:  # Ctrl-C too must not leave the part behind; whatever it was goes on
        part.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def write_text(path: str | Path, text: str) -> Path:
    """Write a text file as `whole_file` does, in UTF-8, and return its path."""
    path = Path(path)
    with whole_file(path) as file:
        file.write(text.encode())
    return path


def put_in_place(part: Path, path: Path) -> None:
    """Give a finished file beside `path`, one that a library wrote, the name `path`, as `whole_file` does with what it is given.

    Raises:
        OSError: the disk is full or the folder cannot be written.
    """
    with part.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(part, path)
    _sync_folder(path.parent)


def put_folder_in_place(part: Path, path: Path) -> None:
    """Give a finished folder beside `path` the name `path`, which nothing has yet.

    Raises:
        OSError: the name is taken, or the folder above cannot be written.
    """
    os.rename(part, path)
    _sync_folder(path.parent)


def is_unfinished(path: Path) -> bool:
    """Return whether a file is one that `whole_file` is writing, or was writing when its process was killed."""
    return path.name.startswith(".") and path.name.endswith(UNFINISHED)


def _begin(folder: Path, prefix: str) -> tuple[Path, BinaryIO]:
    """Create and lock a file of a name that nobody else has."""
    while True:
        part = folder / f"{prefix}{secrets.token_hex(8)}{UNFINISHED}"
        file = os.fdopen(os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), "w+b")
        # Where locks do not exist (some network folders) nothing is ever taken for abandoned, see below.
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:
            return part, file
        file.close()  # Another process found it between its creation and the lock.


def _remove_abandoned(folder: Path, prefix: str) -> None:
    """Remove the unfinished files that no living process holds: a process that ends, however it ends, gives up its lock."""
    for entry in os.scandir(folder):
        if not (entry.name.startswith(prefix) and entry.name.endswith(UNFINISHED)):
            continue
        # Gone meanwhile, held by its writer, or in a folder without locks: not ours to remove.
        with contextlib.suppress(OSError), open(entry.path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(entry.path)


def _sync_folder(folder: Path) -> None:
    """Put the new name itself on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
