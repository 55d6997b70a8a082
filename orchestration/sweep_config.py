"""Sweeps as data: which recipe, which dimensions, which objective, how many trials. Everything is checked before a worker starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from analysis.suites import load_suite
from models.configuration import Config
from models.errors import UserError, nearest, unknown_name
from orchestration import recipes
from orchestration.catalogue import defence as defence_record
from orchestration.experiment import ExperimentConfig
from orchestration.search_space import Dimension, is_active, ordered
from trainers.validation import attack_name

FOLDER = Path(__file__).parent / "sweeps"


class SweepObjective(Config):
    """What a sweep improves."""

    metric: str = Field(description="Name of a metric of training, e.g. `validation/robust_accuracy`.")
    mode: Literal["max", "min"] = Field("max", description="Whether more or less is better.")


class StoppingConfig(Config):
    """Early stopping of unpromising trials by asynchronous successive halving (ASHA)."""

    metric: str = Field("validation/robust_accuracy", description="The metric that trials are compared by, always maximized.")
    grace_epochs: int = Field(1, ge=1, description="No trial is stopped before this many epochs.")
    reduction_factor: float = Field(3, gt=1, description="Of the trials at a rung, one in this many goes on.")


class SweepConfig(Config):
    """One sweep."""

    name: str = Field("", description="Name of the sweep: the file's name.")
    description: str = Field("", description="One line on what it answers.")
    recipe: str = Field(description="The recipe that trials are variations of.")
    settings: dict[str, Any] = Field(default_factory=dict, description="Dotted fields that all trials change, e.g. `training.epochs: 30`.")
    space: dict[str, Dimension] | None = Field(None, description="Dotted field -> dimension; none: the defence's own search space.")
    objectives: tuple[SweepObjective, ...] = Field(
        (SweepObjective(metric="validation/robust_accuracy"),),
        min_length=1,
        description="One, or several for a Pareto front.",
    )
    sampler: Literal["tpe", "random", "grid"] = Field("tpe", description="How Optuna proposes.")
    num_trials: int | None = Field(None, ge=1, description="Number of trials; a grid may leave it out and visits all points.")
    max_concurrent_trials: int | None = Field(
        None, ge=1, description="Trials at a time; none: what the resources allow. 1 makes a sweep reproducible."
    )
    stopping: StoppingConfig | None = Field(default_factory=StoppingConfig, description="ASHA; none: every trial runs to its end.")
    seed: int = Field(0, ge=0, description="Seed of the search.")
    suite: str = Field("quick", description="Evaluation suite for the winner and the baselines.")
    baselines: tuple[str, ...] = Field((), description="Recipes trained and evaluated beside the winner, with the same settings.")
    num_test_examples: int | None = Field(None, ge=1, description="Test images for the final evaluation; none: the suite's own.")

    @model_validator(mode="after")
    def _trials_are_bounded(self) -> SweepConfig:
        if self.num_trials is None and self.sampler != "grid":
            raise ValueError("num_trials is missing (only a grid sweep may leave it out)")
        return self

    def experiment(self, values: dict[str, Any]) -> ExperimentConfig:
        """Return the experiment of a trial.

        Raises:
            UserError: a value is not allowed.
        """
        tree = recipes.read_tree(recipes.find_recipe(self.recipe))
        for dotted, value in (self.settings | values).items():
            recipes.set_dotted(tree, dotted, value)
        tree["name"] = self.recipe
        return recipes.parse_experiment(tree, f"sweep {self.name}")

    def baseline_experiment(self, recipe: str) -> ExperimentConfig:
        """Return a baseline's experiment: its recipe with the sweep's settings, those of the defence left out."""
        tree = recipes.read_tree(recipes.find_recipe(recipe))
        for dotted, value in self.settings.items():
            if not dotted.startswith("defence."):
                recipes.set_dotted(tree, dotted, value)
        tree["name"] = recipe
        return recipes.parse_experiment(tree, f"sweep {self.name}, baseline {recipe}")


def list_sweeps() -> dict[str, str]:
    """Return names and descriptions of the shipped sweeps."""
    return {path.stem: str(recipes.read_yaml(path).get("description", "")) for path in sorted(FOLDER.glob("*.yaml"))}


def load_sweep(sweep: str, overrides: dict[str, Any] | None = None) -> SweepConfig:
    """Return a sweep by name or path, checked whole.

    Args:
        sweep: name of a shipped sweep, or path of a YAML file.
        overrides: fields of the sweep (`num_trials`, ...), or `settings.<dotted field>`.

    Raises:
        UserError: an unknown name or field, or a dimension whose ends the schema does not allow.
    """
    path = Path(sweep)
    if path.suffix not in (".yaml", ".yml"):
        path = FOLDER / f"{sweep}.yaml"
        if not path.is_file():
            raise unknown_name("sweep", sweep, list_sweeps())
    elif not path.is_file():
        raise UserError(f"no sweep file {sweep}")
    tree = recipes.read_yaml(path)
    for key, value in (overrides or {}).items():
        section, dot, rest = key.partition(".")
        if dot and section in ("settings", "space"):  # their keys are dotted names themselves
            tree[section] = (tree.get(section) or {}) | {rest: value}
        else:
            recipes.set_dotted(tree, key, value)
    tree["name"] = path.stem
    try:
        config = SweepConfig(**tree)
    except ValidationError as error:
        raise UserError("\n".join(_explain(item, path.name) for item in error.errors())) from None
    if config.space is None:
        experiment = config.experiment({})
        space = dict(defence_record(experiment.defence.name).search_space)
        if not space:
            raise UserError(f"{path.name}: defence {experiment.defence.name!r} has no search space of its own; name one under `space`")
        config = config.model_copy(update={"space": space})
    check_metrics(config)
    load_suite(config.suite, config.experiment({}).defence.name)
    check_space(config)
    return config


def check_metrics(config: SweepConfig) -> None:
    """Check that objectives and stopping name metrics that training reports.

    Raises:
        UserError: with the nearest names.
    """
    known = metric_names(config.experiment({}))
    wanted = [objective.metric for objective in config.objectives]
    if config.stopping is not None:
        wanted.append(config.stopping.metric)
    for metric in wanted:
        if metric not in known:
            raise unknown_name("metric", metric, known)


def metric_names(experiment: ExperimentConfig) -> list[str]:
    """Return the metrics that a run of `experiment` reports and that a sweep may improve."""
    validation = experiment.training.validation
    attacks = sorted({attack_name(validation, randomized=randomized) for randomized in (False, True)})
    return [
        "train/loss",
        "validation/clean_accuracy",
        "validation/robust_accuracy",
        *(f"validation/robust_accuracy/{attack}" for attack in attacks),
        "time/epoch_seconds",
        "time/examples_per_second",
    ]


def check_space(config: SweepConfig) -> None:
    """Check that each dimension names a real field and that both of its ends, and every choice, validate.

    Raises:
        UserError: with the dimension, the end and what is allowed.
    """
    assert config.space is not None
    base = config.experiment({})
    order = ordered(config.space)
    # Where each dimension's own ends are tried, the others stand at values that are valid together with them.
    for name in order:
        for end in config.space[name].ends():
            values = _companions(config, order, name, end)
            try:
                config.experiment(values)
            except UserError as error:
                raise UserError(f"sweep {config.name}: dimension {name} at {end!r}: {error}") from None
    fields = set(base.flatten())
    for name in config.space:
        if name not in fields and not any(field.startswith(f"{name}.") for field in fields):
            close = nearest(name, fields)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise UserError(f"sweep {config.name}: {name!r} is not a field of the experiment.{hint}")


def _companions(config: SweepConfig, order: list[str], name: str, end: Any) -> dict[str, Any]:
    """Return a full assignment with `name` at `end`: conditions satisfied, bounds respected, other numbers at an end."""
    assert config.space is not None
    wanted: dict[str, Any] = {name: end}
    for condition, allowed in config.space[name].when.items():
        wanted[condition] = allowed[0]
    values: dict[str, Any] = {}
    for other in order:
        dimension = config.space[other]
        if not is_active(dimension, values):
            continue
        if other in wanted:
            values[other] = wanted[other]
        elif dimension.above is not None:
            values[other] = dimension.ends()[-1]
        else:
            values[other] = dimension.ends()[0]
    bound = config.space[name].above
    if bound is not None and bound in values and isinstance(end, int | float) and values[bound] > end:
        values[bound] = end
    return values


def _explain(item: Any, source: str) -> str:
    where = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        close = nearest(str(item["loc"][-1]), [*SweepConfig.model_fields, *Dimension.model_fields])
        hint = f" Did you mean {close[0]!r}?" if close else ""
        return f"{source}: unknown field {where!r}.{hint}"
    return f"{source}: {where}: {item['msg'].removeprefix('Value error, ')}"
