"""The experiment config: one frozen record from YAML to worker, tracker, export and table.

Sections and their owners: `defence` (models.defences.*), `data` (trainers.data.config), `threat_model` (models.threat_model), `training`
(trainers.config, objectives in trainers.objectives.*), `resources`, `checkpoints` and `tracking` (here). The scientific sections make the
fingerprint; these three and `name` do not.
"""

from __future__ import annotations

import hashlib
import json
import posixpath
import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PlainSerializer, SerializeAsAny, ValidationError, field_validator, model_validator

from models.backbones import canonical_backbone_name, check_backbone_options
from models.configuration import Config
from models.errors import UserError, unknown_name
from models.registry import defence_model, parse_defence_parameters
from models.threat_model import LARGEST_RADIUS, ThreatModel
from orchestration.catalogue import catalogue
from orchestration.home import checked_name
from trainers.config import TrainingConfig
from trainers.data import DATASETS, DataConfig
from trainers.data.split import derived_validation_size
from trainers.objective import ObjectiveConfig


class DefenceSection(Config):
    """A defence by name, with its parameters."""

    name: str = Field(description="Name of the defence; the recipe chooses it.")
    parameters: SerializeAsAny[Config] = Field(description="Its parameters.")


def _parse_defence(value: Any) -> Any:
    """Build a section from `{"name": ..., parameters}`; `preset` stands for a named set of parameters, which explicit ones override."""
    if isinstance(value, str):
        value = {"name": value}
    if isinstance(value, dict) and not isinstance(value.get("name", ""), str):
        raise ValueError(f"the name of a defence is text, not {value['name']!r:.100}")
    if isinstance(value, dict) and "name" in value and "parameters" not in value:
        parameters = {key: item for key, item in value.items() if key not in ("name", "preset")}
        entry = defence_model(value["name"])
        if "preset" in value:
            if not isinstance(value["preset"], str) or value["preset"] not in entry.presets:
                raise unknown_name(f"preset of {entry.name}", str(value["preset"])[:100], entry.presets)
            parameters = dict(entry.presets[value["preset"]]) | parameters
        return DefenceSection(name=entry.name, parameters=parse_defence_parameters(entry.name, parameters))
    return value


def _flatten_defence(section: DefenceSection) -> dict[str, Any]:
    return {"name": section.name} | section.parameters.model_dump(mode="json")


DefenceField = Annotated[
    DefenceSection,
    BeforeValidator(_parse_defence),
    PlainSerializer(_flatten_defence, return_type=dict[str, Any]),
]


class BackboneSection(Config):
    """The network under the defence."""

    name: str = Field(description="Name of the backbone, e.g. `resnet18`, or `timm:NAME`.")
    options: dict[str, Any] = Field(default_factory=dict, description="Options of the backbone, e.g. `stem: imagenet`.")

    @model_validator(mode="after")
    def _has_these_options(self) -> BackboneSection:
        check_backbone_options(self.name, self.options)
        return self


def _parse_backbone(value: Any) -> Any:
    if isinstance(value, str):
        value = {"name": value}
    if isinstance(value, dict) and isinstance(value.get("name"), str):
        return value | {"name": canonical_backbone_name(value["name"])}
    return value


MOST_WORKERS = 4096
RESERVED_TAGS = ("mlflow.", "rayndom.", "environment.")
"""How tags begin that MLflow and this tool write themselves."""
_TAG = re.compile(r"[\w.\- /:]{1,250}")


WorkerCount = Annotated[int, Field(ge=1, le=MOST_WORKERS)]


