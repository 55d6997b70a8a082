"""The seam between the fit loop and whoever listens: Ray, MLflow, a terminal, nobody."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class EpochReport:
    """What is known after an epoch.

    Attributes:
        epoch: number of finished epochs, from 1.
        metrics: named numbers, e.g. `train/loss`, `validation/robust_accuracy/pgd_10`.
    """

    epoch: int
    metrics: Mapping[str, float]


def are_metrics(content: object) -> bool:
    """Return whether this is what an epoch reports: numbers by name."""
    return isinstance(content, dict) and all(
        isinstance(name, str) and isinstance(value, int | float) and not isinstance(value, bool) for name, value in content.items()
    )


class Reporter(Protocol):
    """Receives reports; every worker calls it, in the same order."""

    def epoch_finished(self, report: EpochReport, save: Callable[[Path], None]) -> None:
        """Take notice of an epoch. `save(folder)` writes the resumable state there; call it or not. May raise `StopTraining`."""

    def step_finished(self, step: int, num_steps: int, save: Callable[[Path], None]) -> None:
        """Take notice of a step; must be cheap. `save(folder)` writes the state amid the epoch there: for a machine that is about to go."""


class StopTraining(Exception):
    """Raised by a reporter to end training cleanly after the current epoch."""


class SilentReporter:
    """Listens to nothing."""

    def epoch_finished(self, report: EpochReport, save: Callable[[Path], None]) -> None:
        """Do nothing."""

    def step_finished(self, step: int, num_steps: int, save: Callable[[Path], None]) -> None:
        """Do nothing."""
