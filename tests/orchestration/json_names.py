"""What every result of `--json` is held to, in every test that runs a command: keys are names, and numbers are numbers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

NAME = re.compile(r"[\w./@:|+-]+")
PERCENT = re.compile(r"[-+]?[\d.,]+ ?%.*")


def problems(value: Any, labels: frozenset[str] = frozenset(), where: str = "") -> list[str]:
    """Return where a result has prose for a key, or a percentage in the place of a number.

    Args:
        labels: names that a user chose, which may be keys.
    """
    if isinstance(value, Mapping):
        labels |= frozenset(value["runs"]) if isinstance(value.get("runs"), Mapping) else frozenset()
        prose = [f"{where}/{key}" for key in value if str(key) not in labels and not NAME.fullmatch(str(key))]
        return prose + [found for key, each in value.items() for found in problems(each, labels, f"{where}/{key}")]
    if isinstance(value, list | tuple):
        return [found for each in value for found in problems(each, labels, f"{where}[]")]
    return [f"{where} is {value!r}"] if isinstance(value, str) and PERCENT.fullmatch(value) else []
