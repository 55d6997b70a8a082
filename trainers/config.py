"""Settings of training: each section stands in the file that obeys it, here they are put together. All belong to the fingerprint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, SerializeAsAny, field_validator, model_validator

from models.configuration import Config
from models.file_content import absolute
from models.initial_weights import SCHEMES, is_path
from trainers.averaging import AveragingConfig
from trainers.compilation import Compile
from trainers.objective import ObjectiveConfig, ObjectiveField, objectives
from trainers.optimizer import OptimizerConfig
from trainers.schedule import ScheduleConfig
from trainers.step import InnerAttackConfig, Redraw
from trainers.trades_terms import TradesFamilyConfig
from trainers.validation import ValidationConfig
from trainers.weight_perturbation import PerturbableConfig


class TrainingConfig(Config):
    """How a model is trained."""

    objective: SerializeAsAny[ObjectiveField] = Field(
        default_factory=lambda: ObjectiveConfig(name="adversarial"), description="The loss; `name` chooses it."
    )
    attack: InnerAttackConfig = Field(default_factory=InnerAttackConfig, description="The inner attack.")
    redraw: Redraw = Field(
        "attack_then_step",
        description="When a randomized model redraws: `attack_then_step` (one draw is attacked, another is trained: the papers' black-box "
        "training), `each_attack_step` (the attack sees a new draw at each step, the training step another), `each_batch` (attack and step "
        "share a draw: white-box training), `each_epoch`.",
    )
    initial_weights: str | None = Field(
        None,
        min_length=1,
        description="Begin with these weights: an exported folder, a run, `models:/NAME@ALIAS`, a file (`.safetensors`, or a state dict, "
        "read without executing code), or `timm:NAME` where its weights are on this machine; none: fresh ones.",
    )
    reinitialize: tuple[str, ...] = Field(
        (),
        description="Parts of the network that begin fresh all the same, e.g. `[classifier]` for other classes: layers or tensors.",
    )
    freeze: tuple[str, ...] = Field(
        (),
        description="Parts of the network whose parameters stay as they begin, e.g. `[transformer]` to train what is before and behind it: "
        "layers or tensors. Batch statistics in them are taken as elsewhere.",
    )
    epochs: int = Field(200, ge=1, le=100_000, description="Passes over the training images.")
    batch_size: int = Field(128, ge=1, description="Images per step over all workers together.")
    accumulation: int = Field(
        1,
        ge=1,
        le=100_000,
        description="Parts in which a worker computes its images of a step, one after the other, for less memory: gradients are those of "
        "the whole `batch_size`, batch statistics those of each part.",
    )
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig, description="The optimizer.")
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig, description="The learning-rate schedule.")
    averaging: AveragingConfig = Field(default_factory=AveragingConfig, description="An average of the weights.")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto",
        description="Arithmetic of training: `bf16` autocast, `fp32`, or `auto`: bf16 on hardware with fast bf16 matrix units. Validation "
        "and evaluation always use fp32.",
    )
    compile: Compile = Field(
        "auto",
        description="Steps as compiled code (`torch.compile`): `on`, `off`, or `auto`: where they were seen to pay, so far nowhere. Not "
        "part of a run's identity: it changes rounding, as another processor does. Objectives that differentiate twice stay eager.",
    )
    batch_norm: Literal["local", "synchronized"] = Field(
        "local",
        description="With several workers: batch statistics of each worker's part (`local`), or of the global batch (`synchronized`: every "
        "batch normalization, those of RNA and BGN too, on CPUs and GPUs; several workers then train what one does).",
    )
    validation: ValidationConfig = Field(default_factory=ValidationConfig, description="Held-out measurements.")

    @model_validator(mode="before")
    @classmethod
    def _select_as_the_objective_asks(cls, value: Any) -> Any:
        """Where nobody says which checkpoint is kept, the objective does."""
        if not isinstance(value, Mapping):
            return value
        objective, validation = value.get("objective"), value.get("validation", {})
        name = objective.get("name") if isinstance(objective, Mapping) else getattr(objective, "name", objective)
        entry = objectives().get(name) if isinstance(name, str) else None
        if entry is None:
            return value
        if isinstance(validation, Mapping) and "select" not in validation:
            return {**value, "validation": {**validation, "select": entry.selection}}
        if isinstance(validation, ValidationConfig) and "select" not in validation.model_fields_set:
            return {**value, "validation": validation.model_copy(update={"select": entry.selection})}
        return value

    @field_validator("initial_weights")
    @classmethod
    def _files_are_absolute(cls, name: str | None) -> str | None:
        """A path means the same file in every process, wherever it was started."""
        if name is None or name.startswith(SCHEMES) or not is_path(name):
            return name
        return str(absolute(name))

    @model_validator(mode="after")
    def _begins_fresh_where_weights_are_given(self) -> TrainingConfig:
        if self.reinitialize and self.initial_weights is None:
            raise ValueError("reinitialize says what begins fresh beside initial_weights, and there are none")
        return self

    @model_validator(mode="after")
    def _parts_and_warmup_fit(self) -> TrainingConfig:
        if self.batch_size % self.accumulation:
            raise ValueError(f"batch_size {self.batch_size} cannot be divided into accumulation {self.accumulation} parts")
        if self.accumulation > 1 and self.objective.needs_whole_batch:
            raise ValueError(
                f"accumulation {self.accumulation}: a step of objective {self.objective.name} as configured looks at the whole batch"
            )
        if self.attack.warm_start is not None and not isinstance(self.objective, PerturbableConfig):
            raise ValueError(f"attack.warm_start: objective {self.objective.name} does not attack each image once in a step")
        if self.averaging.label_weight and not self.objective.takes_soft_labels:
            raise ValueError(f"averaging.label_weight: objective {self.objective.name} takes no labels that are probabilities")
        if self.schedule.warmup_epochs >= self.epochs:
            raise ValueError(f"schedule.warmup_epochs {self.schedule.warmup_epochs:g} leaves nothing of {self.epochs} epochs")
        return self

    @property
    def single_step(self) -> bool:
        """Whether images are perturbed by one step: then catastrophic overfitting is looked for."""
        return self.objective.takes_single_step or self.attack.steps == 1

    @property
    def revision(self) -> int:
        """1: TRADES' attack compared logits of different draws where each attack step had its own; 2: `synchronized` left the statistics
        of RNA and BGN to each worker; 3: both."""
        mixed_draws = self.redraw == "each_attack_step" and isinstance(self.objective, TradesFamilyConfig)
        return int(mixed_draws) + 2 * int(self.batch_norm == "synchronized")
