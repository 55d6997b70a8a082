"""The files of the project, for the tests of this folder."""

from __future__ import annotations

import ast
import functools
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("models", "trainers", "analysis", "orchestration", "rayndom")


@functools.cache
def project_files() -> tuple[Path, ...]:
    """Every file that git tracks or would track; outside a checkout, the files of the known folders."""
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-coz", "--exclude-standard"], capture_output=True, text=True, check=False)
    if listed.returncode == 0 and listed.stdout:
        found = {ROOT / name for name in listed.stdout.split("\0") if name}
    else:
        folders = [ROOT / name for name in (*PACKAGES, "tests", "docs", "benchmarks")]
        found = {file for folder in folders for file in folder.rglob("*") if "__pycache__" not in file.parts}
        found |= set(ROOT.glob("*.*")) | {ROOT / "Makefile"}
    return tuple(sorted(file for file in found if file.is_file()))


def python_files(*folders: str) -> tuple[Path, ...]:
    """The Python files of the project, or of these top-level folders."""
    return tuple(file for file in project_files() if file.suffix == ".py" and (not folders or file.relative_to(ROOT).parts[0] in folders))


@functools.cache
def tree(file: Path) -> ast.Module:
    """A file, parsed."""
    return ast.parse(file.read_text(encoding="utf-8"), filename=str(file))


def place(file: Path, node: ast.AST | int) -> str:
    """`folder/file.py:line`, as an editor opens it."""
    return f"{file.relative_to(ROOT)}:{node if isinstance(node, int) else node.lineno}"


def module_name(file: Path) -> str:
    """The dotted name that imports a file of the packages."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
