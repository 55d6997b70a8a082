"""From a file, a name and flags to a sweep that is checked whole before a worker starts."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from analysis.evaluation.suites import load_suite
from models.errors import UserError, nearest, unknown_name
from orchestration import recipes
from orchestration.catalogue import defence as defence_record
from orchestration.experiment import ExperimentConfig
from orchestration.search_space import RECIPE, Dimension, flatten_by_recipe, joint_space, scoped, split
from orchestration.sweeping.checks import check_goals, check_space
from orchestration.sweeping.config import SweepConfig
from orchestration.sweeping.named import sweep_tree

MOST_MISTAKES = 10
"""So many of a file's mistakes are shown at once."""


def load_sweep(sweep: str, overrides: dict[str, Any] | None = None) -> SweepConfig:
    """Return a sweep by name or path, checked whole.

    Args:
        sweep: name of a shipped sweep, name of a recipe (its defence's own search space), or path of a YAML file.
        overrides: fields of the sweep (`num_trials`, ...), or `settings.<dotted field>`.

    Raises:
        UserError: an unknown name or field, or a dimension whose ends the schema does not allow.
    """
    return check_sweep(*sweep_tree(sweep), overrides)


def check_sweep(tree: dict[str, Any], source: str, overrides: dict[str, Any] | None = None) -> SweepConfig:
    """Return the sweep that a tree describes, checked whole; `source` names it in errors. See `load_sweep`."""
    try:
        return _checked(tree, source, overrides or {})
    except UserError as error:
        # What is checked elsewhere, a recipe's or a suite's name, does not know which file it stands in.
        if source.removesuffix(".yaml") in str(error):
            raise
        raise UserError(f"{source}: {error}") from None


def _checked(tree: dict[str, Any], source: str, overrides: dict[str, Any]) -> SweepConfig:
    for key, value in overrides.items():
        section, dot, rest = key.partition(".")
        if dot and section in ("settings", "space"):  # their keys are dotted names themselves
            given = tree.get(section) or {}
            if not isinstance(given, dict):
                raise UserError(f"{source}: {section} should be a mapping of dotted fields, it is {given!r:.100}")
            tree[section] = given | {rest: value}
        else:
            recipes.set_dotted(tree, key, value)
    if tree.get("recipes") and isinstance(tree.get("space"), dict):
        tree["space"] = flatten_by_recipe(tree["space"])
    try:
        config = SweepConfig(**tree)
    except ValidationError as error:
        lines = [_explain(item, source) for item in error.errors()]
        more = [f"{source}: {len(lines) - MOST_MISTAKES} more mistakes"] if len(lines) > MOST_MISTAKES else []
        raise UserError("\n".join(lines[:MOST_MISTAKES] + more)) from None
    config = _informed(config.model_copy(update={"space": _whole_space(config, source)}))
    check_goals(config)
    for experiment in config.base_experiments():
        load_suite(config.suite, experiment.defence.name)
    check_space(config)
    return config


def _whole_space(config: SweepConfig, source: str) -> dict[str, Dimension]:
    """Return the space of a sweep, that of the catalogue where the file names none."""
    given = config.space or {}
    if not config.recipes:
        return given or _catalogue_space(config.experiment({}), source)
    bases = config.base_experiments()
    unknown = sorted({recipe for recipe, _ in map(split, given) if recipe is not None} - set(config.recipes))
    if unknown:
        raise unknown_name("recipe in `space`", unknown[0], config.recipes)
    if len({experiment.resources for experiment in bases}) > 1:
        needs = ", ".join(f"{experiment.name}: {experiment.resources}" for experiment in bases)
        raise UserError(
            f"{source}: the recipes ask for different resources ({needs}); name one under `settings`, as `resources.workers: 1`"
        )
    spaces = {}
    for recipe, experiment in zip(config.recipes, bases, strict=True):
        own = {split(name)[1]: dimension for name, dimension in given.items() if split(name)[0] == recipe}
        spaces[recipe] = own or _catalogue_space(experiment, source)
    return joint_space(spaces, {name: dimension for name, dimension in given.items() if split(name)[0] is None})


def _informed(config: SweepConfig) -> SweepConfig:
    """Return the sweep after the theory it names was asked; the answers are in `remarks`."""
    if not config.prior:
        return config
    space, points, remarks = dict(config.space or {}), list(config.points), list(config.remarks)
    for recipe, experiment in zip(config.all_recipes, config.base_experiments(), strict=True):
        theory = defence_record(experiment.defence.name).prior
        if theory is None or experiment.defence.name not in config.prior:
            continue
        names = [name for name in space if not config.recipes or split(name)[0] == recipe]
        own = {split(name)[1] if config.recipes else name: space[name] for name in names}
        found = theory.inform(config.prior[experiment.defence.name], experiment.defence.parameters, own)
        prefix = scoped(recipe, "") if config.recipes else ""
        space |= {prefix + name: dimension for name, dimension in found.space.items()}
        chosen = {RECIPE: recipe} if config.recipes else {}
        points += [chosen | {prefix + name: value for name, value in point.items()} for point in found.points]
        remarks += found.remarks
    return config.model_copy(update={"space": space, "points": tuple(points), "remarks": tuple(remarks)})


def _catalogue_space(experiment: ExperimentConfig, source: str) -> dict[str, Dimension]:
    space = dict(defence_record(experiment.defence.name).search_space)
    if not space:
        raise UserError(f"{source}: defence {experiment.defence.name!r} has no search space of its own; name one under `space`")
    return space


def _explain(item: Any, source: str) -> str:
    where = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        close = nearest(str(item["loc"][-1]), [*SweepConfig.model_fields, *Dimension.model_fields])
        hint = f" Did you mean {close[0]!r}?" if close else ""
        return f"{source}: unknown field {where!r}.{hint}"
    return f"{source}: {where}: {item['msg'].removeprefix('Value error, ')}"
