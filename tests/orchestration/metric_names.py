"""Which metrics docs/metrics.md explains."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"


def explained() -> dict[str, re.Pattern[str]]:
    """The names on the page, each with the pattern that it stands for: a word in angle brackets is anything."""
    names = re.findall(r"^\| `([^`]+)` \|", PAGE.read_text(), re.MULTILINE)
    return {name: re.compile(re.sub(r"<\w+>", ".+", re.sub(r"[.+*?()\[\]]", r"\\\g<0>", name))) for name in names}


def unexplained(names):
    """Those of `names` that are not on the page, by their own name or by a pattern."""
    patterns = list(explained().values())
    return sorted(name for name in names if not any(pattern.fullmatch(name) for pattern in patterns))
