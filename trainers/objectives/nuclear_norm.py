"""NuAT: cross-entropy on clean images plus the nuclear norm of what a single-step attack does to the logits of the batch.

Shapes: B batch (of all workers), K classes.

Reference: Sriramanan et al., "Towards Efficient and Effective Adversarial Training", NeurIPS 2021, Eq. 5 and 6, and its public code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from trainers.attacks import AttackLoss
from trainers.attacks.single_step import SingleStep
from trainers.distributed import gather_rows, world
from trainers.hardware import at_least_fp32
from trainers.objective import LossObjective, ObjectiveConfig, ObjectiveEntry
from trainers.step import StepContext
from trainers.trades_terms import accuracies, logits_of_both


class NuclearNormConfig(ObjectiveConfig):
    """Parameters of NuAT."""

    takes_soft_labels: ClassVar[bool] = True
    takes_single_step: ClassVar[bool] = True

    name: Literal["nu_at"] = Field("nu_at", description="NuAT.")
    weight: float = Field(
        4.0,
        ge=0,
        description="Weight of the nuclear norm at the end, reached in equal steps from 0 (the FastAT benchmark; public code: 4.5).",
    )
    start_radius: float = Field(
        0.5, ge=0, le=1, description="Radius of the random start, relative to epsilon: the public code's 4/255 of 8/255."
    )

    @property
    def needs_whole_batch(self) -> bool:
        """The norm is that of the whole batch's matrix."""
        return True


def nuclear_norm_per_example(difference_BK: Tensor) -> Tensor:
    """Return the nuclear norm of the batch's matrix over the number of its rows, those of all workers included; gradients are such that
    their mean over the workers is the gradient of the whole."""
    _, size = world()
    norm = torch.linalg.matrix_norm(gather_rows(difference_BK), ord="nuc") / (len(difference_BK) * size)
    return norm + (size - 1) * (norm - norm.detach())


class NuclearNorm(LossObjective):
    """CE(f(x), y) + weight ||f(x) - f(x')||_* / B, with x' a step of epsilon from a corner of half the ball, back into the ball.

    The step climbs cross-entropy, and in every second step of an epoch the regularizer as well, as the public code does.
    """

    config: NuclearNormConfig

    def passes(self, attack_steps: int, num_members: int, epoch: int) -> float:
        return num_members * (2.0 + 6.0 + (0.5 if epoch else 0.0))  # every second attack looks at the clean logits as well

    def weight(self, context: StepContext) -> float:
        """Return the weight in this epoch: weight * epoch / epochs."""
        return self.config.weight * context.epoch / context.num_epochs

    def loss(self, model: nn.Module, x_BCHW: Tensor, y_B: Tensor, context: StepContext) -> Mapping[str, Tensor]:
        weight, epsilon = self.weight(context), context.threat_model.epsilon
        regularized = context.step % context.steps_per_epoch % 2 == 1
        adversarial_BCHW = context.adversarial_examples(
            model,
            x_BCHW,
            y_B,
            loss=_climbed(model, x_BCHW, weight if regularized else 0.0),
            kind=SingleStep("corners", self.config.start_radius * epsilon, epsilon, project=True),
        )
        clean_BK, adversarial_BK = logits_of_both(model, x_BCHW, adversarial_BCHW, context)
        cross_entropy = functional.cross_entropy(clean_BK, y_B)
        norm = nuclear_norm_per_example(clean_BK - adversarial_BK)
        return {
            "loss": cross_entropy + weight * norm,
            "cross_entropy": cross_entropy,
            "nuclear_norm": norm,
            **accuracies(clean_BK, adversarial_BK, y_B),
        }


def _climbed(model: nn.Module, x_BCHW: Tensor, weight: float) -> AttackLoss:
    """Return cross-entropy, with a share of the regularizer for each image."""

    def loss(logits_BK: Tensor, y_B: Tensor) -> Tensor:
        loss_B = functional.cross_entropy(logits_BK, y_B, reduction="none")
        if weight == 0:
            return loss_B
        with torch.no_grad():
            clean_BK = at_least_fp32(model(x_BCHW))
        whole_BK = gather_rows(clean_BK - logits_BK)
        return loss_B + weight * torch.linalg.matrix_norm(whole_BK, ord="nuc") / len(logits_BK)

    return loss


OBJECTIVES = (ObjectiveEntry("nu_at", "CE on clean images + nuclear norm of what one step changes", NuclearNormConfig, NuclearNorm),)
