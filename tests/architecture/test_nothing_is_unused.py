"""What is defined in the product is used by it, or by its benchmarks, or named in a document: what only tests call goes.

By name alone, so that a name used anywhere counts for all that bear it: this finds what is certainly unused, and nothing else.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from tests.architecture.source import PACKAGES, place, project_files, python_files, tree

SCANNED = {
    "ATTACKS",
    "BACKBONES",
    "COMMAND",
    "COMMANDS",
    "DEFENCES",
    "DEFENCE_MODELS",
    "OBJECTIVES",
    "PAIRS_BY_DISTANCE",
    "PAPERS",
    "QUANTITIES",
    "Unpickler",
    "_repr_html_",
}
"""Names that registries look for, and those by which `torch.load` and a notebook call what is given to them."""
OF_A_LANDSCAPE = {"gradient_sign", "random_sign"}
"""The directions along which a landscape was taken: its numbers mean nothing without, whoever shows them."""
DOCUMENTS = {".md", ".yaml", ".toml", ".html"}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def definitions(module: ast.Module) -> Iterator[tuple[str, ast.stmt]]:
    """The functions, classes and constants of a module and the methods of its classes.

    Not what a decorator registers (validators, rules), and not the methods of classes with a base: a framework or the base may call them.
    """
    for node in module.body:
        if isinstance(node, Function) and not _registered(node):
            yield node.name, node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from ((target.id, node) for target in targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.ClassDef):
            yield node.name, node
            if not any(ast.unparse(base) != "Config" for base in node.bases):
                yield from ((inner.name, inner) for inner in node.body if isinstance(inner, Function) and not _registered(inner))


def fields(module: ast.Module) -> Iterator[tuple[str, ast.stmt]]:
    """The fields of a module's records (dataclasses; a configuration is also read as a whole)."""
    for node in module.body:
        if isinstance(node, ast.ClassDef) and any("dataclass" in ast.unparse(each) for each in node.decorator_list):
            yield from (
                (each.target.id, each) for each in node.body if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name)
            )


def _registered(node: Function) -> bool:
    harmless = {"property", "cached_property", "cache", "lru_cache", "classmethod", "staticmethod", "contextmanager", "abstractmethod"}
    harmless |= {"no_grad", "inference_mode", "style", "override", "setter"}
    names = {ast.unparse(each).partition("(")[0].rpartition(".")[2] for each in node.decorator_list}
    return not names <= harmless or node.name.startswith("test_")  # pytest calls these


def used(module: ast.Module) -> Iterator[str]:
    """The names that a module reads, and those that it spells out as text, as `getattr` and registries take them."""
    for node in ast.walk(module):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from re.findall(r"\w+", node.value) if re.fullmatch(r"[\w.]+", node.value) else ()


def named_in_calls(module: ast.Module) -> Iterator[str]:
    """The names that calls give values to: a parameter is read by whoever is called, a field of a record is only set by that."""
    yield from (node.arg for node in ast.walk(module) if isinstance(node, ast.keyword) and node.arg)


def unused(modules: list[ast.Module], documents: str) -> list[tuple[ast.Module, str, ast.stmt]]:
    """What no module and no document names, beside its own definition and `__all__`; of fields, what none reads."""
    read = {name for module in modules for name in used(_without_exports(module))} | set(re.findall(r"\w+", documents)) | SCANNED
    known = read | {name for module in modules for name in named_in_calls(module)}
    found = [(module, name, node) for module in modules for name, node in definitions(module) if name not in known]
    found += [(module, name, node) for module in modules for name, node in fields(module) if name not in read | OF_A_LANDSCAPE]
    return [each for each in found if not (each[1].startswith("__") and each[1].endswith("__"))]


def _without_exports(module: ast.Module) -> ast.Module:
    return ast.Module([node for node in module.body if not ast.unparse(node).startswith("__all__")], module.type_ignores)


def test_everything_is_used_by_more_than_tests() -> None:
    files = {id(tree(file)): file for file in python_files(*PACKAGES, "benchmarks")}
    documents = "\n".join(
        file.read_text(encoding="utf-8", errors="replace")
        for file in project_files()
        if file.suffix in DOCUMENTS and file.name not in ("CHANGELOG.md", "architecture.md")
    )
    found = [
        f"{place(files[id(module)], node)} {name}" for module, name, node in unused([tree(file) for file in files.values()], documents)
    ]
    assert not found, "used by tests alone, or by nobody: " + "\n".join(found)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("def a(): pass\ndef b(): a()\nb()", []),
        ("def a(): pass", ["a"]),
        ("LIMIT = 3\n__all__ = ['LIMIT']", ["LIMIT"]),
        ("LIMIT: int = 3\nprint(LIMIT)", []),
        ("class A:\n    def m(self): pass\nA()", ["m"]),
        ("class A(Searcher):\n    def m(self): pass\nA()", []),
        ("class A:\n    @property\n    def m(self): pass\nA()", ["m"]),
        ("class A(Config):\n    @field_validator('x')\n    def m(self): pass\nA()", []),
        ("@dataclass\nclass A:\n    x: int\nA(x=1)", ["x"]),
        ("@dataclass(frozen=True)\nclass A:\n    x: int\nprint(A(1).x)", []),
        ("@rule(add)\ndef a(): pass", []),
        ("def a(): pass\ngetattr(module, 'a')", []),
        ("def documented(): pass", []),
        ("DEFENCES = ()", []),
    ],
)
def test_the_search_tells_used_from_unused(source: str, expected: list[str]) -> None:
    assert [name for _, name, _ in unused([ast.parse(source)], "`documented` is for users")] == expected
