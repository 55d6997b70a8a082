"""What the public code of Taylor-randomized training computes: soft labels from last-layer gradients, on top of TRADES.

It contains no Taylor term: per step, the difference between the row sums of the last layer's weight gradient on clean and on adversarial
images (and between their squares) sets a label distribution per class, against which both batches are trained.

L = (1-a) CE(s) + beta KL(p(s) || p(s')) + a F1 + a ratio F2, with F_o = 1/2 [KL(T(gap_o)_y || p(s')) + KL(T(-gap_o)_y || p(s))], gap_1 the
difference of |r|, gap_2 of r^2, T a constant label matrix (`trainers.soft_labels`) with only 1 - c = 2/K of the mass on the true class.

Reference: repository Alexkael/Randomized-Adversarial-Training (TRADES script).
Deviation: the same mathematics in two forward passes and one backward, with closed-form last-layer gradients (the public structure makes
eight train-mode passes, each of which moves the running statistics); c = 1 - 2/K for any number of classes; noise of the attack by
type of layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, cast

from pydantic import Field
from torch import Tensor, nn

from models.backbones.base import GivesFeatures
from models.errors import UserError
from trainers.hardware import at_least_fp32
from trainers.objective import ObjectiveEntry
from trainers.soft_labels import (
    default_smoothing,
    divergence_from_labels,
    gap_label_matrix,
    last_layer_gradient_sums,
)
from trainers.step import StepContext
from trainers.trades_terms import TradesFamily, TradesFamilyConfig
from trainers.weight_noise import WeightNoiseConfig


class SurrogateConfig(TradesFamilyConfig, WeightNoiseConfig):
    """Parameters of `rat_surrogate`; defaults of the public TRADES script."""

    name: Literal["rat_surrogate"] = Field("rat_surrogate", description="The public Taylor code.")
    sigma: float = Field(1e-4, ge=0, le=1000, description="Standard deviation of the noise on the attacked weights.")
    alpha: float = Field(0.2, ge=0, le=1, description="Weight of the soft-label terms; cross-entropy has 1 - alpha.")
    order: Literal[1, 2] = Field(2, description="1: the term of |r| alone; 2: that of r^2 as well (the public code).")
    second_ratio: float = Field(0.5, ge=0, description="Weight of the second term over alpha (PreActResNet-18 script: 0.4).")
    second_slip: bool = Field(
        True, description="Use T(-gap_2) as the target of both batches in the second term, as the public code does (T(gap_2) is unused)."
    )
    smoothing: float | None = Field(None, ge=0, le=1, description="c, the mass off the true class; none: 1 - 2/K.")
    attack_noise: bool = Field(True, description="Attack w + u (public TRADES scripts) or w (public AWP scripts).")

    @property
    def needs_whole_batch(self) -> bool:
        """Soft labels are made of the gradients of whole classes of the batch."""
        return True


class Surrogate(TradesFamily):
    """TRADES with gradient-gap soft labels."""

    config: SurrogateConfig

    def prepare(self, model: nn.Module) -> None:
        """Check that the model ends in features and one linear layer.

        Raises:
            UserError: it does not.
        """
        _last_layer(model)
        if self.config.attack_noise:
            self.config.names(model)

    def attack_noise(self) -> WeightNoiseConfig | None:
        return self.config if self.config.attack_noise else None

    def outer_loss(
        self, model: nn.Module, x_BCHW: Tensor, adversarial_BCHW: Tensor, y_B: Tensor, context: StepContext
    ) -> Mapping[str, Tensor]:
        config, classifier = self.config, _last_layer(model)
        with context.precision.autocast():
            features_BD, adversarial_features_BD = (
                cast(GivesFeatures, model).forward_features(images) for images in (x_BCHW, adversarial_BCHW)
            )
            clean_BK, adversarial_BK = classifier(features_BD), classifier(adversarial_features_BD)
        clean_BK, adversarial_BK = at_least_fp32(clean_BK), at_least_fp32(adversarial_BK)
        terms = self.zeroth_order(clean_BK, adversarial_BK, y_B)

        num_classes = clean_BK.shape[1]
        smoothing = default_smoothing(num_classes) if config.smoothing is None else config.smoothing
        sums_K = last_layer_gradient_sums(at_least_fp32(features_BD), clean_BK, y_B)
        adversarial_sums_K = last_layer_gradient_sums(at_least_fp32(adversarial_features_BD), adversarial_BK, y_B)
        gaps = [sums_K.abs() - adversarial_sums_K.abs(), sums_K.square() - adversarial_sums_K.square()]
        for name, weight, gap_K, slips in (
            ("surrogate_first", config.alpha, gaps[0], False),
            ("surrogate_second", config.alpha * config.second_ratio, gaps[1], config.second_slip),
        )[: config.order]:
            clean_labels_KK = gap_label_matrix(-gap_K, smoothing)
            adversarial_labels_KK = clean_labels_KK if slips else gap_label_matrix(gap_K, smoothing)
            terms[name] = 0.5 * (
                divergence_from_labels(adversarial_labels_KK, y_B, adversarial_BK) + divergence_from_labels(clean_labels_KK, y_B, clean_BK)
            )
            terms["loss"] = terms["loss"] + weight * terms[name]
        terms["loss"] = terms["loss"] - config.alpha * terms["cross_entropy"]
        return terms


def _last_layer(model: nn.Module) -> nn.Linear:
    classifier = getattr(getattr(model, "backbone", None), "classifier", None)
    if not isinstance(classifier, nn.Linear) or not hasattr(model, "forward_features"):
        raise UserError(
            f"rat_surrogate needs a network that ends in features and one linear layer; {type(model).__name__} does not show them"
        )
    return classifier


OBJECTIVES = (ObjectiveEntry("rat_surrogate", "TRADES + gradient-gap soft labels (the public Taylor code)", SurrogateConfig, Surrogate),)
