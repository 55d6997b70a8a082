"""`docs/architecture.md` shows the tree as it is, and names only files that exist."""

from __future__ import annotations

import ast
import re

import pytest

from tests.architecture.documented_tree import PAGE, documented_tree, first_line, parts
from tests.architecture.source import PACKAGES, ROOT, python_files, tree


def test_the_tree_on_the_page_is_that_of_the_files() -> None:
    _, between, _ = parts(PAGE.read_text(encoding="utf-8"))
    assert between == documented_tree(), "run: python -m tests.architecture.documented_tree"


@pytest.mark.parametrize(
    "file", [file for file in python_files(*PACKAGES) if file.name != "__init__.py"], ids=lambda file: str(file.relative_to(ROOT))
)
def test_every_file_says_what_it_is(file) -> None:
    assert first_line(file)


def test_every_file_that_the_page_names_exists() -> None:
    before, _, behind = parts(PAGE.read_text(encoding="utf-8"))
    named = re.findall(r"`((?:models|trainers|analysis|orchestration)/[\w./*]+)`", before + behind)
    assert len(named) > 20
    missing = [name for name in named if not list(ROOT.glob(name))]
    assert not missing


def test_every_name_that_the_page_uses_is_one_of_the_code() -> None:
    before, _, behind = parts(PAGE.read_text(encoding="utf-8"))
    named = {part for name in re.findall(r"`([A-Za-z_]\w*(?:\.\w+)*)`", before + behind) for part in name.split(".")}
    defined = {getattr(node, "name", "") for file in python_files(*PACKAGES) for node in ast.walk(tree(file))}
    defined |= {node.target.id for file in python_files(*PACKAGES) for node in ast.walk(tree(file)) if _is_field(node)}
    assert len(named) > 30
    missing = named - defined - {*PACKAGES, "grad"}
    assert not missing


def _is_field(node: ast.AST) -> bool:
    return isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