class ResourcesConfig(Config):
    """What a run may use. Not part of the fingerprint."""

    workers: WorkerCount | tuple[WorkerCount, WorkerCount] = Field(
        1,
        description="Processes that share the training of one model (data parallel); [1, 4]: as many of one to four as the cluster "
        "has room for, fewer after a loss and more when there is room again.",
    )
    cpus_per_worker: float | None = Field(
        None, ge=0.01, le=MOST_WORKERS, description="CPU cores (threads) of each worker; none: all cores for a single run, one in a sweep."
    )
    gpus_per_worker: float = Field(
        0,
        ge=0,
        le=MOST_WORKERS,
        description="GPUs of each worker, of the maker that PyTorch finds here (NVIDIA, AMD, Intel, Apple); a fraction shares a GPU "
        "between small trials.",
    )
    validate_beside: bool = Field(
        False,
        description="In a sweep, validate an epoch on another worker of the cluster while the next one trains, where one is free: the same "
        "results in less time. For trainings with one worker whose next epoch does not depend on the validation; one that is killed, or "
        "whose machine goes, may lose an epoch more.",
    )

    @field_validator("workers", mode="before")
    @classmethod
    def _workers_are_one_number_or_two(cls, workers: Any) -> Any:
        # Said here, in one sentence: the two kinds of a union would each complain.
        parts = list(workers) if isinstance(workers, list | tuple) else [workers]
        numbers = [part for part in parts if isinstance(part, int | float) and not isinstance(part, bool)]
        if (
            len(numbers) != len(parts)
            or len(parts) not in (1, 2)
            or not all(1 <= each <= MOST_WORKERS and each % 1 == 0 for each in numbers)
        ):
            raise ValueError(f"should be a whole number from 1 to {MOST_WORKERS}, or the fewest and the most workers, as [1, 4]")
        return workers if len(parts) == 2 else parts[0]

    @field_validator("workers")
    @classmethod
    def _fewest_come_first(cls, workers: int | tuple[int, int]) -> int | tuple[int, int]:
        if isinstance(workers, tuple) and workers[0] > workers[1]:
            raise ValueError(f"{list(workers)} should name the fewest workers first")
        return workers[0] if isinstance(workers, tuple) and workers[0] == workers[1] else workers

    @property
    def is_elastic(self) -> bool:
        """Whether the number of workers may change."""
        return isinstance(self.workers, tuple)

    @property
    def fewest_workers(self) -> int:
        """Workers without which it does not train."""
        return self.workers[0] if isinstance(self.workers, tuple) else self.workers

    @property
    def most_workers(self) -> int:
        """Workers with which it trains where there is room."""
        return self.workers[1] if isinstance(self.workers, tuple) else self.workers

    @field_validator("gpus_per_worker")
    @classmethod
    def _gpus_can_be_given(cls, gpus: float) -> float:
        if 0 < gpus < 0.01 or (gpus > 1 and gpus != int(gpus)):
            raise ValueError(f"{gpus:g} GPUs cannot be given to a worker: none, a share of one of at least 0.01, or a whole number")
        return gpus

    def with_own_cores(self) -> ResourcesConfig:
        """Return what a worker that Ray starts has: one core unless the recipe says more."""
        return self.model_copy(update={"cpus_per_worker": self.cpus_per_worker or 1.0})


class TrackingConfig(Config):
    """Where a run is recorded. Not part of the fingerprint."""

    experiment: str = Field("rayndom", min_length=1, max_length=200, description="Name of the MLflow experiment.")
    tags: dict[str, str] = Field(default_factory=dict, description="Tags of the MLflow run.")
    system_metrics: bool = Field(
        False, description="Log how busy the machine of the command is: processor, memory, disk, network, GPU (of a sweep, to its own run)."
    )

    @field_validator("experiment")
    @classmethod
    def _experiment_is_a_name(cls, name: str) -> str:
        if name != name.strip() or not name.isprintable():
            raise ValueError(f"{name!r} is no name of an experiment: it begins and ends with a visible character and is one line")
        return name

    @field_validator("tags")
    @classmethod
    def _tags_are_the_users(cls, tags: dict[str, str]) -> dict[str, str]:
        for key in tags:
            if key.startswith(RESERVED_TAGS):
                raise ValueError(f"tag {key!r}: tags that begin with {', '.join(RESERVED_TAGS)} are written by MLflow or by this tool")
            # MLflow's own rule: what stands in a path, and is one.
            if not _TAG.fullmatch(key) or posixpath.normpath(key) != key or key.startswith(("/", "..")) or key == ".":
                raise ValueError(f"tag {key!r:.100}: a tag's name has 1 to 250 letters, digits, and . - _ : / or spaces")
        return tags


class CheckpointsConfig(Config):
    """Which weights stay beside the selected ones. Not part of the fingerprint."""

    every: int | None = Field(
        None,
        ge=1,
        le=100_000,
        description="Keep the weights after every so many epochs too, each as a model in the run's folder; none: those of the selected "
        "epoch alone. `rayndom clean --keep-every` says later which of them stay.",
    )


OPERATIONAL_SECTIONS = ("name", "description", "resources", "checkpoints", "tracking")


