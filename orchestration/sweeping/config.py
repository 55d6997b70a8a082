"""Sweeps as data: which recipes, which dimensions, which objectives, how many trials. `loading` reads and checks them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, SerializeAsAny, field_validator, model_validator

from models.configuration import MOST_IMAGES, Config
from models.errors import UserError, unknown_name
from models.file_content import absolute
from orchestration import recipes
from orchestration.catalogue import catalogue
from orchestration.home import checked_name
from orchestration.search_space import RECIPE, Dimension, chosen_fields
from orchestration.sweeping.goals import (
    Constraint,
    RepeatsConfig,
    StoppingConfig,
    SweepObjective,
    WarmStartConfig,
)
from orchestration.training.measure import MARKED_METRIC, MeasureConfig

if TYPE_CHECKING:
    from orchestration.experiment import ExperimentConfig  # brings PyTorch: `rayndom status` reads sweeps without it

SWEEP_FILE = "sweep.json"
"""Name of a sweep's definition in its folder and in its MLflow run."""

MOST_AT_ONCE = 4096
"""Trials at a time."""

SamplerName = Literal["tpe", "multivariate_tpe", "grouped_tpe", "gp", "cmaes", "nsgaii", "nsgaiii", "qmc", "random", "grid"]

BUDGET_FIELDS = {
    "name",
    "description",
    "num_trials",
    "max_concurrent_trials",
    "autoscale_to",
    "max_failed_share",
    "max_hours",
    "max_state_gib",
    "priority",
    "suite",
    "baselines",
    "num_test_examples",
    "repeats",
    "remarks",
    "fixed_weights",
    "log_models",
}


# Fields that came later: at their defaults they are not part of a sweep's key, so that earlier sweeps keep theirs.
LATER_FIELDS = {"recipes", "constraints", "measure", "points", "prior", "warm_start"}

EARLIER_SCHEDULER = "asha"
"""When it was the only one, keys did not name it."""

EARLIER_PRIORS = ("ctrw", "dcs")
"""The key of a sweep with a prior has one for each of these, asked for or not: so it was when they were the only ones."""


