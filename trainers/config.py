"""Settings of training: inner attack, optimizer, schedule, precision, validation. Each field is part of the fingerprint."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, SerializeAsAny, model_validator

from models.batch_statistics import AttackMode
from models.configuration import Config
from models.threat_model import PixelFraction
from trainers.objective import ObjectiveConfig, ObjectiveField

Redraw = Literal["attack_then_step", "each_attack_step", "each_batch", "each_epoch"]


class InnerAttackConfig(Config):
    """The attack inside training (projected gradient descent)."""

    steps: int = Field(10, ge=0, le=1000, description="Number of gradient steps K; 0 trains on clean images.")
    step_size: PixelFraction = Field(2 / 255, gt=0, description="Step size in pixels of [0,1], e.g. 2/255.")
    random_start: bool = Field(True, description="Start uniformly in the ball instead of at the image.")
    mode: AttackMode = Field(
        "train_without_update",
        description="Mode of the model during the attack: `train` (what the official codes of CTRW, RNA and DCS do; moves running "
        "statistics at each attack step), `eval`, `train_without_update`.",
    )


class OptimizerConfig(Config):
    """The optimizer."""

    name: Literal["sgd", "adam"] = Field("sgd", description="`sgd` (all five papers) or `adam` (GAL, ADP, TRS).")
    learning_rate: float = Field(0.1, gt=0, description="Peak learning rate.")
    momentum: float = Field(0.9, ge=0, lt=1, description="Momentum of SGD.")
    nesterov: bool = Field(False, description="Nesterov momentum.")
    weight_decay: float = Field(5e-4, ge=0, description="L2 penalty coefficient on all parameters.")
    adam_epsilon: float = Field(1e-8, gt=0, description="Epsilon of Adam.")
    gradient_clip_norm: float | None = Field(None, gt=0, description="Clip the global gradient norm; none: no clipping.")
    gradients_when_unused: Literal["none", "zero"] = Field(
        "none",
        description="`zero` fills the gradients of unused parameters with zeros, so weight decay and momentum still move them (what the "
        "official RNA code does, being written for PyTorch 1.7); `none` leaves them alone.",
    )


class ScheduleConfig(Config):
    """The learning-rate schedule; the rate is set at the beginning of each step, in fractions of an epoch."""

    name: Literal["multistep", "cosine", "one_cycle", "constant"] = Field(
        "multistep",
        description="`multistep` (papers on CIFAR), `cosine` (ImageNet), `one_cycle` (short budgets), `constant`.",
    )
    milestones: tuple[float, ...] = Field((100, 150), description="Epochs at whose end the rate is multiplied by `factor`.")
    factor: float = Field(0.1, gt=0, lt=1, description="Factor at each milestone.")
    warmup_fraction: float = Field(0.3, gt=0, lt=1, description="one_cycle: share of training until the peak.")

    @model_validator(mode="after")
    def _milestones_rise(self) -> ScheduleConfig:
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError(f"milestones {self.milestones} must rise")
        return self


class ValidationConfig(Config):
    """What is measured on held-out images during training, and how a checkpoint is chosen by it."""

    every: int = Field(1, ge=1, description="Epochs between two validations; the last epoch always has one.")
    num_examples: int | None = Field(None, ge=1, description="Use this many validation images; none: all.")
    steps: int = Field(10, ge=1, description="Steps of the validation attack.")
    num_draws: int = Field(4, ge=1, description="Draws averaged per attack gradient (EOT) and at scoring, for randomized models.")
    select_on: Literal["validation", "test"] = Field(
        "validation",
        description="`test` reproduces the papers' selection of the best checkpoint on test images, and marks the result as such.",
    )
    select: Literal["best", "last"] = Field("best", description="Keep the best checkpoint by robust accuracy, or the last.")
    patience: int | None = Field(None, ge=1, description="Stop after this many validations without a better robust accuracy; none: never.")


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
    epochs: int = Field(200, ge=1, description="Passes over the training images.")
    batch_size: int = Field(128, ge=1, description="Images per step over all workers together.")
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig, description="The optimizer.")
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig, description="The learning-rate schedule.")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto",
        description="Arithmetic of training: `bf16` autocast, `fp32`, or `auto`: bf16 on hardware with fast bf16 matrix units. Validation "
        "and evaluation always use fp32.",
    )
    batch_norm: Literal["local", "synchronized"] = Field(
        "local", description="With several workers: batch statistics of each worker's part, or of the global batch."
    )
    validation: ValidationConfig = Field(default_factory=ValidationConfig, description="Held-out measurements.")
