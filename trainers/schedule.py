"""The learning-rate schedule: its settings, and the rate as a function of progress."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from models.configuration import Config


class ScheduleConfig(Config):
    """The learning-rate schedule; the rate is set at the beginning of each step, in fractions of an epoch."""

    name: Literal["multistep", "cosine", "one_cycle", "constant"] = Field(
        "multistep",
        description="`multistep` (papers on CIFAR), `cosine` (ImageNet), `one_cycle` (short budgets), `constant`.",
    )
    milestones: tuple[Annotated[float, Field(gt=0, le=100_000)], ...] = Field(
        (100, 150), description="Epochs at whose end the rate is multiplied by `factor`."
    )
    factor: float = Field(0.1, gt=0, lt=1, description="Factor at each milestone.")
    warmup_fraction: float = Field(0.3, gt=0, lt=1, description="one_cycle: share of training until the peak.")

    @model_validator(mode="after")
    def _milestones_rise(self) -> ScheduleConfig:
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError(f"milestones {self.milestones} must rise")
        return self


def learning_rate_factor(schedule: ScheduleConfig, epoch: float, num_epochs: int) -> float:
    """Return the factor on the peak learning rate.

    Args:
        schedule: which schedule.
        epoch: progress in epochs, fractions of an epoch included, in [0, num_epochs].
        num_epochs: length of the run.

    `multistep` changes at whole epochs: after milestone m the factor is reduced from epoch m on (0-based).
    Deviation: the official codes of CTRW, RNA and DCS step their scheduler at the start of an epoch, one epoch earlier.
    """
    progress = min(max(epoch / num_epochs, 0.0), 1.0)
    if schedule.name == "constant":
        return 1.0
    if schedule.name == "multistep":
        return schedule.factor ** sum(epoch >= milestone for milestone in schedule.milestones)
    if schedule.name == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    if progress < schedule.warmup_fraction:
        return progress / schedule.warmup_fraction
    return (1 - progress) / (1 - schedule.warmup_fraction)
