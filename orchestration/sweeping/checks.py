"""What a sweep may ask for, beyond the types of its fields: checked before anything starts, each mistake with what is allowed."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import Any

from models.errors import UserError, nearest, unknown_name
from models.registry import build_model
from orchestration.experiment import OPERATIONAL_SECTIONS, ExperimentConfig
from orchestration.search_space import RECIPE, Dimension, is_active, ordered, split
from orchestration.sweeping.config import SweepConfig
from orchestration.sweeping.goal_metrics import RATES, epoch_metrics, final_metrics, is_accuracy
from orchestration.sweeping.grid import grid_points
from orchestration.sweeping.samplers import check_sampler
from trainers.data import DATASETS

NO_DIMENSIONS = {
    "seed": "the best of several seeds is luck; `repeats` trains the best trials with further seeds",
    "data.split_seed": "the best of several splits is luck",
    "defence": "a sweep over several defences names their `recipes`",
    "defence.name": "a sweep over several defences names their `recipes`",
}
MOST_TRIED_VALUES = 40
"""Whole numbers and steps between two ends that are tried one by one; of more only the ends are."""


def check_goals(config: SweepConfig) -> None:
    """Check what is improved, required and watched: the metrics exist, and better is better.

    Raises:
        UserError: with the metric and what is allowed.
    """
    where = f"sweep {config.name}"
    _refuse_twice(f"{where}: objectives: the metric", (objective.metric for objective in config.objectives))
    _refuse_twice(f"{where}: baselines: the recipe", config.baselines)
    if config.repeats is not None:
        _refuse_twice(f"{where}: repeats.seeds:", config.repeats.seeds)
    for experiment in config.base_experiments():
        known = [*epoch_metrics(experiment), *final_metrics(experiment, config.measure.suite)]
        for metric in config.final_metrics:
            if metric not in known:
                raise UserError(f"{where}: {unknown_name('metric', metric, known)}")
        if config.repeats is not None and experiment.seed in config.repeats.seeds:
            raise UserError(f"{where}: repeats.seeds: {experiment.seed} is the seed of the search itself; name further ones")
        if config.needs_protocols and experiment.data.validation_size == 0:
            raise UserError(f"{where}: protocols are measured on validation images, and data.validation_size 0 leaves none")
        _check_attack_names(config, experiment)
    for objective in config.objectives:
        wanted = "max" if objective.metric in RATES or is_accuracy(objective.metric) else "min"
        if objective.mode != wanted:
            raise UserError(
                f"{where}: objectives: {objective.metric} with mode {objective.mode} is improved the wrong way; write mode: {wanted}"
            )
    for constraint in config.constraints:
        bound = constraint.at_least if constraint.at_most is None else constraint.at_most
        assert bound is not None
        if is_accuracy(constraint.metric) and not 0 <= bound <= 1:
            raise UserError(f"{where}: constraints: {constraint.key}: accuracies are shares in [0,1]; did you mean {bound / 100:g}?")
    if config.stopping is not None:
        watched = [metric for metric in epoch_metrics(config.base_experiments()[0]) if is_accuracy(metric)]
        if config.stopping.scheduler == "pareto":
            _check_pareto(config)
        elif config.stopping.metric not in watched:
            raise UserError(f"{where}: {unknown_name('metric that stopping can watch: it is maximized,', config.stopping.metric, watched)}")
    if config.prior is not None:
        unused = [name for name in config.prior if name not in {base.defence.name for base in config.base_experiments()}]
        if unused:
            raise UserError(f"{where}: prior.{unused[0]}: no recipe of this sweep is of the defence {unused[0]!r}")


def _check_pareto(config: SweepConfig) -> None:
    """Refuse early stopping by domination where there is one objective, or one that epochs do not report."""
    where = f"sweep {config.name}: stopping.scheduler pareto"
    if len(config.objectives) == 1:
        raise UserError(f"{where} is for several objectives, and there is one; take asha, hyperband or median")
    reported = epoch_metrics(config.base_experiments()[0])
    for objective in config.objectives:
        if objective.metric not in reported:
            raise UserError(f"{where} compares after epochs, which do not report {objective.metric}; take asha, hyperband or median")


def check_space(config: SweepConfig) -> None:
    """Check that each dimension names a scientific field that nothing else sets, and that both of its ends, and every choice, validate.

    Raises:
        UserError: with the dimension, the end and what is allowed.
    """
    assert config.space is not None
    where = f"sweep {config.name}"
    bases = dict(zip(config.all_recipes, config.base_experiments(), strict=True))
    fields = {recipe: set(base.flatten()) for recipe, base in bases.items()}
    for name, dimension in config.space.items():
        recipe, field = split(name) if config.recipes else (None, name)
        if config.recipes and name == RECIPE:
            continue
        _check_field(config, name, field)
        for known in [fields[recipe]] if recipe else fields.values():
            if field not in known and not any(other.startswith(f"{field}.") for other in known):
                close = nearest(field, known)
                hint = f" Did you mean {close[0]!r}?" if close else ""
                raise UserError(f"{where}: {name!r} is not a field of the experiment.{hint}")
        if dimension.above is not None:
            _check_above(config, name, dimension)
    _refuse_twice(f"{where}: points: the point", (repr(sorted(point.items(), key=str)) for point in config.points))
    for point in config.points:
        _check_point(config, point)
    if config.sampler == "grid" and not config.points:
        grid_points(config.space)
    check_sampler(config)
    for title, values in (*extreme_points(config), *_points_between(config)):
        try:
            config.experiment(values)
        except UserError as error:
            raise UserError(f"{where}: {title}: {error}") from None


def extreme_points(config: SweepConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each dimension at its ends, or at each of its choices: what it is in words, and the values of a whole trial.

    The other dimensions stand at values that are valid together with it. A grid of given points has only those.
    """
    assert config.space is not None
    if config.sampler == "grid" and config.points:
        yield from ((f"point {point}", dict(point)) for point in config.points)
        return
    order = ordered(config.space)
    for name in order:
        for end in config.space[name].ends():
            yield f"dimension {name} at {end!r}", _companions(config, order, name, end)


