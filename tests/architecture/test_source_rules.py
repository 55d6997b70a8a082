"""House rules that a linter does not know. Each failure names file and line."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.architecture.source import PACKAGES, ROOT, module_name, place, project_files, python_files, tree

CONSOLE = "orchestration/console.py"
MOST_LINES = 500

Function = ast.FunctionDef | ast.AsyncFunctionDef

# Hooks of nn.Module, autograd and the context protocol: their contract is the base class's, the class's docstring says the rest.
INHERITED = {"forward", "backward", "extra_repr", "train", "setup_context"}

# Put together here, so that this file may be searched too.
MACHINE_PATHS = [f"/{name}/" for name in ("work", "farm", "root", "home", "Users", "opt/pypi", "tmp/uv")]
REGISTRY_HOSTS = ["py" + "pi.org", "python" + "hosted.org", "download." + "pytorch.org", "test." + "py" + "pi"]
BINARY = {".png", ".jpg", ".jpeg", ".gz", ".xz", ".npz", ".safetensors", ".pdf", ".ico"}


def test_only_the_console_prints() -> None:
    found = [
        place(file, node)
        for file in python_files(*PACKAGES)
        if file.as_posix().endswith(CONSOLE) is False
        for node in ast.walk(tree(file))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert not found, "\n".join(found)


def public_definitions(file: Path) -> Iterator[tuple[str, Function | ast.ClassDef]]:
    """Module-level functions and classes and the methods of those classes, without those whose name begins with _."""
    for node in tree(file).body:
        if not isinstance(node, Function | ast.ClassDef) or node.name.startswith("_"):
            continue
        yield node.name, node
        if isinstance(node, ast.ClassDef):
            for method in node.body:
                if isinstance(method, Function) and not method.name.startswith("_") and needs_docstring(method):
                    yield f"{node.name}.{method.name}", method


def needs_docstring(method: Function) -> bool:
    """Not the hooks of a framework, not the second half of a property, not a declared overload."""
    decorators = {ast.unparse(decorator).rpartition(".")[2] for decorator in method.decorator_list}
    # The name of a test, in the suites that others inherit, says what it is.
    named = method.name in INHERITED or method.name.startswith("test_")
    return not named and not decorators & {"setter", "deleter", "overload", "override"}


def class_definitions() -> dict[str, list[ast.ClassDef]]:
    """All classes of the packages by name."""
    classes: dict[str, list[ast.ClassDef]] = {}
    for file in python_files(*PACKAGES):
        for node in ast.walk(tree(file)):
            if isinstance(node, ast.ClassDef):
                classes.setdefault(node.name, []).append(node)
    return classes


def inherits_docstring(name: str, classes: dict[str, list[ast.ClassDef]]) -> bool:
    """Whether `Class.method` fulfils a method of a base class that says what it does, as help() would show."""
    owner, _, method = name.partition(".")
    waiting, seen = [owner], set()
    while waiting:
        current = waiting.pop()
        for node in classes.get(current, ()):
            if current not in seen:
                waiting += [ast.unparse(base).partition("[")[0].rpartition(".")[2] for base in node.bases]
            for member in node.body:
                if isinstance(member, Function) and member.name == method and ast.get_docstring(member):
                    return True
        seen.add(current)
    return False


def fulfils_protocol(name: str, file: Path) -> bool:
    """Whether a protocol in the same file says what `Class.method` does."""
    method = name.partition(".")[2]
    return any(
        isinstance(member, Function) and member.name == method and ast.get_docstring(member)
        for node in tree(file).body
        if isinstance(node, ast.ClassDef) and any(ast.unparse(base).startswith("Protocol") for base in node.bases)
        for member in node.body
    )


def test_what_is_public_says_what_it_is() -> None:
    classes = class_definitions()
    found = [
        f"{place(file, node)} {name}"
        for file in python_files(*PACKAGES)
        for name, node in public_definitions(file)
        if not ast.get_docstring(node) and not ("." in name and (inherits_docstring(name, classes) or fulfils_protocol(name, file)))
    ]
    assert not found, "\n".join(found)


def config_modules() -> list[str]:
    """The modules that define a config: only they need to be imported."""
    return [
        module_name(file)
        for file in python_files(*PACKAGES)
        if any(
            isinstance(node, ast.ClassDef) and any(ast.unparse(base).endswith("Config") for base in node.bases)
            for node in ast.walk(tree(file))
        )
    ]


def test_every_field_of_a_config_is_described() -> None:
    from models.configuration import Config

    for name in config_modules():
        importlib.import_module(name)
    classes, waiting = set(), [Config]
    while waiting:
        for child in waiting.pop().__subclasses__():
            if child not in classes:
                classes.add(child)
                waiting.append(child)
    ours = [item for item in classes if item.__module__.partition(".")[0] in PACKAGES]
    assert len(ours) > 5
    found = [
        f"{item.__module__}.{item.__name__}.{name}"
        for item in ours
        for name, field in item.model_fields.items()
        if not (field.description or "").strip()
    ]
    assert not found, "\n".join(sorted(found))


def test_files_are_short() -> None:
    counts = {file: file.read_text(encoding="utf-8").count("\n") for file in python_files()}
    found = [f"{place(file, 1)} has {count} lines" for file, count in counts.items() if count > MOST_LINES]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("forbidden", [MACHINE_PATHS, REGISTRY_HOSTS], ids=["machine paths", "registry hosts"])
def test_no_file_names_a_machine_or_a_registry(forbidden: list[str]) -> None:
    # A path begins where the text before it cannot be part of one: a folder of the project may share a machine folder's name.
    pattern = re.compile("|".join(rf"(?<![\w.$~}}-]){re.escape(item)}" for item in forbidden))
    found = []
    for file in project_files():
        if file.suffix in BINARY:
            continue
        for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
            if pattern.search(line):
                found.append(f"{place(file, number)} {line.strip()[:100]}")
    assert not found, "\n".join(found)


def is_broad(handler: ast.ExceptHandler) -> bool:
    """Whether it catches everything, interrupts perhaps apart."""
    if handler.type is None:
        return True
    caught = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return any(isinstance(item, ast.Name) and item.id in ("Exception", "BaseException") for item in caught)


def does_nothing(body: list[ast.stmt]) -> bool:
    """Whether statements leave no trace of what happened."""
    return all(
        isinstance(node, ast.Pass | ast.Continue | ast.Break)
        or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
        or (isinstance(node, ast.Return) and (node.value is None or isinstance(node.value, ast.Constant)))
        for node in body
    )


def test_no_exception_disappears() -> None:
    found = []
    for file in python_files():
        for node in ast.walk(tree(file)):
            if isinstance(node, ast.ExceptHandler) and is_broad(node) and (node.type is None or does_nothing(node.body)):
                found.append(place(file, node))
            elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] == "suppress":
                if any(ast.unparse(item) in ("Exception", "BaseException") for item in node.args):
                    found.append(place(file, node))
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("try:\n    x()\nexcept Exception:\n    pass\n", True),
        ("try:\n    x()\nexcept (OSError, Exception):\n    return_value = None\n", False),
        ("try:\n    x()\nexcept OSError:\n    pass\n", False),
        ("for i in y:\n    try:\n        x()\n    except BaseException:\n        continue\n", True),
    ],
)
def test_the_rule_on_exceptions_tells_them_apart(source: str, expected: bool) -> None:
    handlers = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ExceptHandler)]
    assert any(is_broad(node) and does_nothing(node.body) for node in handlers) is expected


@pytest.mark.parametrize(
    ("pattern", "file_for_it"),
    [
        (r"\bos\.(replace|rename|renames)\(", "files.py"),
        (r"\bmkstemp\b|\bNamedTemporaryFile\b", "files.py"),
        (r"\bpkgutil\b|\biter_modules\b", "registry_files.py"),
    ],
    ids=["renames a file", "makes a file that others cannot read", "searches a package"],
)
def test_one_file_writes_whole_files_and_one_searches_packages(pattern: str, file_for_it: str) -> None:
    found = [
        f"{place(file, number)} {line.strip()}"
        for file in python_files(*PACKAGES)
        if file != ROOT / "models" / file_for_it
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1)
        if re.search(pattern, line)
    ]
    assert not found, f"use models/{file_for_it}: " + "\n".join(found)


@pytest.mark.parametrize(
    "pattern",
    [r"\bpyplot\b|matplotlib\.use\(", r"\.savefig\(|\bFigureCanvas", r"\brcParams\b|\brc_context\b"],
    ids=["changes the process's plotting", "makes or writes a figure", "sets how figures look"],
)
def test_one_file_says_how_figures_look(pattern: str) -> None:
    style = ROOT / "analysis" / "reporting" / "figure_style.py"
    found = [
        f"{place(file, number)} {line.strip()}"
        for file in python_files(*PACKAGES)
        if file != style
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1)
        if re.search(pattern, line)
    ]
    assert not found, "use analysis.reporting.figure_style: " + "\n".join(found)


def test_one_file_reaches_into_ray_and_none_into_optuna_and_mlflow() -> None:
    pattern = re.compile(r"\b(ray|optuna|mlflow)(\.\w+)*\._[a-z]|\"_[a-z]\w*_exc\"")
    found = [
        f"{place(file, number)} {line.strip()}"
        for file in python_files(*PACKAGES)
        if file != ROOT / "orchestration" / "training" / "ray_internals.py"
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1)
        if pattern.search(line)
    ]
    assert not found, "use a public way, or orchestration.training.ray_internals: " + "\n".join(found)
