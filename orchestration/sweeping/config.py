"""Sweeps as data: which recipes, which dimensions, which objectives, how many trials. Everything is checked before a worker starts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from analysis.evaluation.suites import load_suite
from models.configuration import Config
from models.errors import UserError, nearest, unknown_name
from orchestration import recipes
from orchestration.catalogue import defence as defence_record
from orchestration.experiment import ExperimentConfig, checked_name
from orchestration.search_space import (
    RECIPE,
    Dimension,
    chosen_fields,
    flatten_by_recipe,
    joint_space,
    scoped,
    split,
)
from orchestration.sweeping.checks import check_goals, check_space
from orchestration.sweeping.goals import (
    Constraint,
    RepeatsConfig,
    StoppingConfig,
    SweepObjective,
)
from orchestration.sweeping.named import sweep_tree
from orchestration.sweeping.theory_prior import PriorConfig, inform
from orchestration.training.final_measures import MARKED_METRIC
from orchestration.training.job import MeasureConfig

SWEEP_FILE = "sweep.json"
"""Name of a sweep's definition in its folder and in its MLflow run."""

BUDGET_FIELDS = {
    "name",
    "description",
    "num_trials",
    "max_concurrent_trials",
    "suite",
    "baselines",
    "num_test_examples",
    "repeats",
    "remarks",
}


# Fields that came later: at their defaults they are not part of a sweep's key, so that earlier sweeps keep theirs.
LATER_FIELDS = {"recipes", "constraints", "measure", "points", "prior"}


class SweepConfig(Config):
    """One sweep."""

    name: str = Field("", description="Name of the sweep: the file's name.")
    description: str = Field("", description="One line on what it answers.")
    recipe: str | None = Field(None, description="The recipe that trials are variations of.")
    recipes: tuple[str, ...] = Field(
        (), description="Instead of `recipe`: several, among which the search chooses first; each has its own dimensions."
    )
    settings: dict[str, Any] = Field(default_factory=dict, description="Dotted fields that all trials change, e.g. `training.epochs: 30`.")
    space: dict[str, Dimension] | None = Field(
        None,
        description="Dotted field -> dimension; none: the defence's own search space. With `recipes`, recipe -> its dimensions, and fields "
        "that all have.",
    )
    points: tuple[dict[str, Any], ...] = Field(
        (), description="Values of dimensions tried first, the others proposed; with the sampler `grid` the only ones that are visited."
    )
    prior: PriorConfig | None = Field(None, description="Bounds of the papers' theory that bound the space or seed it.")
    objectives: tuple[SweepObjective, ...] = Field(
        (SweepObjective(metric="validation/robust_accuracy"),),
        min_length=1,
        description="One, or several for a Pareto front.",
    )
    constraints: tuple[Constraint, ...] = Field((), description="What a trial must satisfy to win.")
    measure: MeasureConfig = Field(default_factory=MeasureConfig, description="How named protocols are measured at the end of a trial.")
    sampler: Literal["tpe", "random", "grid"] = Field("tpe", description="How Optuna proposes.")
    num_trials: int | None = Field(None, ge=1, le=1_000_000, description="Number of trials; a grid may leave it out and visits all points.")
    max_concurrent_trials: int | None = Field(
        None, ge=1, description="Trials at a time; none: what the resources allow. 1 makes a sweep reproducible."
    )
    stopping: StoppingConfig | None = Field(default_factory=StoppingConfig, description="ASHA; none: every trial runs to its end.")
    seed: int = Field(0, ge=0, description="Seed of the search.")
    repeats: RepeatsConfig | None = Field(None, description="Training the best trials with further seeds; none: one seed decides.")
    suite: str = Field("quick", description="Evaluation suite for the winner and the baselines.")
    baselines: tuple[str, ...] = Field((), description="Recipes trained and evaluated beside the winner, with the same settings.")
    remarks: tuple[str, ...] = Field((), description="What theory says of the space; written by the tool.")
    num_test_examples: int | None = Field(None, ge=1, description="Test images for the final evaluation; none: the suite's own.")

    @field_validator("name")
    @classmethod
    def _name_is_one_of_a_file(cls, name: str) -> str:
        return checked_name(name)

    @model_validator(mode="after")
    def _trials_are_bounded(self) -> SweepConfig:
        if self.num_trials is None and self.sampler != "grid":
            raise ValueError("num_trials is missing (only a grid sweep may leave it out)")
        if (self.recipe is None) == (not self.recipes):
            raise ValueError("give either `recipe` or `recipes`")
        if len(set(self.recipes)) != len(self.recipes):
            raise ValueError(f"a recipe stands twice in {', '.join(self.recipes)}")
        keys = [constraint.key for constraint in self.constraints]
        if len(set(keys)) != len(keys):
            raise ValueError(f"a constraint stands twice: {', '.join(keys)}")
        return self

    @property
    def all_recipes(self) -> tuple[str, ...]:
        """The recipes that trials are variations of: one, or several."""
        return self.recipes or (str(self.recipe),)

    @property
    def final_metrics(self) -> tuple[str, ...]:
        """The metrics that a finished trial is judged by: objectives and constraints."""
        return (*(objective.metric for objective in self.objectives), *(constraint.metric for constraint in self.constraints))

    @property
    def needs_protocols(self) -> bool:
        """Whether a finished trial is attacked under named protocols."""
        return any(metric == MARKED_METRIC or metric.startswith("validation/robust_accuracy/T") for metric in self.final_metrics)

    def base_experiments(self) -> list[ExperimentConfig]:
        """Return each recipe's experiment with the sweep's settings and nothing chosen yet."""
        return [self.experiment({RECIPE: recipe} if self.recipes else {}) for recipe in self.all_recipes]

    def experiment(self, values: dict[str, Any]) -> ExperimentConfig:
        """Return the experiment of a trial; in a sweep over several recipes the first one, if `values` choose none.

        Raises:
            UserError: a value is not allowed.
        """
        recipe = values.get(RECIPE, self.recipes[0]) if self.recipes else str(self.recipe)
        tree = recipes.recipe_tree(recipe)
        for dotted, value in (self.settings | (chosen_fields(values) if self.recipes else values)).items():
            try:
                recipes.set_dotted(tree, dotted, value)
            except UserError as error:
                raise UserError(f"sweep {self.name}: {error}") from None
        return recipes.parse_experiment(tree, f"sweep {self.name}")

    def baseline_experiment(self, recipe: str) -> ExperimentConfig:
        """Return a baseline's experiment: its recipe with the sweep's settings, those of the defence left out."""
        tree = recipes.recipe_tree(recipe)
        for dotted, value in self.settings.items():
            if not dotted.startswith("defence."):
                recipes.set_dotted(tree, dotted, value)
        return recipes.parse_experiment(tree, f"sweep {self.name}, baseline {recipe}")


