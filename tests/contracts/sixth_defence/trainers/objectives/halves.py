"""A toy objective for tests: cross-entropy on clean and on adversarial images, weighted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from trainers.hardware import at_least_fp32
from trainers.objective import LossObjective, ObjectiveConfig, ObjectiveEntry
from trainers.step import StepContext


class HalvesConfig(ObjectiveConfig):
    """Parameters of the toy."""

    name: Literal["halves"] = Field("halves", description="Clean and adversarial images.")
    clean_weight: float = Field(0.5, ge=0, le=1, description="Weight of the clean images.")


class Halves(LossObjective):
    """The weighted mean of both losses."""

    config: HalvesConfig

    def passes(self, attack_steps: int, num_members: int, epoch: int) -> float:
        return num_members * (2.0 * attack_steps + 6.0)

    def loss(self, model: nn.Module, x_BCHW: Tensor, y_B: Tensor, context: StepContext) -> Mapping[str, Tensor]:
        adversarial_BCHW = context.adversarial_examples(model, x_BCHW, y_B)
        with context.precision.autocast():
            clean, robust = (functional.cross_entropy(at_least_fp32(model(images)), y_B) for images in (x_BCHW, adversarial_BCHW))
        weight = self.config.clean_weight
        return {"loss": weight * clean + (1 - weight) * robust, "clean_loss": clean}


OBJECTIVES = (ObjectiveEntry("halves", "cross-entropy on clean and adversarial images", HalvesConfig, Halves),)
