"""No module imports itself by a detour, not even later, inside a function: a cycle means that two files are one subject."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.architecture.source import PACKAGES, module_name, python_files, tree


def imported(module: ast.Module, name: str, is_package: bool, known: set[str]) -> Iterator[str]:
    """The modules of ours that a module imports anywhere in its text, for type checking too."""
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            package = name.split(".") if is_package else name.split(".")[:-1]
            above = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                if inner in known:
                    yield inner
                elif source in known:
                    yield source


def import_graph(sources: Mapping[str, ast.Module], packages: set[str] = frozenset()) -> dict[str, set[str]]:
    """Which of the modules imports which."""
    known = set(sources)
    return {name: set(imported(module, name, name in packages, known)) - {name} for name, module in sources.items()}


def cycles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """The strongly connected components of more than one module (Tarjan's algorithm)."""
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        order[name] = lowest[name] = len(order)
        stack.append(name)
        for other in sorted(graph[name]):
            if other not in order:
                visit(other)
                lowest[name] = min(lowest[name], lowest[other])
            elif other in stack:
                lowest[name] = min(lowest[name], order[other])
        if lowest[name] == order[name]:
            component = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(component) > 1:
                found.append(sorted(component))

    for name in sorted(graph):
        if name not in order:
            visit(name)
    return found


def test_no_module_imports_itself_by_a_detour() -> None:
    files: dict[str, Path] = {module_name(file): file for file in python_files(*PACKAGES)}
    packages = {name for name, file in files.items() if file.name == "__init__.py"}
    graph = import_graph({name: tree(file) for name, file in files.items()}, packages)
    assert len(graph) > 200 and "models.files" in graph["models.weights"]
    found = cycles(graph)
    assert not found, "\n".join(" <-> ".join(component) for component in found)


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        ({"a": "import b", "b": "import c", "c": ""}, []),
        ({"a": "import b", "b": "def later():\n    from a import x"}, [["a", "b"]]),
        ({"p": "", "p.a": "from p import b", "p.b": "from p.c import x", "p.c": "import p.a"}, [["p.a", "p.b", "p.c"]]),
        ({"p": "from p.a import x", "p.a": "from p import y"}, [["p", "p.a"]]),
        ({"p": "", "p.a": "from . import b", "p.b": "from .a import x"}, [["p.a", "p.b"]]),
        ({"a": "if TYPE_CHECKING:\n    from b import B", "b": "import a"}, [["a", "b"]]),
    ],
)
def test_the_search_for_cycles_finds_them(sources: dict[str, str], expected: list[list[str]]) -> None:
    assert cycles(import_graph({name: ast.parse(text) for name, text in sources.items()}, {"p"})) == expected
