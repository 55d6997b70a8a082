"""`rayndom open RUN`: the page of an evaluation, of a paper or of a sweep's winner, in the browser."""

from __future__ import annotations

import argparse
import glob
import webbrowser
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from models.errors import UserError
from orchestration import console
from orchestration.commands.command import Command

if TYPE_CHECKING:
    from orchestration.home import Home


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", help="an evaluated model (trained recipe, run, exported folder, ...), a sweep, or a paper, as ctrw")
    parser.add_argument("--print", action="store_true", help="say where the page is, and open nothing")


def _run(arguments: argparse.Namespace) -> None:
    from orchestration.home import Home

    page = _page(arguments.target, Home.to_read(arguments.home))
    console.result({"page": str(page)})
    console.say(str(page))
    if not arguments.print and not arguments.json and not webbrowser.open(page.as_uri()):
        console.warn("there is no browser here; open the file in one")


def _page(target: str, home: Home) -> Path:
    """Return the newest page of what `target` names.

    Raises:
        UserError: it has none.
    """
    from models.weights import CONFIG_FILE
    from orchestration.trained_models.targets import resolve_target

    pages = home.entries(f"reproductions/{glob.escape(target)}-*.html")
    if pages:
        return _newest(pages)
    export = home.root / "exports" / target
    found = resolve_target(str(export) if (export / CONFIG_FILE).is_file() else target, home)
    folder = found.records_folder(home, found.checkpoint())
    pages = sorted(folder.glob("report-*/report.html"))
    if not pages:
        raise UserError(f"{target} has no page yet: `rayndom evaluate {target}` writes it")
    return _newest(pages)


def _newest(pages: Sequence[Path]) -> Path:
    return max(pages, key=lambda page: page.stat().st_mtime)


OPEN = Command(
    "open",
    "open the page of an evaluation, of a sweep's winner or of a paper",
    ("rayndom open ctrw_digits", "rayndom open ctrw_bounds_digits", "rayndom open ctrw --print"),
    _add,
    _run,
)