class FixedWeights(Config):
    """What a name of initial weights meant when a sweep began."""

    name: str = Field(description="A name that goes on meaning it: of an alias, the version.")
    sha256: str = Field(description="SHA-256 of the file with the weights.")


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
    warm_start: WarmStartConfig | None = Field(None, description="Points of other sweeps or of finished runs, tried behind `points`.")
    prior: Mapping[str, SerializeAsAny[Config]] | None = Field(
        None, description="Defence -> what its paper's theory is asked; its answer bounds the space or seeds it."
    )
    objectives: tuple[SweepObjective, ...] = Field(
        (SweepObjective(metric="validation/robust_accuracy"),),
        min_length=1,
        description="One, or several for a Pareto front.",
    )
    constraints: tuple[Constraint, ...] = Field((), description="What a trial must satisfy to win.")
    measure: MeasureConfig = Field(default_factory=MeasureConfig, description="How named protocols are measured at the end of a trial.")
    sampler: SamplerName = Field("tpe", description="How points are proposed: docs/sweeps.md says which to choose when.")
    num_trials: int | None = Field(None, ge=1, le=1_000_000, description="Number of trials; a grid may leave it out and visits all points.")
    max_concurrent_trials: int | None = Field(
        None, ge=1, le=MOST_AT_ONCE, description="Trials at a time; none: what the resources allow. 1 makes a sweep reproducible."
    )
    autoscale_to: int | None = Field(
        None,
        ge=1,
        le=MOST_AT_ONCE,
        description="Trials at a time that the cluster's autoscaler is asked to make room for; as many run as nodes come. None: as many as "
        "there is room for when the sweep starts.",
    )
    stopping: StoppingConfig | None = Field(
        default_factory=StoppingConfig, description="Which trials end early; none: every trial runs to its end."
    )
    max_failed_share: float = Field(
        0.25,
        ge=0,
        le=1,
        description="The sweep ends when more than this share of its trials broke in one start. Diverged trials are results and do not "
        "count.",
    )
    max_hours: float | None = Field(
        None,
        gt=0,
        le=100_000,
        description="After so many hours no further trial starts; those that run come to their end, and the sweep concludes with what it "
        "has. Each start has its own hours; none: no limit.",
    )
    max_state_gib: float | None = Field(
        None,
        gt=0,
        le=1_000_000,
        description="Disk that states to train on from, and weights kept on the way, may take, of trials that are over: beyond it those of "
        "finished ones go first, then of those that came least far. None: all stay, and `rayndom clean` removes them.",
    )
    priority: int = Field(
        0,
        ge=-1000,
        le=1000,
        description="Among sweeps on one cluster: while one with a higher priority has trials that wait for room, this one runs one "
        "trial at a time.",
    )
    seed: int = Field(0, ge=0, lt=2**31, description="Seed of the search.")
    repeats: RepeatsConfig | None = Field(None, description="Training the best trials with further seeds; none: one seed decides.")
    suite: str = Field("quick", description="Evaluation suite for the winner and the baselines.")
    baselines: tuple[str, ...] = Field((), description="Recipes trained and evaluated beside the winner, with the same settings.")
    log_models: Literal["chosen", "all"] = Field(
        "chosen", description="Whose weights MLflow keeps: of the winner and the baselines, or of all trials that trained to their end."
    )
    remarks: tuple[str, ...] = Field((), description="What theory says of the space; written by the tool.")
    fixed_weights: Mapping[str, FixedWeights] = Field(
        default_factory=dict,
        description="Name in `training.initial_weights` -> what it meant when the sweep began, for all its trials; written by the tool.",
    )
    num_test_examples: int | None = Field(
        None, ge=1, le=MOST_IMAGES, description="Test images for the final evaluation; none: the suite's own."
    )

    @field_validator("name")
    @classmethod
    def _name_is_one_of_a_file(cls, name: str) -> str:
        return checked_name(name)

    @field_validator("prior", mode="before")
    @classmethod
    def _priors_are_those_of_defences(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        from models.registry import parse_parameters

        theories = {name: record.prior.settings for name, record in catalogue().items() if record.prior is not None}
        parsed = {}
        for name, settings in value.items():
            if name not in theories:
                raise unknown_name("prior", str(name)[:100], theories)
            if settings is None:
                continue
            if isinstance(settings, Mapping):
                settings = parse_parameters("prior", name, theories[name], settings)
            if not isinstance(settings, theories[name]):
                raise ValueError(f"{name} should be a mapping of {', '.join(theories[name].model_fields)}; it is {settings!r:.100}")
            parsed[name] = settings
        return parsed

    @model_validator(mode="after")
    def _trials_are_bounded(self) -> SweepConfig:
        if self.num_trials is None and self.sampler != "grid":
            raise ValueError("num_trials is missing (only a grid sweep may leave it out)")
        if self.sampler == "grid" and self.warm_start is not None:
            raise ValueError("a grid visits its own points: leave out warm_start")
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
        self._refuse_relative_path(tree)
        return self._parsed(tree, f"sweep {self.name}")

    def _refuse_relative_path(self, tree: Mapping[str, Any]) -> None:
        """A trial runs in a folder of its own, from which a relative path would lead elsewhere."""
        from models.initial_weights import SCHEMES, is_path

        training = tree.get("training")
        name = training.get("initial_weights") if isinstance(training, Mapping) else None
        if isinstance(name, str) and name and is_path(name) and not name.startswith(SCHEMES) and str(absolute(name)) != name:
            raise UserError(f"sweep {self.name}: training.initial_weights {name}: a sweep names files from the root, as {absolute(name)}")

    def baseline_experiment(self, recipe: str) -> ExperimentConfig:
        """Return a baseline's experiment: its recipe with the sweep's settings, those of the defence left out."""
        tree = recipes.recipe_tree(recipe)
        for dotted, value in self.settings.items():
            if not dotted.startswith("defence."):
                recipes.set_dotted(tree, dotted, value)
        return self._parsed(tree, f"sweep {self.name}, baseline {recipe}")

    def _parsed(self, tree: dict[str, Any], source: str) -> ExperimentConfig:
        """Return the experiment of a tree, in which a name of initial weights means what it meant when the sweep began."""
        experiment = recipes.parse_experiment(tree, source)
        fixed = self.fixed_weights.get(experiment.training.initial_weights or "")
        if fixed is None:
            return experiment
        return experiment.model_copy(update={"training": experiment.training.model_copy(update={"initial_weights": fixed.name})})


def sweep_key(config: SweepConfig) -> str:
    """Return the name of a sweep's folder: its name and a hash of what it searches. Budgets are not part of it."""
    config = config.model_copy(update={"fixed_weights": {}})  # the same sweep, whatever names of weights meant when it began
    fields = type(config).model_fields
    unused = {name for name in LATER_FIELDS if getattr(config, name) == fields[name].get_default(call_default_factory=True)}
    bases = [experiment.scientific() for experiment in config.base_experiments()]
    definition = config.model_dump(mode="json", exclude=BUDGET_FIELDS | unused) | {"base": bases if config.recipes else bases[0]}
    if definition["stopping"] is not None and definition["stopping"]["scheduler"] == EARLIER_SCHEDULER:
        del definition["stopping"]["scheduler"]
    if "prior" in definition:
        definition["prior"] = dict.fromkeys(EARLIER_PRIORS) | definition["prior"]
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
