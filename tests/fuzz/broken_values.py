"""Values that do not fit: for each field of a configuration's schema wrong types, ranges, non-numbers, nesting, unknown keys; seeded."""

from __future__ import annotations

import random
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

NUMBERS = frozenset({int, float})


@dataclass(frozen=True)
class Case:
    """One wrong (or merely strange) value.

    Attributes:
        field: dotted name. value: plain data. kind: what is wrong with it. refused: whether it must be; False: strange, but allowed.
    """

    field: str
    value: Any
    kind: str
    refused: bool = True


@dataclass(frozen=True)
class Leaf:
    """A field that holds no fields of its own: its type without Annotated, and its bounds."""

    field: str
    annotation: Any
    bounds: dict[str, float]


@dataclass(frozen=True)
class Section:
    """A field that holds fields of its own, and whether it may hold none."""

    field: str
    is_optional: bool


def leaves(config: BaseModel, prefix: str = "") -> Iterator[Leaf | Section]:
    """Yield the fields of a config and of the configs inside it."""
    for name, info in type(config).model_fields.items():
        value = getattr(config, name)
        dotted = f"{prefix}{name}"
        if isinstance(value, BaseModel):
            inner = prefix if name == "parameters" else f"{dotted}."
            if name != "parameters":
                yield Section(dotted, type(None) in arms(info.annotation))
            yield from leaves(value, inner)
        else:
            yield Leaf(dotted, bare(info.annotation), _bounds(info))


def bare(annotation: Any) -> Any:
    """Return a type without its Annotated shell."""
    return bare(get_args(annotation)[0]) if get_origin(annotation) is Annotated else annotation


def arms(annotation: Any) -> set[Any]:
    """Return the types that a union allows, or the type itself."""
    annotation = bare(annotation)
    if get_origin(annotation) in (Union, types.UnionType):
        return {arm for each in get_args(annotation) for arm in arms(each)}
    return {annotation}


def _bounds(info: FieldInfo) -> dict[str, float]:
    return {name: getattr(item, name) for item in info.metadata for name in ("ge", "gt", "le", "lt") if hasattr(item, name)}


def section_cases(section: Section, rng: random.Random) -> list[Case]:
    """Return values that no section takes, and null, which some do."""
    values: list[tuple[Any, str]] = [
        (5, "number for a section"),
        ([], "list for a section"),
        (None, "null for a section"),
        (True, "boolean for a section"),
        ({"zz_unknown": 1}, "unknown key"),
        ({"name": None}, "null name"),
        ({"": 1}, "empty key"),
        (["name"], "list for a section"),
    ]
    return [Case(section.field, value, kind, refused=value is not None or not section.is_optional) for value, kind in rng.sample(values, 4)]


def leaf_cases(leaf: Leaf, rng: random.Random) -> list[Case]:
    """Return values that a field does not take, by its type and bounds, and some that it may."""
    kinds = arms(leaf.annotation)
    if Any in kinds:
        return []
    found: list[tuple[Any, str, bool]] = [
        ({"zz_unknown": {"a": [None]}}, "mapping for a value", True),
        ([[None]], "nested null", True),
    ]
    if type(None) not in kinds:
        found.append((None, "null", True))
    literals = [arm for arm in kinds if get_origin(arm) is Literal]
    if kinds & NUMBERS or literals:
        if bool not in kinds and not any(isinstance(each, bool) for arm in literals for each in get_args(arm)):
            found += [(True, "boolean for a number", True), (False, "boolean for a number", True)]
        found += [(f"zz{rng.randrange(1000)}", "text for a number or name", True)]
    if kinds & NUMBERS:
        found += _numbers(leaf, kinds, rng)
    if literals and not kinds & NUMBERS:
        found += [(rng.choice([17, -3.5, [], float("inf")]), "no such name", True)]
    if kinds <= {bool}:
        found += [(value, "no truth value", True) for value in ("perhaps", 2, -1, [], 0.5, float("nan"))]
    if str in kinds and not kinds & NUMBERS:
        found += [(rng.choice([5, 1.5, True, ["a"]]), "no text", True), ("a\0b", "null byte", True), ("x" * 5000, "5,000 characters", True)]
    if any(get_origin(arm) in (tuple, list) for arm in kinds):
        found += [("text", "text for a list", True), (7, "number for a list", True), ([None, None], "nulls in a list", True)]
        found += [({"a": 1}, "mapping for a list", True)]
        if any(NUMBERS & arms(get_args(arm)[0]) for arm in kinds if get_origin(arm) in (tuple, list)):
            found += [([True], "boolean for a number", True), ([float("nan")], "not a number", True), ([float("inf")], "infinite", True)]
    return [Case(leaf.field, *each) for each in rng.sample(found, min(len(found), 6))]


def _numbers(leaf: Leaf, kinds: set[Any], rng: random.Random) -> list[tuple[Any, str, bool]]:
    found: list[tuple[Any, str, bool]] = [
        (float("nan"), "not a number", True),
        (float("inf"), "infinite", True),
        (float("-inf"), "infinite", True),
        ("1e999", "infinite", True),
        ([], "list for a number", True),
        (10**40, "huge", float not in kinds),
        (1e308, "huge", True),
        (10**400, "huge", True),
    ]
    if float not in kinds:
        found += [(rng.randrange(1, 9) + 0.5, "fraction for a whole number", True)]
    low, high = leaf.bounds.get("ge", leaf.bounds.get("gt")), leaf.bounds.get("le", leaf.bounds.get("lt"))
    if low is not None:
        found += [(low - 1, "below the bound", True)] + ([(low, "at the bound", True)] if "gt" in leaf.bounds else [])
    if high is not None:
        found += [(high + 1, "above the bound", True)]
    return found


def cases_of(config: BaseModel, rng: random.Random) -> list[Case]:
    """Return wrong values of every field of a config and of every config inside it."""
    found: list[Case] = []
    for each in leaves(config):
        found += section_cases(each, rng) if isinstance(each, Section) else leaf_cases(each, rng)
        if isinstance(each, Leaf):
            found.append(Case(f"{each.field}.zz_unknown", 1, "a field below a value"))
            found.append(Case(f"{each.field}_zz", 1, "unknown field"))
    return found
