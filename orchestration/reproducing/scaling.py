"""A row's experiment at a reduced scale: the same defence on a shorter schedule, at `smoke` on a small stand-in for network and data."""

from __future__ import annotations

import math
from typing import Any, TypeVar

from analysis.reproduction.papers.model import Run
from analysis.reproduction.scale import EPOCHS, SMOKE_EPSILON, Scale
from models.configuration import Config
from models.errors import UserError
from models.layers.channel_statistics import parse_normalization
from orchestration.experiment import ExperimentConfig
from trainers.schedule import ScheduleConfig

_Section = TypeVar("_Section", bound=Config)

SMOKE_PLACES = {"position": 4, "positions": 7}
"""The last place for a random layer that the small network has, by the name of a defence's parameter."""

SMOKE_CHANNELS = (16, 32, 64)
"""Of the layers of the small network: normalizations over groups of more channels do not fit it."""

_MILESTONES = ScheduleConfig().milestones
"""The defaults, so that rows whose schedules differ at paper scale alone become one experiment."""

_SMOKE_BALLS: dict[str, tuple[float | str, float | str]] = {"linf": (SMOKE_EPSILON, SMOKE_EPSILON / 4), "l2": ("128/255", "32/255")}


def scaled(experiment: ExperimentConfig, run: Run, scale: Scale) -> ExperimentConfig:
    """Return the experiment of a run at a scale.

    Args:
        experiment: as the recipe and the row's changes have it. run: says which fields are counted in epochs.
    """
    if scale == "paper":
        return experiment
    epochs = min(EPOCHS[scale], run.epochs)
    training = experiment.training
    schedule = changed(training.schedule, name="one_cycle", milestones=_MILESTONES)
    experiment = changed(experiment, training=changed(training, epochs=epochs, schedule=schedule))
    for field, value in run.in_epochs.items():
        experiment = _with(experiment, field.split("."), math.ceil(value * epochs / run.epochs))
    return experiment if scale == "short" else _small(experiment)


def changed(section: _Section, **fields: Any) -> _Section:
    """Return a section with some fields changed; an unknown field or a value that is not allowed is pydantic's error, as in a file."""
    given = {name: getattr(section, name) for name in section.model_fields_set}
    return type(section)(**given | fields)


def _small(experiment: ExperimentConfig) -> ExperimentConfig:
    epsilon, step_size = _SMOKE_BALLS[experiment.threat_model.norm]
    training = experiment.training
    return changed(
        experiment,
        defence=changed(experiment.defence, parameters=_within_reach(experiment.defence.parameters)),
        backbone=changed(experiment.backbone, name="resnet8"),
        data=changed(experiment.data, name="digits", image_size=16, limit_train=640, augmentation="none"),
        threat_model=changed(experiment.threat_model, epsilon=epsilon),
        training=changed(
            training,
            batch_size=32,
            attack=changed(training.attack, steps=3, step_size=step_size),
            validation=changed(training.validation, num_examples=64, steps=3, num_draws=2),
        ),
        resources=changed(experiment.resources, gpus_per_worker=0, workers=1),
    )


def _within_reach(parameters: Config) -> Config:
    """Return a defence's parameters with its places moved to the last ones that the small network has, and its pool without misfits."""
    moved: dict[str, Any] = {}
    for name, last in SMOKE_PLACES.items():
        place = getattr(parameters, name, None)
        if isinstance(place, int):
            moved[name] = min(place, last)
        elif isinstance(place, tuple):
            moved[name] = tuple(min(each, last) for each in place)
    pool = getattr(parameters, "pool", None)
    if pool is not None:
        moved["pool"] = tuple(filter(_fits, pool))
    return changed(parameters, **moved) if moved else parameters


def _fits(normalization: str) -> bool:
    try:
        return all(parse_normalization(normalization).groups(channels) for channels in SMOKE_CHANNELS)
    except UserError:
        return False


def _with(section: _Section, path: list[str], value: Any) -> _Section:
    field, *inner = path
    return changed(section, **{field: _with(getattr(section, field), inner, value) if inner else value})
