"""A table or figure of a paper as a sweep: the fields that its rows vary become dimensions, its rows the points of a grid."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from analysis.reproduction.papers import Item, get_item, list_items
from models.errors import UserError
from orchestration.recipes import load_recipe, parse_overrides, split_name

Changes = dict[str, Any]


@dataclass(frozen=True)
class _Training:
    """A training of an item: what it changes of its recipe, and whether its row is Rayndom's own."""

    label: str
    recipe: str
    changes: Changes
    extra: bool


def item_tree(name: str) -> tuple[dict[str, Any], str]:
    """Return the sweep over an item's rows, as a file would have it, and what to call it in errors.

    The recipe that most of the paper's own rows train is varied: a field that all of them change alike is a setting, one that differs is a
    dimension. Other recipes of the same setting that rows train as they are become baselines; what is neither is said in `remarks`.

    Raises:
        UserError: no such item, or no field differs between its rows.
    """
    item = get_item(name)
    trainings = _trainings(item)
    recipe = _varied_recipe(trainings)
    rows = [each.changes for each in trainings if each.recipe == recipe and not each.extra]
    points = _whole(recipe, rows, name) if rows else []
    fields = list(points[0]) if points else []
    choices = {field: _distinct(point[field] for point in points) for field in fields}
    varied = [field for field in fields if len(choices[field]) > 1]
    if not varied:
        recipes = ", ".join(dict.fromkeys(each.recipe for each in trainings))
        does = f"`rayndom reproduce {name}` trains {recipes}" if recipes else f"{name} trains nothing"
        raise UserError(f"the rows of {name} differ in no field of one recipe, so there is no grid; {does}")
    grid = _distinct({field: point[field] for field in varied} for point in points)
    return {
        "name": name.replace(".", "_"),
        "description": f"the rows of {name}: {item.title}",
        "recipe": recipe,
        "settings": {field: choices[field][0] for field in fields if field not in varied},
        "space": {field: {"type": "choice", "choices": choices[field]} for field in varied},
        "sampler": "grid",
        "points": grid if len(grid) < math.prod(len(choices[field]) for field in varied) else [],
        "stopping": None,
        "suite": _suite(item),
        "baselines": list(dict.fromkeys(each.recipe for each in trainings if _is_baseline(each, recipe))),
        "remarks": _remarks(name, recipe, trainings),
    }, name


def item_like(sweep: str) -> str | None:
    """Return the item that a name spells like a sweep: `dcs_table4` is dcs.table4, `dcs_fig6` the first panel of dcs.fig6; or None."""
    spelled = {item.replace(".", "_"): item for item in list_items()}
    panels = (item for name, item in spelled.items() if name[:-1] == sweep and name[-1].isalpha())
    return spelled.get(sweep) or next(panels, None)


def _trainings(item: Item) -> list[_Training]:
    """Return each training of an item once, row by row."""
    found: dict[tuple[str, tuple[str, ...]], _Training] = {}
    for row in item.rows:
        for column in item.columns:
            run = row.run_for(column)
            if run is not None:
                changes = parse_overrides([f"--{override}" for override in run.overrides])
                found.setdefault((run.recipe, run.overrides), _Training(row.key, run.recipe, changes, row.extra))
    return list(found.values())


def _suite(item: Item) -> str:
    """Return the suite that the item's attacks come from."""
    suites = (getattr(column.measure, "suite", None) for column in item.columns)
    return next((suite for suite in suites if suite), "quick")


def _is_baseline(training: _Training, recipe: str) -> bool:
    """Return whether a training stands beside the grid as it is: another method on the same setting."""
    return training.recipe != recipe and not training.changes and split_name(training.recipe).setting == split_name(recipe).setting


def _varied_recipe(trainings: Iterable[_Training]) -> str:
    counted = Counter(each.recipe for each in trainings if not each.extra)
    return counted.most_common(1)[0][0] if counted else ""


def _whole(recipe: str, rows: list[Changes], name: str) -> list[Changes]:
    """Return the rows with all fields that any of them changes; where one does not, its value is the recipe's.

    Raises:
        UserError: the recipe alone has no such field.
    """
    own = load_recipe(recipe).experiment.flatten()
    fields = list(dict.fromkeys(field for changes in rows for field in changes))
    missing = [field for field in fields if field not in own and not all(field in changes for changes in rows)]
    if missing:
        raise UserError(f"the rows of {name} differ in {missing[0]}, which {recipe} does not have, so there is no grid of values")
    return [{field: changes[field] if field in changes else own[field] for field in fields} for changes in rows]


def _distinct(values: Iterable[Any]) -> list[Any]:
    """Return values without repetitions; `1` and `1.0` are one value."""
    found: dict[str, Any] = {}
    for value in values:
        found.setdefault(json.dumps(_plain(value), sort_keys=True), value)
    return list(found.values())


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _remarks(name: str, recipe: str, trainings: Iterable[_Training]) -> list[str]:
    """Return one sentence on the rows that are neither points nor baselines, where there are any."""
    left = [each.label for each in trainings if not _is_baseline(each, recipe) and (each.recipe != recipe or each.extra)]
    if not left:
        return []
    rows = ", ".join(dict.fromkeys(left))
    return [f"rows of {name} that differ in more than these fields are not in the grid: {rows}; `rayndom reproduce {name}` trains them"]
