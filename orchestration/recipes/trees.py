"""Nested dictionaries of an experiment's sections: merging them, setting a dotted field."""

from __future__ import annotations

from typing import Any

from models.errors import UserError

Tree = dict[str, Any]

NAMED_SECTIONS = ("defence", "backbone", "training.objective")
"""Sections that may be given by their bare name."""


def merge(base: Tree, over: Tree) -> Tree:
    """Return `base` with `over` on top, section by section. A section whose `name` changes is replaced, not merged.

    Raises:
        UserError: a section would hide a list or a number that stands where it belongs.
    """
    result = dict(base)
    for key, value in over.items():
        below = result.get(key)
        if isinstance(below, str) and isinstance(value, dict):
            below = {"name": below}
        if isinstance(below, list | int | float) and isinstance(value, dict):
            raise UserError(f"{key} is {below!r:.60} in one file and a section with fields in another")
        if isinstance(below, dict) and isinstance(value, dict) and value.get("name", below.get("name")) == below.get("name"):
            result[key] = merge(below, value)
        else:
            result[key] = value
    return result


def set_dotted(tree: Tree, dotted: str, value: Any) -> None:
    """Set `a.b.c` in nested dictionaries, creating sections; a section given by its bare name becomes `{"name": ...}`.

    Raises:
        UserError: a part of the name is empty, or names a value where a section is needed.
    """
    *sections, leaf = dotted.split(".")
    if not all((*sections, leaf)):
        raise UserError(f"{dotted[:100]!r} is no field: a part of the name is empty")
    for depth, section in enumerate(sections):
        inner = tree.get(section)
        path = ".".join(sections[: depth + 1])
        if isinstance(inner, str) and path in NAMED_SECTIONS:
            inner = {"name": inner}
        if inner is not None and not isinstance(inner, dict):
            raise UserError(f"{dotted[:100]}: {path} is a value ({inner!r:.60}), not a section with fields")
        tree[section] = dict(inner or {})
        tree = tree[section]
    tree[leaf] = value


def with_names(tree: Tree) -> Tree:
    """Return the tree with sections that are given by a bare name written out."""
    named = {key: {"name": tree[key]} for key in ("defence", "backbone") if isinstance(tree.get(key), str)}
    training = tree.get("training")
    if isinstance(training, dict) and isinstance(training.get("objective"), str):
        named["training"] = training | {"objective": {"name": training["objective"]}}
    return tree | named
