"""Adversarial training: cross-entropy on PGD examples.

Reference: Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR 2018, Eq. 2.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from trainers.hardware import at_least_fp32
from trainers.labels import most_probable
from trainers.objective import ObjectiveEntry
from trainers.step import StepContext
from trainers.weight_perturbation import PerturbableConfig, PerturbableObjective


class AdversarialConfig(PerturbableConfig):
    """Parameters of adversarial training."""

    takes_soft_labels: ClassVar[bool] = True
    is_compilable: ClassVar[bool] = True

    name: Literal["adversarial"] = Field("adversarial", description="Adversarial training.")


class Adversarial(PerturbableObjective):
    """Cross-entropy on adversarial examples; when the model redraws is `training.redraw`.

    The defences CTRW, RNA and DCS train with it: their papers' Algorithm 1 attacks one draw and trains another. With
    `weight_perturbation` it is AT-AWP.
    """

    def outer_passes(self) -> float:
        return 3.0

    def attack(self, model: nn.Module, x_BCHW: Tensor, y_B: Tensor, context: StepContext) -> Tensor:
        return context.adversarial_examples(model, x_BCHW, y_B)

    def terms(self, model: nn.Module, x_BCHW: Tensor, y_B: Tensor, context: StepContext) -> Mapping[str, Tensor]:
        return {}

    def outer_loss(
        self, model: nn.Module, x_BCHW: Tensor, adversarial_BCHW: Tensor, y_B: Tensor, context: StepContext
    ) -> Mapping[str, Tensor]:
        with context.precision.autocast():
            logits_BK = at_least_fp32(model(adversarial_BCHW))
        correct_B = logits_BK.detach().argmax(1) == most_probable(y_B)
        return {"loss": functional.cross_entropy(logits_BK, y_B), "robust_accuracy": correct_B.float().mean()}


OBJECTIVES = (ObjectiveEntry("adversarial", "cross-entropy on PGD examples (AT)", AdversarialConfig, Adversarial),)
