"""Methods and settings as a matrix of text, narrow enough for a terminal of 80 columns."""

from __future__ import annotations

from orchestration.recipes.library import method_files, setting_files
from orchestration.recipes.names import RecipeName, listed_recipes

WIDTH = 79
LISTED, WITH_VARIANTS, OTHER = "x", "v", "."
_MOST_COLUMNS = 26


def matrix_lines() -> list[str]:
    """Return the matrix: a row per method, a column per setting, below it the variants and how names are made.

    Settings beyond 26 columns go into a further matrix.
    """
    listed = listed_recipes()
    settings = sorted(setting_files())
    lines: list[str] = []
    for start in range(0, len(settings), _MOST_COLUMNS):
        lines += _matrix(settings[start : start + _MOST_COLUMNS], listed)
        lines.append("")
    lines.append("a recipe is <method>_<setting>, as ctrw_digits, or <method>_<setting>_<variant>")
    lines.append(f"{LISTED} listed   {WITH_VARIANTS} listed, with variants   {OTHER} works as well, but no paper used it")
    lines += _variants(listed)
    lines.append("`rayndom list methods` and `rayndom list settings` say what they are")
    return lines


def _matrix(settings: list[str], listed: list[RecipeName]) -> list[str]:
    letters = [chr(ord("A") + index) for index in range(len(settings))]
    methods = sorted(method_files())
    room = WIDTH - 2 * len(settings) - 1
    width = min(max(map(len, methods), default=0), room)
    lines = _legend(letters, settings)
    lines.append(f"{'':{width}} {' '.join(letters)}")
    for method in methods:
        cells = " ".join(_cell(method, setting, listed) for setting in settings)
        shown = method if len(method) <= width else f"{method[: width - 2]}.."
        lines.append(f"{shown:{width}} {cells}")
    return lines


def _legend(letters: list[str], settings: list[str]) -> list[str]:
    """Return the letters' meanings, in as many columns as fit."""
    entries = [f"{letter} {setting}" for letter, setting in zip(letters, settings, strict=True)]
    width = max(map(len, entries), default=0) + 2
    columns = max(1, WIDTH // width)
    height = -(-len(entries) // columns)
    return ["".join(f"{entry:{width}}" for entry in entries[row::height]).rstrip() for row in range(height)] + [""]


def _cell(method: str, setting: str, listed: list[RecipeName]) -> str:
    variants = [each.variant for each in listed if each.method == method and each.setting == setting]
    return OTHER if not variants else LISTED if not any(variants) else WITH_VARIANTS


def _variants(listed: list[RecipeName]) -> list[str]:
    by_method: dict[str, dict[str, None]] = {}
    for each in listed:
        if each.variant:
            by_method.setdefault(each.method, {})[each.variant] = None
    return [f"variants of {method}: {', '.join(names)}"[:WIDTH] for method, names in sorted(by_method.items())]


__all__ = ["matrix_lines"]
