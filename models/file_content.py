"""The one way into a file that is read whole: an ordinary file of a bounded size. A pipe would wait for ever, a device never end."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from models.errors import UserError


def check_ordinary(path: Path) -> int:
    """Return the size of a file in bytes.

    Raises:
        UserError: it is not there, may not be looked at, or is a folder, a pipe, a device or a link that leads nowhere.
    """
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise _unreadable(path, error) from None
    if stat.S_ISDIR(status.st_mode):
        raise UserError(f"cannot read {str(path)[:300]}: it is a folder, where a file should be")
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"cannot read {str(path)[:300]}: it is no ordinary file, but a pipe, a socket or a device")
    return status.st_size


def read_content(path: Path, most_bytes: int) -> bytes:
    """Return the content of a file.

    Args:
        most_bytes: of a larger file nothing is read.

    Raises:
        UserError: it is no ordinary file, cannot be read, or is larger.
    """
    size = check_ordinary(path)
    if size > most_bytes:
        raise UserError(f"{path} is larger than {most_bytes // 1_000_000} MB, which no file of this kind is")
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(f"cannot read {str(path)[:300]}: {getattr(error, 'strerror', None) or error}")


__all__ = ["check_ordinary", "read_content"]
