"""What is wrong with a configuration, in words: from pydantic's findings to sentences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

from pydantic import BaseModel

from models.errors import nearest
from orchestration.experiment import ExperimentConfig
from orchestration.recipes.trees import Tree, with_names
from trainers.objective import ObjectiveConfig, objective_entry


def explain(item: Any, source: str, tree: Tree) -> str:
    """Return one sentence on what pydantic refused: where, what, what is allowed, the nearest valid name.

    Args:
        item: of `ValidationError.errors()`.
        source: what to name as the place it came from.
        tree: what was validated.
    """
    location = [str(part) for part in item["loc"]]
    where = ".".join(location)
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "extra_forbidden":
        allowed = _fields_at(location[:-1], tree)
        elsewhere = [name for name in _leaves(ExperimentConfig) if name.rpartition(".")[2] == location[-1]]
        close = elsewhere or nearest(location[-1], allowed) or nearest(where, _leaves(ExperimentConfig))
        hint = f" Did you mean {close[0]!r}?" if close else ""
        return f"{source}: unknown field {where!r}.{hint} Allowed here: {', '.join(allowed)}."
    if item["type"] == "missing":
        return f"{source}: field {where!r} is missing."
    if item["type"] == "literal_error" and isinstance(item["input"], str):
        allowed = item["ctx"]["expected"]
        close = nearest(item["input"], allowed.replace("'", "").replace(" or ", ", ").split(", "))
        hint = f" Did you mean {close[0]!r}?" if close else ""
        return f"{source}: {where}: {_shown(item['input'])} is not allowed.{hint} Allowed: {allowed}."
    if isinstance(item["input"], dict | BaseModel) or item["type"] == "value_error":
        return f"{source}: {where}: {message}" if where else f"{source}: {message}"
    return f"{source}: {where}: {message} (got {_shown(item['input'])})"


def _fields_at(location: Sequence[str], tree: Tree) -> list[str]:
    """Return the field names of the section at a dotted location."""
    model: type[BaseModel] = ExperimentConfig
    for depth, part in enumerate(location):
        if list(location[: depth + 1]) == ["training", "objective"]:
            model = _objective(tree)
            continue
        found = _section(model.model_fields[part].annotation) if part in model.model_fields else None
        if found is None:
            return []
        model = found
    return sorted(model.model_fields)


def _leaves(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Return the dotted names of all fields of a schema, sections that have schemas of their own opened."""
    names: list[str] = []
    for name, info in model.model_fields.items():
        section = _section(info.annotation)
        names += [prefix + name] if section is None else _leaves(section, f"{prefix}{name}.")
    return names


def _section(annotation: Any) -> type[BaseModel] | None:
    return next((each for each in (annotation, *get_args(annotation)) if isinstance(each, type) and issubclass(each, BaseModel)), None)


def _objective(tree: Tree) -> type[BaseModel]:
    objective = with_names(tree).get("training", {}).get("objective", {})
    name = objective.get("name") if isinstance(objective, dict) else None
    return objective_entry(name).config if isinstance(name, str) else ObjectiveConfig


def _shown(value: Any) -> str:
    """Return a value as text of at most 120 characters."""
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
