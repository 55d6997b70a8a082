"""From a recipe and flags to a validated experiment. Errors name the file or flag, the field and what is allowed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from models.errors import UserError
from models.yaml_text import YamlSyntaxError, load_yaml
from orchestration.recipes.composition import Composition, Origin, compose
from orchestration.recipes.names import RecipeName
from orchestration.recipes.trees import Tree, set_dotted, with_names

if TYPE_CHECKING:
    # Schemas bring PyTorch, which the names of recipes do without.
    from orchestration.experiment import ExperimentConfig

_LONGEST_FLAG = 200


@dataclasses.dataclass(frozen=True)
class LoadedRecipe:
    """An experiment, for every field where its value comes from, and the parts of the recipe's name (None: a file)."""

    experiment: ExperimentConfig
    origins: dict[str, Origin]
    parts: RecipeName | None = None


def load_recipe(recipe: str, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Return the experiment of a recipe with flags applied.

    Args:
        recipe: `<method>_<setting>[_<variant>]`, or path of a YAML file.
        overrides: `--section.field value` or `--section.field=value` as typed on the command line.

    Raises:
        UserError: no such recipe, unreadable YAML, an unknown field or a value that is not allowed.
    """
    composition = compose(recipe)
    tree = composition.tree
    flags = parse_overrides(overrides)
    for dotted, value in flags.items():
        if dotted == "defence.name":
            raise UserError("the recipe chooses the defence; flags only tune it. `rayndom list recipes` shows the recipes.")
        set_dotted(tree, dotted, value)

    def source(location: Sequence[str]) -> str:
        dotted = ".".join(location)
        blamed = next((flag for flag in flags if _covers(flag, dotted) or _covers(dotted, flag)), None)
        if blamed is not None:
            return f"{composition.name}: --{blamed}"
        return composition.source_of(location)

    experiment = parse_experiment(tree, source)
    return LoadedRecipe(experiment, _origins(experiment, composition, tree, flags), composition.parts)


def recipe_tree(recipe: str) -> Tree:
    """Return the sections of a recipe as its files have them, with `name` and `description`: what a sweep sets fields in.

    Raises:
        UserError: as `compose`.
    """
    return compose(recipe).tree


def parse_experiment(tree: Tree, source: str | Callable[[Sequence[str]], str]) -> ExperimentConfig:
    """Validate a tree; `source` names it in errors, or says for the location of a field what to name."""
    from pydantic import ValidationError

    from orchestration.experiment import ExperimentConfig
    from orchestration.recipes.explaining import explain

    named = source if callable(source) else lambda _: source
    try:
        return ExperimentConfig(**tree)
    except ValidationError as error:
        problems = [explain(item, named([str(part) for part in item["loc"]]), tree) for item in error.errors()]
        raise UserError("\n".join(dict.fromkeys(problems))) from None
    except UserError as error:
        raise UserError(f"{named(())}: {error}") from None


def parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """Return dotted fields and values; values are read as YAML, so `null`, `[1, 2]`, `true` and `8/255` work.

    Raises:
        UserError: something else than fields, or a value that YAML's door refuses.
    """
    flags: dict[str, Any] = {}
    pending = list(arguments)
    while pending:
        argument = pending.pop(0)
        if not argument.startswith("--"):
            raise UserError(f"unexpected argument {argument[:_LONGEST_FLAG]!r}; fields are set as --section.field value")
        name, equals, text = argument[2:].partition("=")
        if not equals:
            if not pending:
                raise UserError(f"flag --{name[:_LONGEST_FLAG]} needs a value")
            text = pending.pop(0)
        field = name.replace("-", "_")
        if not field or len(field) > _LONGEST_FLAG:
            raise UserError(f"--{name[:60]}: the name of a field has 1 to {_LONGEST_FLAG} characters")
        try:
            flags[field] = load_yaml(text, f"--{name}")
        except YamlSyntaxError:
            flags[field] = text
    return flags


def _origins(experiment: ExperimentConfig, composition: Composition, tree: Tree, flags: Mapping[str, Any]) -> dict[str, Origin]:
    """Return for every field which layer its value comes from; parameters of a preset come from where the preset is named."""
    from orchestration.experiment import flatten

    given = set(flatten(with_names(tree)))
    layers = [(layer.origin, set(flatten(with_names(layer.tree)))) for layer in composition.layers]

    def origin(field: str) -> Origin:
        if any(_covers(flag, field) for flag in flags):
            return "flag" if field in given else "default"
        # A layer below may have set a field of a section that one above replaced: then it is not given any more.
        return next((name for name, fields in reversed(layers) if field in fields), "default") if field in given else "default"

    origins = {field: origin(field) for field in experiment.flatten()}
    for parameter in _preset_parameters(tree):
        field = f"defence.{parameter}"
        if field in origins and field not in given:
            origins[field] = origin("defence.preset")
    return origins


def _preset_parameters(tree: Tree) -> list[str]:
    from models.registry import defence_model

    defence = with_names(tree).get("defence")
    if not isinstance(defence, dict) or "preset" not in defence:
        return []
    return list(defence_model(defence["name"]).presets[defence["preset"]])


def _covers(above: str, field: str) -> bool:
    """Return whether `above` is `field` or a section around it."""
    return field == above or field.startswith(f"{above}.")
