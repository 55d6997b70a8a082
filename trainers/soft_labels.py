"""Soft labels of the public Taylor code, and losses against them.

Shapes: B batch, K classes, D features. A label matrix T (K, K) holds one distribution per true class.

Reference: the public code of Jin et al., "Randomized Adversarial Training via Taylor Expansion", CVPR 2023, which differs from the
paper's equations: see `trainers.objectives.rat_surrogate`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from trainers.distributed import all_reduce_flat


def default_smoothing(num_classes: int) -> float:
    """Return c = 1 - 2/K, the mass off the true class: 0.8 for 10 and 0.98 for 100 classes, the two values of the public code."""
    return 1 - 2 / num_classes


@torch.no_grad()
def last_layer_gradient_sums(features_BD: Tensor, logits_BK: Tensor, y_B: Tensor) -> Tensor:
    """Return r (K,): the row sums of d CE / d W for the last layer's weight W (K, D), CE the batch mean.

    In a process group the batch is that of all workers together, so that all use the same labels.
    In closed form, r_k = mean over b of (p_bk - [y_b = k]) times the sum of features_b; no backward pass. The r_k sum to zero.
    """
    residual_BK = functional.softmax(logits_BK, 1)
    residual_BK = residual_BK - functional.one_hot(y_B, logits_BK.shape[1]).to(residual_BK.dtype)
    sums_K = (residual_BK * features_BD.sum(1, keepdim=True)).mean(0)
    all_reduce_flat([sums_K], "mean")
    return sums_K


@torch.no_grad()
def gap_label_matrix(gap_K: Tensor, smoothing: float) -> Tensor:
    """Return T (K, K): 1 - c on the true class, c spread over the others in proportion to gap - min(gap).

    The class of the smallest gap gets nothing (beyond its own diagonal). Rows in which no other class has any mass are uniform.

    Args:
        gap_K: any real numbers.
        smoothing: c in [0,1].
    """
    num_classes = len(gap_K)
    off_diagonal = 1 - torch.eye(num_classes, dtype=gap_K.dtype, device=gap_K.device)
    shares_KK = (gap_K - gap_K.min()) * off_diagonal
    total_K1 = shares_KK.sum(1, keepdim=True)
    shares_KK = torch.where(total_K1 > 0, shares_KK / total_K1, off_diagonal / (num_classes - 1))
    return smoothing * shares_KK + (1 - smoothing) * (1 - off_diagonal)


def uniform_label_matrix(num_classes: int, smoothing: float, like: Tensor) -> Tensor:
    """Return T (K, K) of plain label smoothing: 1 - c on the true class, c spread evenly over the others."""
    return gap_label_matrix(torch.zeros(num_classes, dtype=like.dtype, device=like.device), smoothing)


def divergence_from_labels(labels_KK: Tensor, y_B: Tensor, logits_BK: Tensor) -> Tensor:
    """Return the batch mean of KL(T_y || softmax(logits)), in nats."""
    target_BK = labels_KK[y_B]
    log_probability_BK = functional.log_softmax(logits_BK, 1)
    return (torch.xlogy(target_BK, target_BK) - target_BK * log_probability_BK).sum(1).mean()