def sweep_key(config: SweepConfig) -> str:
    """Return the name of a sweep's folder: its name and a hash of what it searches. Budgets are not part of it."""
    fields = type(config).model_fields
    unused = {name for name in LATER_FIELDS if getattr(config, name) == fields[name].get_default(call_default_factory=True)}
    bases = [experiment.scientific() for experiment in config.base_experiments()]
    definition = config.model_dump(mode="json", exclude=BUDGET_FIELDS | unused) | {"base": bases if config.recipes else bases[0]}
    digest = hashlib.blake2b(json.dumps(definition, sort_keys=True).encode(), digest_size=4).hexdigest()
    return f"{config.name}-{digest}"


def dimension_titles(config: SweepConfig) -> list[str]:
    """Return the heads of the columns that show a trial's values; the dimensions of several recipes share one column."""
    if config.recipes:
        return ["recipe", "values"]
    return [name.rpartition(".")[2] for name in config.space or {}]


def dimension_cells(config: SweepConfig, values: Mapping[str, Any]) -> list[str]:
    """Return a trial's values, one for each of `dimension_titles`."""
    if config.recipes:
        return [str(values.get(RECIPE, "")), describe_values({name: value for name, value in values.items() if name != RECIPE})]
    return [_short(values.get(name)) for name in config.space or {}]


def describe_values(values: Mapping[str, Any]) -> str:
    """Return a trial's values in one line."""
    return ", ".join(f"{name.rpartition('.')[2]} {_short(value)}" for name, value in values.items())


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


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
    for key, value in (overrides or {}).items():
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
        raise UserError("\n".join(_explain(item, source) for item in error.errors())) from None
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
    if config.prior is None:
        return config
    space, points, remarks = dict(config.space or {}), list(config.points), list(config.remarks)
    for recipe, experiment in zip(config.all_recipes, config.base_experiments(), strict=True):
        names = [name for name in space if not config.recipes or split(name)[0] == recipe]
        found = inform(config.prior, experiment, {split(name)[1] if config.recipes else name: space[name] for name in names})
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