class ExperimentConfig(Config):
    """Everything that defines one training run."""

    name: str = Field("", description="Name of the recipe this came from.")
    description: str = Field("", description="One line on what the recipe is for.")
    defence: DefenceField = Field(description="The defence and its parameters.")
    backbone: Annotated[BackboneSection, BeforeValidator(_parse_backbone)] = Field(description="The network under it.")
    data: DataConfig = Field(description="The data set.")
    threat_model: ThreatModel = Field(default_factory=ThreatModel, description="What the attacker may do.")
    training: TrainingConfig = Field(default_factory=TrainingConfig, description="How the model is trained.")
    seed: int = Field(0, ge=0, lt=2**63, description="Root seed of initial weights, data order, augmentation, attacks and draws.")
    resources: ResourcesConfig = Field(default_factory=ResourcesConfig, description="What the run may use.")
    checkpoints: CheckpointsConfig = Field(default_factory=CheckpointsConfig, description="Which weights stay.")
    tracking: TrackingConfig = Field(default_factory=TrackingConfig, description="Where it is recorded.")

    @field_validator("name")
    @classmethod
    def _name_is_one_of_a_file(cls, name: str) -> str:
        return checked_name(name)

    @model_validator(mode="after")
    def _sections_fit(self) -> ExperimentConfig:
        step, radius = self.training.attack.step_size, self.threat_model.epsilon
        if self.training.attack.steps > 1 and radius > 0 and step > 2 * radius:
            raise ValueError(
                f"training.attack.step_size {step:g} is more than twice threat_model.epsilon {radius:g}: each step would cross the ball"
            )
        largest = LARGEST_RADIUS[self.threat_model.norm]
        if step > largest:
            raise ValueError(f"training.attack.step_size {step:g}: pixels are in [0,1]; did you mean {step:g}/255? At most {largest:g}.")
        self._fits_the_data()
        if self.training.batch_size % self.resources.fewest_workers:
            raise ValueError(
                f"training.batch_size {self.training.batch_size} cannot be divided among resources.workers {self.resources.fewest_workers}"
            )
        if self.training.batch_size % (self.resources.fewest_workers * self.training.accumulation):
            raise ValueError(
                f"training.batch_size {self.training.batch_size} cannot be divided into training.accumulation {self.training.accumulation} "
                f"parts for each of resources.workers {self.resources.fewest_workers}"
            )
        return self

    def _fits_the_data(self) -> None:
        """Raise a ValueError where what is known of the data set makes the experiment impossible, or one of its numbers meaningless."""
        if self.data.validation_size == 0 and self.training.validation.select_on == "validation":
            raise ValueError(
                "data.validation_size 0 leaves no images for training.validation.select_on: validation; hold some out, or select on test"
            )
        if self.data.mixing != "none" and not self.training.objective.takes_soft_labels:
            raise ValueError(f"data.mixing {self.data.mixing}: objective {self.training.objective.name} takes no labels of two classes")
        info = DATASETS[self.data.name]
        if info.num_train is not None:
            images = info.num_train - derived_validation_size(info.num_train, self.data.validation_size)
            images = min(images, self.data.limit_train or images)
            if self.training.batch_size > images:
                raise ValueError(f"training.batch_size {self.training.batch_size} is larger than the training set ({images} images)")
        if info.num_classes is not None:
            problem = self.training.objective.problem_with(self.defence.parameters, info.num_classes)
            if problem is not None:
                raise ValueError(problem)

    def scientific(self) -> dict[str, Any]:
        """Return the sections that define the result, as JSON types, without values that are defaults.

        The objective has its name unless it is the defence's own; sections whose meaning has changed have the number of their revision.
        """
        full = self.model_dump(mode="json", exclude_defaults=True)
        full["defence"] = {"name": self.defence.name} | self.defence.parameters.model_dump(mode="json", exclude_defaults=True)
        training = full.setdefault("training", {})
        training.pop("compile", None)  # rounding, as another processor's: fields of `training` are where users look for it
        if self.training.objective.name != _own_objective(self.defence.name):
            training.setdefault("objective", {})["name"] = self.training.objective.name
        _mark_revisions(full["defence"], self.defence.parameters)
        _mark_revisions(training, self.training)
        if not training:
            del full["training"]
        return {key: value for key, value in full.items() if key not in OPERATIONAL_SECTIONS}

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that are equal exactly when the scientific sections are."""
        text = json.dumps(self.scientific(), sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def flatten(self) -> dict[str, Any]:
        """Return dotted names and values of all fields, e.g. `training.attack.steps: 10`."""
        return flatten(self.model_dump(mode="json"))


def read_experiment(content: Any, source: str) -> ExperimentConfig:
    """Return the experiment that a file of this tool's own holds; `source` names it in errors.

    Raises:
        UserError: it does not fit: damaged, of another version, or of a defence that this installation does not have.
    """
    if not isinstance(content, Mapping):
        raise UserError(f"{source} is damaged: the experiment should be an object of sections")
    try:
        return ExperimentConfig.model_validate(dict(content))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "experiment"
        message = first["msg"].removeprefix("Value error, ")[:300]
        raise UserError(f"{source} cannot be read: {where}: {message}. It is damaged, or of another version.") from None


def _own_objective(defence: str) -> str | None:
    known = catalogue().get(defence)
    return None if known is None else known.objective


def _mark_revisions(dump: dict[str, Any], config: Config) -> None:
    """Add the revision of `config` and of the configs inside it, where it is not 0, to their dump without defaults."""
    if config.revision:
        dump["revision"] = config.revision
    for name in type(config).model_fields:
        value = getattr(config, name)
        if isinstance(value, Config):
            known = name in dump
            inner = dump.setdefault(name, {})
            _mark_revisions(inner, value)
            if not (inner or known):
                del dump[name]


def flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a nested dictionary with dotted keys; empty dictionaries disappear."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


__all__ = [
    "DATASETS",
    "OPERATIONAL_SECTIONS",
    "BackboneSection",
    "DefenceSection",
    "ExperimentConfig",
    "ObjectiveConfig",
    "ResourcesConfig",
    "TrackingConfig",
    "flatten",
]
