"""Files that are named to be read: where they lie, that they are there, ordinary and of a bounded size, and what they hold. A pipe would
wait for ever, a device never end."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from pathlib import Path

from models.errors import UserError, nearest

_MOST_SEEN = 2000  # names of a folder among which near ones are looked for
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


def expanded(path: str | Path) -> Path:
    """Return a path with `~` replaced by the home folder of the user.

    Raises:
        UserError: that folder is not known, or the path holds a null byte.
    """
    if "\0" in str(path):
        raise UserError(f"{str(path)[:300]!r} is no path: it holds a null byte")
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"{str(path)[:300]}: the home folder of that user is not known here; write the whole path") from None


def absolute(path: str | Path) -> Path:
    """Return a path as `expanded` does, from the root of the file system.

    Raises:
        UserError: as `expanded`, or the folder that one is in was deleted.
    """
    try:
        return expanded(path).absolute()
    except FileNotFoundError:
        raise UserError(f"{path} is a path from the folder that this command was started in, which was deleted") from None


def folder_here(path: str | Path, what: str) -> Path:
    """Return a folder that is to lie on this machine as `absolute` does.

    Args:
        what: names it in messages, e.g. a flag.

    Raises:
        UserError: as `absolute`, or it is an address: a folder of that name would be made here, and nobody would find it.
    """
    found = _ADDRESS.match(str(path))
    if found:
        raise UserError(f"{what} {str(path)[:300]!r} is no folder of this machine but an address ({found[0]}...)")
    return absolute(path)


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


def existing_file(path: str | Path, what: str) -> Path:
    """Return a file's absolute path.

    Args:
        what: the file's part in the command, for the error, e.g. `weights`.

    Raises:
        UserError: it is not there (near names of its folder are said), or is no ordinary file.
    """
    path = absolute(path)
    try:
        missing = not path.exists()
    except (OSError, ValueError) as error:  # a name that is too long, or holds a null byte
        raise UserError(f"{what}: cannot read {str(path)[:300]}: {error}") from None
    if not missing:
        check_ordinary(path)
        return path
    close = nearest(path.name[:300], _names_beside(path))
    hint = f" Did you mean {' or '.join(repr(name) for name in close)}?" if close else ""
    raise UserError(f"{what}: there is no file {str(path)[:300]}.{hint}")


def _names_beside(path: Path) -> list[str]:
    try:
        names = (each.name for each, _ in zip(path.parent.iterdir(), range(_MOST_SEEN), strict=False))
        return [name for name in names if not name.startswith(".") or path.name.startswith(".")]
    except (OSError, ValueError):
        return []


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, as `sha256sum` prints it.

    Raises:
        UserError: it is no ordinary file, or cannot be read.
    """
    check_ordinary(path)
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(f"cannot read {str(path)[:300]}: {getattr(error, 'strerror', None) or error}")


__all__ = ["absolute", "check_ordinary", "existing_file", "expanded", "folder_here", "read_content", "sha256_of"]
