"""The papers' tables and figures as data: one file per paper, found by scanning for `PAPERS`; a new paper is one new file.

get_item("ctrw.table1")   rows, columns, published values
"""

from __future__ import annotations

from analysis.reproduction.papers.model import Cell, Item, Paper
from models.errors import unknown_name
from models.plugins import once_for_plugins
from models.registry_files import broken_files, scan

__all__ = ["ITEMS_LISTED", "Cell", "Item", "Paper", "get_item", "get_paper", "list_items", "list_papers", "papers"]

ITEMS_LISTED = "`rayndom reproduce` lists them"


@once_for_plugins
def papers() -> dict[str, Paper]:
    """Return all papers by short name, in alphabetical order of their files."""
    return scan(__name__, "PAPERS", Paper)


def list_papers() -> list[str]:
    """Return the short names of all papers."""
    return list(papers())


def get_paper(name: str) -> Paper:
    """Return a paper; an unknown name is a `UserError` with the nearest ones."""
    if name not in papers():
        raise unknown_name("paper", name, papers(), broken_files(__name__))
    return papers()[name]


@once_for_plugins
def _items() -> dict[str, Item]:
    return {item.name: item for paper in papers().values() for item in paper.items}


def list_items() -> list[str]:
    """Return the names of all tables and figures, e.g. `ctrw.table1`."""
    return list(_items())


def get_item(name: str) -> Item:
    """Return a table or figure; an unknown name is a `UserError` with the nearest ones."""
    if name not in _items():
        raise unknown_name("table or figure", name, _items(), broken_files(__name__), listed=ITEMS_LISTED)
    return _items()[name]
