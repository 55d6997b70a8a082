"""The tree of the packages with a line for each file, as `docs/architecture.md` shows it.

`python -m tests.architecture.documented_tree` renews it there, between the two marks.
"""

from __future__ import annotations

import ast
import textwrap
from pathlib import Path

from models.files import write_text
from tests.architecture.source import PACKAGES, ROOT, python_files, tree

PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- tree: begin (python -m tests.architecture.documented_tree) -->\n", "<!-- tree: end -->\n"
WIDTH = 110


def documented_tree() -> str:
    """Return the tree in Markdown: a list of files under each folder, each with the first line of its docstring."""
    lines: list[str] = []
    folder: Path | None = None
    for file in sorted(python_files(*PACKAGES), key=lambda file: (file.parent, file.name != "__init__.py", file.name)):
        name, said = file.relative_to(ROOT), first_line(file)
        if name.parent != folder:
            folder = name.parent
            lines += ["", f"**{folder}/**" + (f" {said}" if name.name == "__init__.py" and said else ""), ""]
        if name.name != "__init__.py":
            lines.append(f"- `{name.name}` {said}")
    return "\n".join(lines).strip() + "\n"


def first_line(file: Path) -> str:
    """Return the first line of a file's docstring, cut at a word; empty without one."""
    text = (ast.get_docstring(tree(file)) or "").partition("\n")[0]
    return textwrap.shorten(text, WIDTH, placeholder=" ...")


def parts(page: str) -> tuple[str, str, str]:
    """Return what stands before, between and behind the marks."""
    before, _, rest = page.partition(BEGIN)
    between, _, behind = rest.partition(END)
    return before, between, behind


if __name__ == "__main__":
    before, _, behind = parts(PAGE.read_text(encoding="utf-8"))
    write_text(PAGE, f"{before}{BEGIN}{documented_tree()}{END}{behind}")
