"""The learning-rate schedule: its settings, and the rate as a function of progress and, for a plateau, of what was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from pydantic import Field, model_validator

from models.configuration import Config

WATCHED = ("validation/latest/robust_accuracy", "validation/robust_accuracy")
"""What a plateau is seen in, the first that an epoch has: robust accuracy of the weights themselves, not of their average."""


class ScheduleConfig(Config):
    """The learning-rate schedule; the rate is set at the beginning of each step, in fractions of an epoch."""

    name: Literal["multistep", "cosine", "one_cycle", "constant", "plateau"] = Field(
        "multistep",
        description="`multistep` (papers on CIFAR), `cosine` (ImageNet), `one_cycle` (short budgets), `constant`, `plateau` (multiplied by "
        "`factor` where the robust accuracy of validation no longer rises).",
    )
    milestones: tuple[Annotated[float, Field(gt=0, le=100_000)], ...] = Field(
        (100, 150), description="Epochs at whose end the rate is multiplied by `factor`."
    )
    factor: float = Field(0.1, gt=0, lt=1, description="Factor at each milestone, or at each plateau.")
    warmup_fraction: float = Field(0.3, gt=0, lt=1, description="one_cycle: share of training until the peak.")
    warmup_epochs: float = Field(
        0, ge=0, le=100_000, description="Epochs in which the rate rises evenly from 0; a cosine begins behind them. Not for one_cycle."
    )
    plateau_patience: int = Field(
        5, ge=0, le=100_000, description="plateau: so many validations without a better robust accuracy are waited for."
    )

    @model_validator(mode="after")
    def _milestones_rise(self) -> ScheduleConfig:
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError(f"milestones {self.milestones} must rise")
        if self.name == "one_cycle" and self.warmup_epochs:
            raise ValueError("warmup_epochs: one_cycle rises over warmup_fraction of the training; leave one out")
        return self


def learning_rate_factor(schedule: ScheduleConfig, epoch: float, num_epochs: int, reductions: int = 0) -> float:
    """Return the factor on the peak learning rate.

    Args:
        schedule: which schedule.
        epoch: progress in epochs, fractions of an epoch included, in [0, num_epochs].
        num_epochs: length of the run.
        reductions: plateaus so far, for `plateau`.

    `multistep` changes at whole epochs: after milestone m the factor is reduced from epoch m on (0-based).
    Deviation: the official codes of CTRW, RNA and DCS step their scheduler at the start of an epoch, one epoch earlier.
    """
    if epoch < schedule.warmup_epochs:
        return epoch / schedule.warmup_epochs
    progress = min(max(epoch / num_epochs, 0.0), 1.0)
    if schedule.name == "constant":
        return 1.0
    if schedule.name == "plateau":
        return schedule.factor**reductions
    if schedule.name == "multistep":
        return schedule.factor ** sum(epoch >= milestone for milestone in schedule.milestones)
    if schedule.name == "cosine":
        behind = min((epoch - schedule.warmup_epochs) / (num_epochs - schedule.warmup_epochs), 1.0)
        return 0.5 * (1 + math.cos(math.pi * behind))
    if progress < schedule.warmup_fraction:
        return progress / schedule.warmup_fraction
    return (1 - progress) / (1 - schedule.warmup_fraction)


def watched_accuracy(metrics: Mapping[str, float]) -> float | None:
    """Return an epoch's robust accuracy of the weights themselves; None without a validation."""
    return next((metrics[name] for name in WATCHED if name in metrics), None)


def plateau_reductions(schedule: ScheduleConfig, history: Sequence[Mapping[str, float]]) -> int:
    """Return how many plateaus there were: as PyTorch's ReduceLROnPlateau counts them, with every improvement counting.

    Args:
        history: metrics of each finished epoch; those without a validation are passed over.
    """
    if schedule.name != "plateau":
        return 0
    best, waited, reductions = -math.inf, 0, 0
    for metrics in history:
        value = watched_accuracy(metrics)
        if value is None:
            continue
        best, waited = (value, 0) if value > best else (best, waited + 1)
        if waited > schedule.plateau_patience:
            reductions, waited = reductions + 1, 0
    return reductions
