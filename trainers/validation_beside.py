"""Validation of an epoch elsewhere, while the next epoch trains here: what the training loop asks for, and what waits meanwhile.

The results are those of a validation here. Only trainings whose next epoch does not depend on the validation of this one can do so.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from trainers.config import TrainingConfig
from trainers.distributed import to_cpu


class PendingValidation(Protocol):
    """A validation that was begun elsewhere."""

    def result(self) -> dict[str, float] | None:
        """Wait for it, and return its metrics; None: it could not be done there, and has to be done here."""


class Beside(Protocol):
    """Where validations may be done beside the training."""

    def begin(self, weights: Mapping[str, Tensor]) -> PendingValidation | None:
        """Begin a validation of the network with these weights, on the CPU; None: no place is free for it."""


@dataclass(frozen=True)
class Measured:
    """An epoch that is trained and is measured elsewhere.

    Attributes:
        epoch: from 1. metrics: of its training. state: of the training after it, without what the validation decides.
        pending: its validation.
    """

    epoch: int
    metrics: dict[str, float]
    state: dict[str, Any]
    pending: PendingValidation


def can_validate_beside(config: TrainingConfig, num_workers: int) -> bool:
    """Return whether nothing of the next epoch depends on the validation of this one.

    A learning rate that follows plateaus does; averaged weights and signs of single-step attacks are measured beside the validation.
    """
    return num_workers == 1 and config.averaging.name == "none" and config.schedule.name != "plateau" and not config.single_step


@contextlib.contextmanager
def with_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Have other weights in the model inside."""
    present = to_cpu(model.state_dict())
    model.load_state_dict(weights)
    try:
        yield
    finally:
        model.load_state_dict(present)
