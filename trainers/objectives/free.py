"""Free adversarial training: every batch is trained on several times, and one backward pass gives the gradient of weights and image.

Reference: Shafahi et al., "Adversarial Training for Free!", NeurIPS 2019, Algorithm 1.
Deviation: the perturbation that one batch leaves to the next begins at zero in each epoch, so that an epoch depends on nothing before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from models.modes import mode
from trainers.attacks import ball_around
from trainers.hardware import at_least_fp32
from trainers.labels import most_probable
from trainers.objective import Objective, ObjectiveConfig, ObjectiveEntry
from trainers.step import StepContext


class FreeConfig(ObjectiveConfig):
    """Parameters of free adversarial training."""

    takes_soft_labels: ClassVar[bool] = True
    takes_single_step: ClassVar[bool] = True

    name: Literal["free"] = Field("free", description="Free adversarial training.")
    replays: int = Field(8, ge=1, le=1000, description="m: optimizer steps on each batch (8 on CIFAR-10: Shafahi et al. 2019).")

    @property
    def needs_whole_batch(self) -> bool:
        """One perturbation is kept for each row of the batch."""
        return True


class Free(Objective):
    """Cross-entropy on x + delta; delta takes a step of epsilon along the gradient that the same backward pass gives.

    The settings of the inner attack count for nothing: the step is epsilon, the ball the threat model's.
    """

    config: FreeConfig

    def __init__(self, config: ObjectiveConfig) -> None:
        super().__init__(config)
        self.delta_BCHW: Tensor | None = None

    @property
    def replays(self) -> int:
        """m."""
        return self.config.replays

    def step_state(self) -> dict[str, Tensor]:
        return {} if self.delta_BCHW is None else {"delta": self.delta_BCHW}

    def load_step_state(self, state: Mapping[str, Tensor]) -> None:
        self.delta_BCHW = state.get("delta")

    def passes(self, attack_steps: int, num_members: int, epoch: int) -> float:
        return num_members * 3.0 * self.config.replays

    def training_step(self, model: nn.Module, x_BCHW: Tensor, y_B: Tensor, context: StepContext) -> dict[str, Tensor]:
        begins = context.step % context.steps_per_epoch == 0 and context.replay == 0
        if begins or self.delta_BCHW is None or self.delta_BCHW.shape != x_BCHW.shape:
            self.delta_BCHW = torch.zeros_like(x_BCHW)
        context.redraw_for_attack(model)
        epsilon, norm = context.threat_model.epsilon, context.threat_model.norm
        ball = ball_around(x_BCHW, epsilon, norm)
        leaf = ball.project_(x_BCHW + self.delta_BCHW).requires_grad_()
        with mode(model, "train"), context.precision.autocast():
            logits_BK = at_least_fp32(model(leaf))
        loss = functional.cross_entropy(logits_BK, y_B)
        loss.backward()
        assert leaf.grad is not None
        self.delta_BCHW = ball.ascend_(leaf.detach().clone(), leaf.grad, epsilon) - x_BCHW
        correct_B = logits_BK.detach().argmax(1) == most_probable(y_B)
        return {"loss": loss.detach(), "robust_accuracy": correct_B.float().mean()}


OBJECTIVES = (ObjectiveEntry("free", "cross-entropy on images that the same pass perturbs, each batch m times", FreeConfig, Free),)
