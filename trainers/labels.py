"""Labels as numbers (B,) or as probabilities (B, K): mixed images and averaged networks give the latter.

Shapes: B batch, K classes.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def most_probable(labels: Tensor) -> Tensor:
    """Return the number (B,) of the most probable class of each label."""
    return labels.argmax(1) if labels.dim() == 2 else labels


def softened(labels: Tensor, logits_BK: Tensor, weight: float, temperature: float) -> Tensor:
    """Return (1 - weight) labels + weight softmax(logits / temperature), (B, K).

    Reference: Chen et al., Robust Overfitting May Be Mitigated by Properly Learned Smoothening, ICLR 2021, section 3.1.
    """
    given_BK = labels if labels.dim() == 2 else functional.one_hot(labels, logits_BK.shape[1])
    return (1 - weight) * given_BK.to(logits_BK.dtype) + weight * (logits_BK / temperature).softmax(1)
