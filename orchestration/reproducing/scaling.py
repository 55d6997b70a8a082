"""A row's experiment at a reduced scale: the same defence on a shorter schedule, at `smoke` on a small stand-in for network and data."""

from __future__ import annotations

import functools
import math
from typing import Any, TypeVar

from analysis.reproduction.papers.model import Run
from analysis.reproduction.scale import EPOCHS, SMOKE_EPSILON, Scale
from models.backbones import build_backbone
from models.backbones.base import Backbone
from models.configuration import Config
from models.registry import defence_model
from orchestration.experiment import DefenceSection, ExperimentConfig
from trainers.schedule import ScheduleConfig

SMOKE_BACKBONE, SMOKE_SIDE = "resnet8", 16
"""The small network, and the side of its images."""

_Section = TypeVar("_Section", bound=Config)

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
    schedule = training.schedule.changed(name="one_cycle", milestones=_MILESTONES)
    experiment = experiment.changed(training=training.changed(epochs=epochs, schedule=schedule))
    for field, value in run.in_epochs.items():
        experiment = _with(experiment, field.split("."), math.ceil(value * epochs / run.epochs))
    return experiment if scale == "short" else _small(experiment)


def _small(experiment: ExperimentConfig) -> ExperimentConfig:
    epsilon, step_size = _SMOKE_BALLS[experiment.threat_model.norm]
    training = experiment.training
    return experiment.changed(
        defence=_fitted(experiment.defence),
        backbone=experiment.backbone.changed(name=SMOKE_BACKBONE),
        data=experiment.data.changed(name="digits", image_size=SMOKE_SIDE, limit_train=640, augmentation="none"),
        threat_model=experiment.threat_model.changed(epsilon=epsilon),
        training=training.changed(
            batch_size=32,
            attack=training.attack.changed(steps=3, step_size=step_size),
            validation=training.validation.changed(num_examples=64, steps=3, num_draws=2),
        ),
        resources=experiment.resources.changed(gpus_per_worker=0, workers=1),
    )


@functools.cache
def _small_backbone() -> Backbone:
    return build_backbone(SMOKE_BACKBONE, num_classes=10, image_shape=(1, SMOKE_SIDE, SMOKE_SIDE))


def _fitted(section: DefenceSection) -> DefenceSection:
    """Return a defence with parameters that the small network can have."""
    fit = defence_model(section.name).fit
    return section if fit is None else section.changed(parameters=fit(section.parameters, _small_backbone()))


def _with(section: _Section, path: list[str], value: Any) -> _Section:
    field, *inner = path
    return section.changed(**{field: _with(getattr(section, field), inner, value) if inner else value})
