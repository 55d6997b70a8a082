"""ADP: cross-entropy of every member, entropy of the mean prediction, and the volume spanned by the non-true probabilities.

Shapes: B batch, K classes, N members. Reference: Pang et al., "Improving Adversarial Robustness via Promoting Ensemble Diversity",
Eq. 5 to 8.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from models.configuration import Config
from models.ensemble import ensemble_in, num_members_of
from models.layers.hypernetwork import generated_weights
from models.randomness import resample
from trainers.ensembles.objective import EnsembleObjective, EnsembleObjectiveConfig
from trainers.hardware import at_least_fp32
from trainers.objective import LossObjective, ObjectiveEntry
from trainers.step import StepContext

DETERMINANT_OFFSET = 1e-6


class DegenerateDiversityWarning(UserWarning):
    """More members than directions in which their non-true probabilities can differ."""


class AdpObjectiveConfig(EnsembleObjectiveConfig):
    """Parameters of ADP's loss."""

    fewest_members = 2
    name: Literal["adp"] = Field("adp", description="ADP.")
    entropy_weight: float = Field(2.0, ge=0, description="alpha, weight of the ensemble entropy; 2 in its repository.")
    diversity_weight: float = Field(0.5, ge=0, description="beta, weight of the log determinant; 0.5 in its repository.")

    def problem_with(self, defence: Config, num_classes: int) -> str | None:
        """The determinant of more members than classes minus one is nearly zero, whatever is learned."""
        problem = super().problem_with(defence, num_classes)
        if problem is not None:
            return problem
        num_members = num_members_of(defence)
        if not self.diversity_weight or num_members <= num_classes - 1:
            return None
        return (
            f"training.objective adp: defence.num_members is {num_members}; with {num_classes} classes the diversity term has a meaning "
            f"for at most {num_classes - 1}"
        )


def ensemble_entropy(logits_NBK: Tensor) -> Tensor:
    """Return the mean over examples of the entropy of the members' mean probability, in nats: (), in [0, log K]."""
    log_mean_BK = logits_NBK.log_softmax(dim=-1).logsumexp(dim=0) - math.log(len(logits_NBK))
    return -(log_mean_BK.exp() * log_mean_BK).sum(dim=-1).mean()


def log_determinant_diversity(logits_NBK: Tensor, y_B: Tensor) -> Tensor:
    """Return the mean over examples of log det(M M^T + 1e-6 I); rows of M are the members' non-true probabilities, scaled to length 1.

    Computed in float64: with equal members the smallest eigenvalue is 1e-6, below what float32 resolves.
    """
    num_members, num_examples, num_classes = logits_NBK.shape
    others_NBK = functional.one_hot(y_B, num_classes).logical_not().expand_as(logits_NBK)
    # Softmax over the other classes is proportional to their probabilities and cannot underflow to a row of zeros.
    logits_NBJ = logits_NBK[others_NBK].view(num_members, num_examples, num_classes - 1)
    rows_BNJ = functional.normalize(logits_NBJ.double().softmax(dim=-1), dim=-1).transpose(0, 1)
    eye_NN = torch.eye(num_members, dtype=torch.float64, device=logits_NBK.device)
    factor_BNN = torch.linalg.cholesky(rows_BNJ @ rows_BNJ.mT + DETERMINANT_OFFSET * eye_NN)
    return 2 * factor_BNN.diagonal(dim1=-2, dim2=-1).log().sum(dim=-1).mean()


class Adp(EnsembleObjective, LossObjective):
    """ADP's loss."""

    config: AdpObjectiveConfig

    def passes(self, attack_steps: int, num_members: int, epoch: int) -> float:
        return 3.0 * num_members

    def prepare(self, model: nn.Module) -> None:
        """Raise a `UserError` unless `model` is an ensemble; warn if its members cannot all differ."""
        super().prepare(model)
        spec = getattr(model, "spec", None)
        if spec is not None:
            check_rank(ensemble_in(model).num_members, spec.num_classes)

    def loss(self, model: nn.Module, x_BCHW: Tensor, y_B: Tensor, context: StepContext) -> Mapping[str, Tensor]:
        resample(model)
        with context.precision.autocast(), generated_weights(model):
            logits_NBK = torch.stack([at_least_fp32(member(x_BCHW)) for member in ensemble_in(model).members])
        num_members = len(logits_NBK)
        cross_entropy = functional.cross_entropy(logits_NBK.flatten(0, 1), y_B.repeat(num_members))
        entropy = ensemble_entropy(logits_NBK)
        diversity = log_determinant_diversity(logits_NBK, y_B)
        loss = num_members * cross_entropy - self.config.entropy_weight * entropy - self.config.diversity_weight * diversity
        return {"loss": loss, "cross_entropy": cross_entropy, "entropy": entropy, "diversity": diversity}


def check_rank(num_members: int, num_classes: int) -> None:
    """Warn if N > K - 1: N vectors of K - 1 non-true probabilities are then linearly dependent, whatever is learned."""
    if num_members > num_classes - 1:
        warnings.warn(
            f"ADP with {num_members} members and {num_classes} classes: {num_members} vectors of {num_classes - 1} non-true probabilities "
            f"are always linearly dependent, so {num_members - num_classes + 1} factor(s) of the determinant stay near 1e-6 and the "
            f"diversity "
            f"term says little. At most {num_classes - 1} members can all differ.",
            DegenerateDiversityWarning,
            stacklevel=2,
        )


OBJECTIVES = (
    ObjectiveEntry("adp", "cross-entropy with ensemble entropy and log-determinant diversity", AdpObjectiveConfig, Adp, selection="last"),
)
