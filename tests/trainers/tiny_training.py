"""Trainings of seconds on a few digits, and one that is stopped after its first epoch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trainers.config import TrainingConfig
from trainers.data import DataConfig, Splits, load_data
from trainers.optimizer import OptimizerConfig
from trainers.reporting import EpochReport, SilentReporter, StopTraining
from trainers.schedule import ScheduleConfig
from trainers.step import InnerAttackConfig
from trainers.validation import ValidationConfig


def few_digits() -> Splits:
    """Return 64 training, 32 validation and 20 test images."""
    return load_data(DataConfig(name="digits", limit_train=64, limit_test=20, validation_size=32))


def tiny_config(**changes: Any) -> TrainingConfig:
    """Return two epochs of one-step adversarial training, with changes."""
    settings: dict[str, Any] = {
        "epochs": 2,
        "batch_size": 16,
        "precision": "fp32",
        "attack": InnerAttackConfig(steps=1, step_size=0.05),
        "optimizer": OptimizerConfig(learning_rate=0.02),
        "schedule": ScheduleConfig(name="constant"),
        "validation": ValidationConfig(steps=1, num_draws=1, select="last"),
    }
    return TrainingConfig(**settings | changes)


class StopAfterOne(SilentReporter):
    """Keeps the state of the first epoch and ends the training there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def epoch_finished(self, report: EpochReport, save: Any) -> None:
        save(self.folder)
        raise StopTraining
