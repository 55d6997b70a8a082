"""A row's experiment at a reduced scale: the same defence on a shorter schedule, at `smoke` and `small` with other networks and data."""

from __future__ import annotations

import functools
import math
from typing import Any, TypeVar

from analysis.reproduction.papers.model import Run
from analysis.reproduction.scale import EPOCHS, SMOKE_EPSILON, Scale
from models.backbones import build_backbone
from models.backbones.base import Backbone, ImageShape
from models.configuration import Config
from models.registry import defence_model
from orchestration.experiment import DefenceSection, ExperimentConfig
from orchestration.recipes import load_recipe
from orchestration.reproducing.cost import image_shape
from trainers.schedule import ScheduleConfig

SMALL_BACKBONE, SMOKE_SIDE = "resnet8", 16
"""The network of `smoke` and `small`, and the side of the images of `smoke`."""

SMALL_SETTINGS = {"fashion_mnist": "fashion_mnist_resnet8"}
"""What stands in for a data set at scale `small`."""
OTHER_SMALL_SETTING = "cifar10_jpeg_resnet8"

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
    return {"short": _same, "small": _on_real_pictures, "smoke": _on_digits}[scale](experiment)


def _same(experiment: ExperimentConfig) -> ExperimentConfig:
    return experiment


def _on_real_pictures(experiment: ExperimentConfig) -> ExperimentConfig:
    """Return an experiment on the setting that stands in for its own: its data, network, radius, batches, inner attack and validation."""
    setting = _setting(SMALL_SETTINGS.get(experiment.data.name, OTHER_SMALL_SETTING))
    training, small = experiment.training, setting.training
    attack = {name: getattr(small.attack, name) for name in ("steps", "step_size")}
    validation = {name: getattr(small.validation, name) for name in ("every", "num_examples", "steps", "num_draws")}
    same_norm = experiment.threat_model.norm == setting.threat_model.norm
    return experiment.changed(
        defence=_fitted(experiment.defence, image_shape(setting)),
        backbone=setting.backbone,
        data=setting.data,
        threat_model=setting.threat_model if same_norm else experiment.threat_model,
        training=training.changed(
            batch_size=small.batch_size,
            attack=training.attack.changed(**attack) if same_norm else training.attack,
            validation=training.validation.changed(**validation),
        ),
        resources=experiment.resources.changed(gpus_per_worker=0, workers=1),
    )


@functools.cache
def _setting(name: str) -> ExperimentConfig:
    """Return adversarial training on a setting."""
    return load_recipe(f"at_{name}").experiment


def _on_digits(experiment: ExperimentConfig) -> ExperimentConfig:
    epsilon, step_size = _SMOKE_BALLS[experiment.threat_model.norm]
    training = experiment.training
    return experiment.changed(
        defence=_fitted(experiment.defence, (1, SMOKE_SIDE, SMOKE_SIDE)),
        backbone=experiment.backbone.changed(name=SMALL_BACKBONE),
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
def _small_backbone(shape: ImageShape) -> Backbone:
    return build_backbone(SMALL_BACKBONE, num_classes=10, image_shape=shape)


def _fitted(section: DefenceSection, shape: ImageShape) -> DefenceSection:
    """Return a defence with parameters that the small network can have."""
    fit = defence_model(section.name).fit
    return section if fit is None else section.changed(parameters=fit(section.parameters, _small_backbone(shape)))


def _with(section: _Section, path: list[str], value: Any) -> _Section:
    field, *inner = path
    return section.changed(**{field: _with(getattr(section, field), inner, value) if inner else value})
