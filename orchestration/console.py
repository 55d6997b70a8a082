"""The only place that prints: tables, live lines, errors. Plain lines when the output is not a terminal."""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TextIO

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from orchestration.table_layout import layout_of

_out = Console(highlight=False, emoji=False, soft_wrap=not sys.stdout.isatty(), width=None if sys.stdout.isatty() else 160)
_err = Console(stderr=True, highlight=False, emoji=False, soft_wrap=not sys.stderr.isatty(), width=None if sys.stderr.isatty() else 160)
_state = {"json": False, "quiet": False}
_results: list[TextIO] = []


def use_json(enabled: bool) -> None:
    """Print machine-readable results only: everything else goes to the error stream."""
    _state["json"] = enabled


def use_quiet(enabled: bool) -> None:
    """Print results, warnings and errors alone: no progress, no remarks, no hints on what to do next."""
    _state["quiet"] = enabled


@contextlib.contextmanager
def results_alone() -> Iterator[None]:
    """Within, where JSON was asked for, what other code prints goes to the error stream: a user's own network may print."""
    if not _state["json"]:
        yield
        return
    _results.append(sys.stdout)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        _results.pop()


def is_terminal() -> bool:
    """Return whether a person watches."""
    return _out.is_terminal and not _state["json"] and not _state["quiet"] and os.environ.get(LOG_VARIABLE) != "json"


LOG_VARIABLE = "RAYNDOM_LOG_FORMAT"


def _log(level: str, message: str, **more: Any) -> bool:
    """Write a line of the log as JSON where RAYNDOM_LOG_FORMAT asks for it; return whether it does."""
    if os.environ.get(LOG_VARIABLE) != "json":
        return False
    line = {"time": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"), "level": level, "message": message}
    sys.stderr.write(json.dumps(_finite(line | more), default=str, allow_nan=False) + "\n")
    sys.stderr.flush()
    return True


def say(message: str = "") -> None:
    """Print a line for people, or for a log."""
    if _state["quiet"] or _log("info", message):
        return
    (_err if _state["json"] else _out).print(message, markup=False)


def error(message: str) -> None:
    """Print an error."""
    if _log("error", message):
        return
    _err.print(f"error: {message}", markup=False, style="red" if _err.is_terminal else None)


def warn(message: str) -> None:
    """Print a warning."""
    if _log("warning", message):
        return
    _err.print(f"warning: {message}", markup=False, style="yellow" if _err.is_terminal else None)


def text(content: str) -> None:
    """Print text as it is, for a file or another program: nothing is wrapped or styled."""
    out = _results[-1] if _results else sys.stdout
    out.write(content if content.endswith("\n") else content + "\n")
    out.flush()


def result(value: Any) -> None:
    """Print a JSON result when JSON was asked for."""
    if _state["json"]:
        text(json.dumps(_finite(value), indent=2, default=str, allow_nan=False))


def name_of(words: str) -> str:
    """Return the heading of a column as the key of a JSON object: `mean |cosine|` is `mean_absolute_cosine`."""
    return re.sub(r"\W+", "_", re.sub(r"\|(\w+)\|", r"absolute \1", words)).strip("_")


def named(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return rows of a table as objects of JSON, whose keys are names."""
    return [{name_of(heading): value for heading, value in row.items()} for row in rows]


def _finite(value: Any) -> Any:
    """Return the value with null for numbers that JSON does not have."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _finite(each) for key, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, list | tuple) else value


def table(title: str | None, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print a table; numbers align right."""
    rows = [list(row) for row in rows]
    if not _log("info", title or "", columns=list(columns), rows=rows):
        console = _err if _state["json"] else _out
        console.print(_table(title, columns, rows, console.width))


def _table(title: str | None, columns: Sequence[str], rows: Sequence[Sequence[Any]], screen: int) -> Table:
    layout = layout_of(columns, [[_cell(value) for value in row] for row in rows], screen)
    built = Table(
        title=None if title is None else escape(title), title_justify="left", header_style="bold", expand=False, padding=(0, layout.padding)
    )
    for index, (heading, width) in enumerate(zip(layout.titles, layout.widths, strict=True)):
        numeric = bool(rows) and all(isinstance(row[index], int | float) for row in rows)
        built.add_column(escape(heading), justify="right" if numeric else "left", overflow="fold", width=width)
    for row in layout.rows:
        built.add_row(*map(escape, row))
    return built


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)


def duration(seconds: float) -> str:
    """Return e.g. `48 s`, `3 min 20 s`, `2 h 5 min`."""
    seconds = max(0, round(seconds))
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60} min"


class Board:
    """A table that stays on the screen and is renewed; without a terminal, one line with the time of day per event instead."""

    def __init__(self, title: str, columns: Sequence[str]) -> None:
        self.title, self.columns = title, columns
        self._live = Live(console=_out, auto_refresh=False, transient=False) if is_terminal() else None
        self._last = 0.0

    def __enter__(self) -> Board:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.refresh()
            self._live.stop()

    def show(self, rows: Sequence[Sequence[Any]], caption: str, event: str | None = None) -> None:
        """Renew the table (at most ten times a second), or print the event."""
        if self._live is None:
            if event:
                say(f"{time.strftime('%H:%M:%S')}  {event}")
            return
        if event is None and time.monotonic() - self._last < 0.1:
            return
        self._last = time.monotonic()
        built = _table(self.title, self.columns, rows, _out.width)
        built.caption = escape(caption)
        built.caption_justify = "left"
        self._live.update(built, refresh=True)


def without_passwords(text: str) -> str:
    """Return text with what stands before the host of an address left out: users and passwords."""
    return re.sub(r"://[^/\s']+@", "://", text)
