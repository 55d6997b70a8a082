"""Grids: every point of a space of choices, whole numbers and steps."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

from models.errors import UserError
from orchestration.search_space import Dimension, SearchSpace, is_active, ordered

MOST_POINTS = 10_000


def grid_points(space: SearchSpace) -> list[dict[str, Any]]:
    """Return every point of a grid: choices, whole numbers, or floats with a step; conditions and bounds respected, no point twice.

    Raises:
        UserError: a dimension is a continuum, or there are more than 10,000 points.
    """
    order = ordered(space)
    number = math.prod(space[name].num_values for name in order if math.isfinite(space[name].num_values))
    if number > MOST_POINTS:
        raise UserError(f"the grid of {', '.join(order)} has {number:.3g} points; at most {MOST_POINTS:,} are visited. Sample instead.")
    axes = [_axis(name, space[name]) for name in order]
    points: dict[str, dict[str, Any]] = {}
    for combination in itertools.product(*axes):
        point: dict[str, Any] = {}
        for name, value in zip(order, combination, strict=True):
            if is_active(space[name], point):
                point[name] = value
        if _is_inside(space, point):
            points.setdefault(repr(point), point)
    return list(points.values())


def _is_inside(space: SearchSpace, point: Mapping[str, Any]) -> bool:
    """Return whether no value lies below the one that bounds it; a dimension that is not searched bounds nothing."""
    bounds = {name: space[name].above for name in point}
    return all(point[name] >= point[bound] for name, bound in bounds.items() if bound is not None and bound in point)


def _axis(name: str, dimension: Dimension) -> list[Any]:
    if math.isinf(dimension.num_values) or (dimension.type == "int" and dimension.log):
        raise UserError(f"dimension {name} is a continuum: a grid needs `choices`, or low, high and `step`")
    return dimension.values()
