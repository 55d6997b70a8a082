"""What an attack maximizes: functions of logits and labels, one value per example.

Shapes: B batch, K classes.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional

AttackLoss = Callable[[Tensor, Tensor], Tensor]
"""`(logits_BK, y_B) -> loss_B`, to be maximized."""


def cross_entropy(logits_BK: Tensor, y_B: Tensor) -> Tensor:
    """Return the cross-entropy of each example, in nats."""
    return functional.cross_entropy(logits_BK, y_B, reduction="none")


def margin(logits_BK: Tensor, y_B: Tensor) -> Tensor:
    """Return the largest logit of a wrong class minus the logit of the true class: positive where the model errs.

    Reference: Carlini and Wagner, Towards Evaluating the Robustness of Neural Networks, objective f6 without its floor.
    """
    true_B1 = y_B.unsqueeze(1)
    wrong_BK = logits_BK.scatter(1, true_B1, float("-inf"))
    return wrong_BK.amax(dim=1) - logits_BK.gather(1, true_B1).squeeze(1)
