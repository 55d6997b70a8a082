"""From a home folder to the page of results.

python -m benchmarks.results collect --home HOME    add the finished rows of HOME to the records
python -m benchmarks.results page                   renew docs/results.md and its picture from the records
python -m benchmarks.results html FILE              the whole page of a reproduction, made of the records
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from analysis.reproduction.report import write_paper
from benchmarks.results.page import filled
from benchmarks.results.picture import SEED, drawn
from benchmarks.results.records import FILES, collect, read, together
from models.files import write_text
from orchestration.home import Home

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE, PICTURE = DOCS / "results.md", DOCS / "results.svg"


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what is asked for; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.results", description="Records of rayndom reproduce --scale small.")
    commands = parser.add_subparsers(dest="command", required=True)
    collecting = commands.add_parser("collect", help="add the finished rows of a home folder to the records")
    collecting.add_argument("--home", type=Path, default=Path("rayndom_home"))
    commands.add_parser("page", help="renew docs/results.md and its picture")
    html = commands.add_parser("html", help="write the page of a reproduction, tables and what remains of gains, as one file")
    html.add_argument("file", type=Path)
    options = parser.parse_args(arguments)
    tables = {item: read(item) for item in FILES}
    if options.command == "collect":
        for record in collect(Home(options.home.absolute())):
            sys.stdout.write(f"{record.item} {record.row}, seed {record.seed}\n")
    elif options.command == "page":
        write_text(PAGE, filled(PAGE.read_text(encoding="utf-8"), tables))
        write_text(PICTURE, drawn(tables))
    else:
        first = ([record for record in records if record.seed == SEED] for records in tables.values())
        write_paper("common", [together(records) for records in first if records], options.file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
