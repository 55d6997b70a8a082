"""How results show themselves in a notebook: small tables of text that is never markup."""

from __future__ import annotations

import base64
import sys
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import pandas
from matplotlib.figure import Figure

from analysis.reporting.figure_style import figure_as_png
from orchestration.recipes import parse_overrides


def show_figures() -> None:
    """Let the notebook that this process belongs to show figures, with or without `%matplotlib inline`; elsewhere nothing happens."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    if shell is not None:
        shell.display_formatter.formatters["image/png"].for_type(Figure, _as_png)


def _as_png(figure: Figure) -> bytes:
    return base64.b64decode(figure_as_png(figure))


show_figures()


def as_html(title: str, facts: Mapping[str, Any], frame: pandas.DataFrame | None = None) -> str:
    """Return a title, facts in one line each, and a table."""
    lines = [f"<tr><th style='text-align:left'>{escape(name)}</th><td>{escape(_text(value))}</td></tr>" for name, value in facts.items()]
    rows = "".join(lines)
    table = "" if frame is None else frame.to_html(index=False, float_format=lambda value: f"{value:.4g}")
    return f"<div><strong>{escape(title)}</strong><table>{rows}</table>{table}</div>"


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def as_flags(fields: Mapping[str, Any]) -> list[str]:
    """Return dotted fields and values as the flags of a command line."""
    return [word for name, value in fields.items() for word in (f"--{name}", _typed(value))]


def as_overrides(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return dotted fields and values as a command line's flags are read."""
    return parse_overrides(as_flags(fields))


def _typed(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str | int | float):
        return str(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_typed(each)}" for key, each in value.items()) + "}"
    if isinstance(value, Sequence):
        return "[" + ", ".join(map(_typed, value)) + "]"
    raise TypeError(f"a value of a field is text, a number, a list or a mapping, not {type(value).__name__}")