def _points_between(config: SweepConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the values between the ends of whole numbers and steps, where there are few: an even kernel lies between odd ones."""
    assert config.space is not None
    if config.sampler == "grid" and config.points:
        return
    order = ordered(config.space)
    for name in order:
        dimension = config.space[name]
        if dimension.type != "choice" and dimension.num_values <= MOST_TRIED_VALUES:
            for value in dimension.values()[1:-1]:
                yield f"dimension {name} at {value!r}", _companions(config, order, name, value)


def _refuse_twice(what: str, names: Iterable[Hashable]) -> None:
    seen = set()
    for name in names:
        if name in seen:
            raise UserError(f"{what} {name} stands twice")
        seen.add(name)


def _check_attack_names(config: SweepConfig, experiment: ExperimentConfig) -> None:
    """Refuse the metric of the validation attack that this model never meets: averaged over draws for those without any, or the reverse."""
    from models.randomness import is_randomized
    from trainers.validation import attack_name

    validation = experiment.training.validation
    names = {randomized: f"validation/robust_accuracy/{attack_name(validation, randomized=randomized)}" for randomized in (False, True)}
    wanted = {*config.final_metrics, *([config.stopping.metric] if config.stopping is not None else [])}
    info = DATASETS[experiment.data.name]
    if names[False] == names[True] or not wanted & {*names.values()} or info.num_classes is None or info.image_shape is None:
        return
    section = experiment.defence
    model = build_model(
        section.name,
        backbone=experiment.backbone.name,
        num_classes=info.num_classes,
        image_shape=info.image_shape,
        backbone_options=experiment.backbone.options,
        **section.parameters.model_dump(),
    )
    never = names[not is_randomized(model)]
    if never in wanted:
        raise UserError(
            f"sweep {config.name}: {experiment.name} never reports {never}; its validation attack is {names[is_randomized(model)]}"
        )


def _check_field(config: SweepConfig, name: str, field: str) -> None:
    """Refuse a dimension that no search makes sense over, or that the sweep's settings set as well."""
    where = f"sweep {config.name}: dimension {name}"
    if field in NO_DIMENSIONS:
        raise UserError(f"{where}: {NO_DIMENSIONS[field]}")
    if field.split(".")[0] in OPERATIONAL_SECTIONS:
        raise UserError(f"{where} changes nothing that is trained: all its trials would be one experiment")
    for setting in config.settings:
        if setting == field or setting.startswith(f"{field}.") or field.startswith(f"{setting}."):
            value = config.settings[setting]
            # A section may be set around a dimension inside it, as long as it does not set this very field.
            if field.startswith(f"{setting}.") and isinstance(value, Mapping) and not _holds(value, field.removeprefix(f"{setting}.")):
                continue
            raise UserError(f"{where} is also set, in settings: {setting}; leave one out")


def _holds(section: Mapping[str, Any], dotted: str) -> bool:
    inner: Any = section
    for part in dotted.split("."):
        if not isinstance(inner, Mapping) or part not in inner:
            return False
        inner = inner[part]
    return True


def _check_above(config: SweepConfig, name: str, dimension: Dimension) -> None:
    assert config.space is not None and dimension.above is not None
    lower = config.space.get(dimension.above)
    if lower is None:
        return  # ordering the dimensions says so
    where = f"sweep {config.name}: dimension {name} above {dimension.above}"
    if dimension.type == "choice" or lower.type == "choice":
        raise UserError(f"{where}: both are numbers between `low` and `high`")
    if lower.bounds[0] > dimension.bounds[1]:
        raise UserError(f"{where}: it ends at {dimension.bounds[1]:g}, below every value of {dimension.above}")
    if lower.bounds[1] > dimension.bounds[1]:
        raise UserError(f"{where}: it ends at {dimension.bounds[1]:g}, and {dimension.above} may be {lower.bounds[1]:g}")


def _check_point(config: SweepConfig, point: dict[str, Any]) -> None:
    """Check that a point lies in the space and, where it is whole, that its experiment is valid."""
    assert config.space is not None
    if not point:
        raise UserError(f"sweep {config.name}: points: a point is empty")
    for name, value in point.items():
        if name not in config.space:
            raise unknown_name(f"dimension in `points` of sweep {config.name}:", name, config.space)
        if not config.space[name].takes(value):
            raise UserError(f"sweep {config.name}: point {point}: {name} does not take {value!r}")
    try:
        config.experiment(point)
    except UserError as error:
        if config.sampler == "grid":
            raise UserError(f"sweep {config.name}: point {point}: {error}") from None


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


__all__ = ["check_goals", "check_space", "extreme_points"]
