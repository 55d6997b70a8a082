"""The space of a sweep over several recipes: first the recipe, then the dimensions of that recipe alone.

A dimension of one recipe is named `RECIPE/dotted.field`, so that distributions of different recipes never share a name; a name without a
recipe is a field that all of them have.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orchestration.search_space import Dimension, SearchSpace

RECIPE = "recipe"
_SEPARATOR = "/"


def joint_space(spaces: Mapping[str, SearchSpace], shared: SearchSpace) -> dict[str, Dimension]:
    """Return one space: the choice of the recipe, dimensions that all share, each recipe's own under the condition that it is chosen."""
    space = {RECIPE: Dimension(type="choice", choices=tuple(spaces)), **shared}
    for recipe, own in spaces.items():
        space |= {scoped(recipe, name): _in(recipe, dimension, own) for name, dimension in own.items()}
    return space


def scoped(recipe: str, field: str) -> str:
    """Return the name of a recipe's dimension."""
    return f"{recipe}{_SEPARATOR}{field}"


def split(name: str) -> tuple[str | None, str]:
    """Return (recipe or None, dotted field) of a dimension's name."""
    recipe, separator, field = name.rpartition(_SEPARATOR)
    return (recipe, field) if separator else (None, name)


def chosen_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return dotted field -> value for the recipe that `values` chose."""
    return {split(name)[1]: value for name, value in values.items() if name != RECIPE}


def flatten_by_recipe(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `space` of a file, whose sections are recipes and fields, with the dimensions of recipes named `RECIPE/dotted.field`."""
    flat: dict[str, Any] = {}
    for name, item in tree.items():
        # A dimension has a type; a section of a recipe holds dimensions.
        if isinstance(item, dict) and "type" not in item:
            flat |= {scoped(name, field): dimension for field, dimension in item.items()}
        else:
            flat[name] = item
    return flat


def _in(recipe: str, dimension: Dimension, own: SearchSpace) -> Dimension:
    """Return a recipe's dimension with its references scoped and its condition added."""
    when = {(scoped(recipe, name) if name in own else name): allowed for name, allowed in dimension.when.items()}
    above = scoped(recipe, dimension.above) if dimension.above in own else dimension.above
    return dimension.model_copy(update={"when": {RECIPE: (recipe,)} | when, "above": above})
