"""Natural training: cross-entropy on clean images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional

from models.randomness import resample
from trainers.hardware import at_least_fp32
from trainers.objective import LossObjective, ObjectiveConfig, ObjectiveEntry
from trainers.step import StepContext


class NaturalConfig(ObjectiveConfig):
    """Natural training has no parameters."""

    takes_soft_labels: ClassVar[bool] = True
    is_compilable: ClassVar[bool] = True


class Natural(LossObjective):
    """Cross-entropy on clean images; a randomized model takes a new draw at each step."""

    def passes(self, attack_steps: int, num_members: int, epoch: int) -> float:
        return 3.0 * num_members

    def terms(self, model: nn.Module, x_BCHW: Tensor, y_B: Tensor, context: StepContext) -> Mapping[str, Tensor]:
        return {}

    def loss(self, model: nn.Module, x_BCHW: Tensor, y_B: Tensor, context: StepContext) -> Mapping[str, Tensor]:
        resample(model)
        with context.precision.autocast():
            logits_BK = model(x_BCHW)
        return {"loss": functional.cross_entropy(at_least_fp32(logits_BK), y_B)}


OBJECTIVES = (ObjectiveEntry("natural", "cross-entropy on clean images", NaturalConfig, Natural, selection="last"),)
