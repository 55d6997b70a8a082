"""What a command is, the flags and tables that several share, and the fields of an experiment for their help."""

from __future__ import annotations

import argparse
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from models.errors import UserError
from orchestration import console

if TYPE_CHECKING:
    from pydantic import BaseModel

    from orchestration.home import Workplace


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


def whole_number(low: int, high: int) -> Callable[[str], int]:
    """Return the type of a flag that takes a whole number of a range, both ends included."""

    def read(text: str) -> int:
        if not re.fullmatch(r"[-+]?[0-9]{1,30}", text) or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text[:60]!r} is no whole number from {low} to {high}")
        return int(text)

    return read


def number(low: float, high: float, *, above: bool = False) -> Callable[[str], float]:
    """Return the type of a flag that takes a number of a range; `above`: the lower end itself is not in it."""

    def read(text: str) -> float:
        try:
            value = float(text) if re.fullmatch(r"[-+0-9.eE]{1,60}", text) else math.nan
        except ValueError:
            value = math.nan
        if not low <= value <= high or (above and value == low):
            raise argparse.ArgumentTypeError(f"{text[:60]!r} is no number {'above' if above else 'from'} {low:g} up to {high:g}")
        return value

    return read


SAMPLES, DRAWS, WORKERS = whole_number(1, 10_000_000), whole_number(1, 1_000_000), whole_number(1, 4096)
SEED, GPUS = whole_number(0, 2**63 - 1), number(0, 4096)


def add_data_root(parser: argparse.ArgumentParser) -> None:
    """Add `--data-root`."""
    parser.add_argument("--data-root", help="folder of the data sets (default: RAYNDOM_DATA, else ./data)")


def add_block_workers(parser: argparse.ArgumentParser) -> None:
    """Add `--workers`, `--gpus-per-worker` and `--address`: who runs the blocks of an evaluation."""
    parser.add_argument("--workers", type=WORKERS, help="Ray workers; 1: this process (default: one per core or GPU where it pays)")
    parser.add_argument("--gpus-per-worker", type=GPUS, default=0, help="share of a GPU for each worker (default 0)")
    parser.add_argument("--address", help="Ray cluster (default: RAY_ADDRESS, else local)")


def add_wait(parser: argparse.ArgumentParser) -> None:
    """Add `--wait`."""
    parser.add_argument("--wait", action="store_true", help="wait for another process that does the same, instead of refusing")


def add_study(parser: argparse.ArgumentParser) -> None:
    """Add `--study`."""
    parser.add_argument("--study", help="database of the study, as postgresql://... (default: RAYNDOM_STUDY, else a file in the home)")


def use_study(arguments: argparse.Namespace) -> None:
    """Let `--study` stand for RAYNDOM_STUDY, which keeps a password out of the list of processes.

    Raises:
        UserError: it cannot be an address.
    """
    if arguments.study:
        if "\0" in arguments.study:
            raise UserError("--study holds a null byte: it is no address of a study, as postgresql://HOST/DATABASE")
        os.environ["RAYNDOM_STUDY"] = arguments.study


def workplace_of(arguments: argparse.Namespace) -> Workplace:
    """Return the workplace that a command's flags name: `--home`, and `--data-root` and `--address` where it has them."""
    from orchestration.home import Workplace

    return Workplace.locate(arguments.home, getattr(arguments, "data_root", None), getattr(arguments, "address", None))


def workplace_to_read(arguments: argparse.Namespace) -> Workplace:
    """Return the workplace of a command that writes nothing: the home need not be there, or may not be written."""
    from orchestration.home import Workplace

    return Workplace.to_read(arguments.home, getattr(arguments, "data_root", None))


def field_rows(config: BaseModel, prefix: str = "") -> list[tuple[str, str, str]]:
    """Return (flag, value, description) of every leaf field of a config and the configs inside it."""
    from pydantic import BaseModel

    rows: list[tuple[str, str, str]] = []
    for name, info in type(config).model_fields.items():
        value: Any = getattr(config, name)
        if isinstance(value, BaseModel):
            # A defence's parameters stand directly below `defence`.
            inner = prefix if name == "parameters" else f"{prefix}{name}."
            rows += field_rows(value, inner)
        else:
            shown = config.model_dump(mode="json").get(name, value)
            rows.append((f"--{prefix}{name}", "null" if shown is None else str(shown), info.description or ""))
    return rows


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
    from analysis.reporting.tables import columns_of, to_csv, to_latex, to_markdown

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
