"""The one door through which every JSON file comes in: an object, as UTF-8, of a bounded size and depth."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from models.errors import UserError
from models.file_content import read_content

MOST_BYTES = 200_000_000
"""Of one file; the longest that are written hold the per-sample results of an evaluation."""


def read_json(path: Path) -> dict[str, Any]:
    """Return the object that a JSON file holds.

    Raises:
        UserError: it cannot be read, is not UTF-8, not JSON, nested too deeply, or holds something else than an object.
    """
    try:
        text = read_content(path, MOST_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is damaged: not UTF-8 text (byte {error.start})") from None
    try:
        content = json.loads(text)
    except RecursionError:
        raise UserError(f"{path} is damaged: nested too deeply") from None
    except ValueError as error:
        raise UserError(f"cannot read {path}, it is damaged: not JSON ({error})") from None
    if not isinstance(content, dict):
        kind = {list: "a list", str: "text", bool: "a truth value", type(None): "null"}.get(type(content), "a number")
        raise UserError(f"{path} is damaged: it should hold an object of named values, it holds {kind}")
    return content


def first_problem(error: ValidationError) -> str:
    """Return in a few words where and why content does not fit, for the message about the file that it came from."""
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"]))[:200]
    return f"{where}: {first['msg'].removeprefix('Value error, ')}"[:400]


__all__ = ["first_problem", "read_json"]
