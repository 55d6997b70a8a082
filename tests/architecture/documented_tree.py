"""The tree in docs/architecture.md, made of the modules' own first lines: `python -m tests.architecture.documented_tree` renews it."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- tree: begin -->", "<!-- tree: end -->"
PACKAGES = ("models", "trainers", "analysis", "orchestration")
WIDTH = 110


def first_line(path: Path) -> str:
    """Return the first line of a module's docstring, cut at a word."""
    text = (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n")[0].strip()
    if len(text) <= WIDTH:
        return text
    return text[:WIDTH].rsplit(" ", 1)[0].rstrip(",;:") + " ..."


def tree_text() -> str:
    """Return the tree, one Markdown line per module, a heading per package."""
    lines: list[str] = []
    for package in PACKAGES:
        folders = sorted({path.parent for path in (ROOT / package).rglob("*.py") if "__pycache__" not in path.parts})
        for folder in folders:
            shown = folder.relative_to(ROOT)
            lines += ["", f"{'#' * (2 + len(shown.parts))} `{shown}/`", ""]
            about = first_line(folder / "__init__.py") if (folder / "__init__.py").is_file() else ""
            lines += [about, ""] if about else []
            lines += [f"- `{path.name}` {first_line(path)}" for path in sorted(folder.glob("*.py")) if path.name != "__init__.py"]
    return "\n".join(lines).strip() + "\n"


def page_with_tree() -> str:
    """Return the page with the tree as it is now."""
    head, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n\n{tree_text()}\n{END}{tail}"


if __name__ == "__main__":
    PAGE.write_text(page_with_tree())
