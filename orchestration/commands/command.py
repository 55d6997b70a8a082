"""What a command is."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """One verb of the command line.

    Attributes:
        name, summary, examples: for the help.
        add_arguments: adds its arguments to a parser.
        run: takes the parsed arguments, returns the exit code (None: 0).
        takes_fields: whether further `--section.field value` flags are fields of an experiment or a sweep.
    """

    name: str
    summary: str
    examples: tuple[str, ...]
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int | None]
    takes_fields: bool = False


def add_data_root(parser: argparse.ArgumentParser) -> None:
    """Add `--data-root`."""
    parser.add_argument("--data-root", help="folder of the data sets (default: RAYNDOM_DATA, else ./data)")
