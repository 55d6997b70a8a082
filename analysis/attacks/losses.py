"""Losses that only attacks on finished models use; all are to be maximized.

Shapes: B batch, K classes.
Reference: Croce and Hein, Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse Parameter-free Attacks, Eq. 6, 7.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from models.errors import UserError
from trainers.attacks import AttackLoss, cross_entropy, margin

LossName = Literal["cross_entropy", "margin", "difference_of_logits_ratio"]

_SMALLEST = 1e-12


def difference_of_logits_ratio(logits_BK: Tensor, y_B: Tensor) -> Tensor:
    """Return the margin over the distance between largest and third largest logit (B,): invariant to shift and scale. K >= 3."""
    top_B3 = logits_BK.topk(3, dim=1).values
    return margin(logits_BK, y_B) / (top_B3[:, 0] - top_B3[:, 2] + _SMALLEST)


@dataclass(frozen=True)
class TargetedDifferenceOfLogitsRatio:
    """The loss that pushes towards class `target_B`, scaled by the gap of the largest to the third and fourth logit. K >= 4."""

    target_B: Tensor

    def __call__(self, logits_BK: Tensor, y_B: Tensor) -> Tensor:
        top_B4 = logits_BK.topk(4, dim=1).values
        scale_B = top_B4[:, 0] - (top_B4[:, 2] + top_B4[:, 3]) / 2 + _SMALLEST
        true_B, aim_B = (logits_BK.gather(1, index[:, None]).squeeze(1) for index in (y_B, self.target_B))
        return (aim_B - true_B) / scale_B


def loss_of_rows(loss: AttackLoss, rows: Tensor) -> AttackLoss:
    """Return the loss for some of the examples: targets are taken along."""
    if isinstance(loss, TargetedDifferenceOfLogitsRatio):
        return TargetedDifferenceOfLogitsRatio(loss.target_B[rows])
    return loss


def attack_loss(name: LossName, num_classes: int) -> AttackLoss:
    """Return the loss of that name.

    Raises:
        UserError: the loss needs more classes than the model has.
    """
    if name == "difference_of_logits_ratio" and num_classes < 3:
        raise UserError(f"the loss `difference_of_logits_ratio` needs at least 3 classes, the model has {num_classes}; use `margin`")
    return {
        "cross_entropy": cross_entropy,
        "margin": margin,
        "difference_of_logits_ratio": difference_of_logits_ratio,
    }[name]
