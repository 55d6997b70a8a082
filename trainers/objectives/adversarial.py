"""Natural and adversarial training: cross-entropy on clean images, or on PGD examples.

Reference: Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR 2018, Eq. 2.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from models.randomness import resample
from trainers.objective import Objective, ObjectiveConfig, ObjectiveEntry
from trainers.step import StepContext
from trainers.weight_perturbation import PerturbableConfig, PerturbableObjective


class Natural(Objective):
    """Cross-entropy on clean images; a randomized model takes a new draw at each step."""

    def loss(self, model: nn.Module, x_BCHW: Tensor, y_B: Tensor, context: StepContext) -> Mapping[str, Tensor]:
        resample(model)
        with context.precision.autocast():
            logits_BK = model(x_BCHW)
        return {"loss": functional.cross_entropy(at_least_fp32(logits_BK), y_B)}


class AdversarialConfig(PerturbableConfig):
    """Parameters of adversarial training."""

    name: Literal["adversarial"] = Field("adversarial", description="Adversarial training.")


class Adversarial(PerturbableObjective):
    """Cross-entropy on adversarial examples; when the model redraws is `training.redraw`.

    The defences CTRW, RNA and DCS train with it: their papers' Algorithm 1 attacks one draw and trains another. With
    `weight_perturbation` it is AT-AWP.
    """

    def attack(self, model: nn.Module, x_BCHW: Tensor, y_B: Tensor, context: StepContext) -> Tensor:
        return context.adversarial_examples(model, x_BCHW, y_B)

    def outer_loss(
        self, model: nn.Module, x_BCHW: Tensor, adversarial_BCHW: Tensor, y_B: Tensor, context: StepContext
    ) -> Mapping[str, Tensor]:
        with context.precision.autocast():
            logits_BK = at_least_fp32(model(adversarial_BCHW))
        correct_B = logits_BK.detach().argmax(1) == y_B
        return {"loss": functional.cross_entropy(logits_BK, y_B), "robust_accuracy": correct_B.float().mean()}


def at_least_fp32(logits_BK: Tensor) -> Tensor:
    """Return logits in float32 at least: losses are never computed in bf16."""
    return logits_BK.float() if logits_BK.dtype.itemsize < 4 else logits_BK


OBJECTIVES = (
    ObjectiveEntry("natural", "cross-entropy on clean images", ObjectiveConfig, Natural),
    ObjectiveEntry("adversarial", "cross-entropy on PGD examples (AT)", AdversarialConfig, Adversarial),
)
