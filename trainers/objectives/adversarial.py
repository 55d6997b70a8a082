"""Natural and adversarial training: cross-entropy on clean images, or on PGD examples.

Reference: Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR 2018, Eq. 2.1.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn import functional

from models.randomness import resample
from trainers.objective import Objective, ObjectiveConfig, ObjectiveEntry
from trainers.step import StepContext


class Natural(Objective):
    """Cross-entropy on clean images; a randomized model takes a new draw at each step."""

    def loss(self, model: nn.Module, x_BCHW: Tensor, y_B: Tensor, context: StepContext) -> Mapping[str, Tensor]:
        resample(model)
        with context.precision.autocast():
            logits_BK = model(x_BCHW)
        return {"loss": functional.cross_entropy(logits_BK.float() if logits_BK.dtype.itemsize < 4 else logits_BK, y_B)}


class Adversarial(Objective):
    """Cross-entropy on adversarial examples; when the model redraws is `training.redraw`.

    The defences CTRW, RNA and DCS train with it: their papers' Algorithm 1 attacks one draw and trains another.
    """

    def loss(self, model: nn.Module, x_BCHW: Tensor, y_B: Tensor, context: StepContext) -> Mapping[str, Tensor]:
        adversarial_BCHW = context.adversarial_examples(model, x_BCHW, y_B)
        with context.precision.autocast():
            logits_BK = model(adversarial_BCHW)
        logits_BK = logits_BK.float() if logits_BK.dtype.itemsize < 4 else logits_BK
        correct_B = logits_BK.detach().argmax(1) == y_B
        return {"loss": functional.cross_entropy(logits_BK, y_B), "robust_accuracy": correct_B.float().mean()}


OBJECTIVES = (
    ObjectiveEntry("natural", "cross-entropy on clean images", ObjectiveConfig, Natural),
    ObjectiveEntry("adversarial", "cross-entropy on PGD examples (AT)", ObjectiveConfig, Adversarial),
)
