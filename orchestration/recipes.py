"""Recipes: named experiments in YAML, and flags that tune them. Errors name the file or flag, the field and what is allowed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from models.errors import UserError, nearest, unknown_name
from orchestration.experiment import ExperimentConfig, flatten
from orchestration.yaml_text import load_yaml
from trainers.objective import objective_entry

FOLDER = Path(__file__).parent / "recipes"


@dataclasses.dataclass(frozen=True)
class LoadedRecipe:
    """An experiment and, for every field, where its value comes from: `default`, `recipe` or `flag`."""

    experiment: ExperimentConfig
    origins: dict[str, str]


def list_recipes() -> dict[str, str]:
    """Return names and one-line descriptions of the shipped recipes; those that start with `_` are only bases of others."""
    names = sorted(path.stem for path in FOLDER.glob("*.yaml") if not path.stem.startswith("_"))
    return {name: str(read_yaml(FOLDER / f"{name}.yaml").get("description", "")) for name in names}


def load_recipe(recipe: str, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Return the experiment of a recipe with flags applied.

    Args:
        recipe: name of a shipped recipe, or path of a YAML file.
        overrides: `--section.field value` or `--section.field=value` as typed on the command line.

    Raises:
        UserError: no such recipe, unreadable YAML, an unknown field or a value that is not allowed.
    """
    path = find_recipe(recipe)
    tree = read_tree(path)
    flags = parse_overrides(overrides)
    for dotted, value in flags.items():
        if dotted == "defence.name":
            raise UserError("the recipe chooses the defence; flags only tune it. `rayndom list recipes` shows the recipes.")
        set_dotted(tree, dotted, value)
    tree["name"] = path.stem
    experiment = parse_experiment(tree, str(path.name))
    given = set(flatten(_with_names(tree)))
    origins = {key: "flag" if key in flags else "recipe" if key in given else "default" for key in experiment.flatten()}
    return LoadedRecipe(experiment, origins)


def find_recipe(recipe: str) -> Path:
    """Return the file of a recipe given by name or path."""
    candidate = Path(recipe)
    if candidate.suffix in (".yaml", ".yml"):
        if candidate.is_file():
            return candidate
        raise UserError(f"no recipe file {recipe}")
    path = FOLDER / f"{recipe}.yaml"
    if not path.is_file():
        raise unknown_name("recipe", recipe, list_recipes())
    return path


def read_tree(path: Path) -> dict[str, Any]:
    """Return a recipe's YAML with its bases (`extends: other_recipe`) merged under it."""
    tree = read_yaml(path)
    base = tree.pop("extends", None)
    if base is None:
        return tree
    beside = path.parent / f"{base}.yaml"
    parent = beside if beside.is_file() else FOLDER / f"{base}.yaml"
    if not parent.is_file():
        raise UserError(f"{path.name}: extends {base!r}, which does not exist")
    inherited = read_tree(parent)
    inherited.pop("description", None)
    return merge(inherited, tree)


def parse_experiment(tree: dict[str, Any], source: str) -> ExperimentConfig:
    """Validate a tree; `source` names it in errors."""
    try:
        return ExperimentConfig(**tree)
    except ValidationError as error:
        raise UserError("\n".join(_explain(item, source, tree) for item in error.errors())) from None
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


def parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """Return dotted fields and values; values are read as YAML, so `null`, `[1, 2]`, `true` and `8/255` work."""
    flags: dict[str, Any] = {}
    pending = list(arguments)
    while pending:
        argument = pending.pop(0)
        if not argument.startswith("--"):
            raise UserError(f"unexpected argument {argument!r}; fields are set as --section.field value")
        name, equals, text = argument[2:].partition("=")
        if not equals:
            if not pending:
                raise UserError(f"flag --{name} needs a value")
            text = pending.pop(0)
        try:
            flags[name.replace("-", "_")] = load_yaml(text)
        except yaml.YAMLError:
            flags[name.replace("-", "_")] = text
    return flags


def set_dotted(tree: dict[str, Any], dotted: str, value: Any) -> None:
    """Set `a.b.c` in nested dictionaries, creating sections; a section given by its bare name becomes `{"name": ...}`."""
    *sections, leaf = dotted.split(".")
    for section in sections:
        inner = tree.get(section)
        if isinstance(inner, str):
            inner = {"name": inner}
        tree[section] = dict(inner or {})
        tree = tree[section]
    tree[leaf] = value


def _with_names(tree: dict[str, Any]) -> dict[str, Any]:
    """Return the tree with sections that are given by a bare name written out."""
    named = {key: {"name": tree[key]} for key in ("defence", "backbone") if isinstance(tree.get(key), str)}
    training = tree.get("training")
    if isinstance(training, dict) and isinstance(training.get("objective"), str):
        named["training"] = training | {"objective": {"name": training["objective"]}}
    return tree | named


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Return `base` with `over` on top, section by section. A section whose `name` changes is replaced, not merged."""
    result = dict(base)
    for key, value in over.items():
        below = result.get(key)
        if isinstance(below, str) and isinstance(value, dict):
            below = {"name": below}
        if isinstance(below, dict) and isinstance(value, dict) and value.get("name", below.get("name")) == below.get("name"):
            result[key] = merge(below, value)
        else:
            result[key] = value
    return result


def read_yaml(path: Path) -> dict[str, Any]:
    """Return a YAML mapping; what is not one is a `UserError` that names file and line."""
    try:
        tree = load_yaml(path.read_text())
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise UserError(f"{path.name}{where}: not valid YAML: {getattr(error, 'problem', error)}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path.name}: a recipe is a mapping of sections, this is a {type(tree).__name__}")
    return tree


def _explain(item: Any, source: str, tree: dict[str, Any]) -> str:
    location = [str(part) for part in item["loc"]]
    where = ".".join(location)
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "extra_forbidden":
        allowed = _fields_at(location[:-1], tree)
        close = nearest(location[-1], allowed)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        return f"{source}: unknown field {where!r}.{hint} Allowed here: {', '.join(allowed)}."
    if item["type"] == "missing":
        return f"{source}: field {where!r} is missing."
    if item["type"] == "literal_error" and isinstance(item["input"], str):
        allowed = item["ctx"]["expected"]
        close = nearest(item["input"], allowed.replace("'", "").replace(" or ", ", ").split(", "))
        hint = f" Did you mean {close[0]!r}?" if close else ""
        return f"{source}: {where}: {item['input']!r} is not allowed.{hint} Allowed: {allowed}."
    if isinstance(item["input"], dict | BaseModel) or item["type"] == "value_error":
        return f"{source}: {where}: {message}" if where else f"{source}: {message}"
    return f"{source}: {where}: {message} (got {item['input']!r})"


def _fields_at(location: Sequence[str], tree: dict[str, Any]) -> list[str]:
    """Return the field names of the section at a dotted location."""
    model: type[BaseModel] = ExperimentConfig
    for depth, part in enumerate(location):
        if list(location[: depth + 1]) == ["training", "objective"]:
            model = objective_entry(_objective_name(tree)).config
            continue
        annotation = model.model_fields[part].annotation if part in model.model_fields else None
        candidates = [annotation, *get_args(annotation)]
        found = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)
        if found is None:
            return []
        model = found
    return sorted(model.model_fields)


def _objective_name(tree: dict[str, Any]) -> str:
    objective = tree.get("training", {}).get("objective", "adversarial")
    return objective if isinstance(objective, str) else objective["name"]
