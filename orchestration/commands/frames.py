"""Frames on the way out: as tables in the terminal, or as text for papers and programs."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from analysis.reporting.tables import columns_of, to_csv, to_latex, to_markdown
from orchestration import console

Format = Literal["table", "markdown", "latex", "csv", "json"]
FORMATS: tuple[Format, ...] = ("table", "markdown", "latex", "csv", "json")


def add_format(parser: argparse.ArgumentParser) -> None:
    """Add `--format`."""
    parser.add_argument("--format", choices=FORMATS, default="table", help="how results are printed (default table)")


def begin(arguments: argparse.Namespace) -> Format:
    """Return the format asked for. With any but tables, only results go to the output, everything else to the error stream."""
    chosen: Format = "json" if arguments.json else arguments.format
    console.use_json(chosen != "table")
    return chosen


def show_frame(title: str, rows: Sequence[Mapping[str, Any]], chosen: Format) -> None:
    """Print one frame; JSON is printed by the command, whole."""
    if chosen == "json":
        return
    if chosen == "table":
        columns = columns_of(rows)
        console.table(title, columns, [[row.get(name) for name in columns] for row in rows])
    elif chosen == "markdown":
        console.text(f"### {title}\n\n{to_markdown(rows)}\n")
    elif chosen == "latex":
        console.text(to_latex(rows, caption=title) + "\n")
    else:
        console.text(f"# {title}\n{to_csv(rows)}\n")
