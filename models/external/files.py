"""Files that a user names: there, ordinary, and known by what they hold."""

from __future__ import annotations

import hashlib
from pathlib import Path

from models.errors import UserError, nearest
from models.file_content import absolute, check_ordinary

_MOST_SEEN = 2000  # names of a folder among which near ones are looked for


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
    if missing:
        close = nearest(path.name[:300], _names_beside(path))
        hint = f" Did you mean {' or '.join(repr(name) for name in close)}?" if close else ""
        raise UserError(f"{what}: there is no file {str(path)[:300]}.{hint}")
    check_ordinary(path)
    return path


def _names_beside(path: Path) -> list[str]:
    try:
        names = (each.name for each, _ in zip(path.parent.iterdir(), range(_MOST_SEEN), strict=False))
        return [name for name in names if not name.startswith(".") or path.name.startswith(".")]
    except (OSError, ValueError):
        return []


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, as `sha256sum` prints it."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {str(path)[:300]}: {error.strerror}") from None
