"""Plain label smoothing on top of TRADES: the control of `rat_surrogate`.

The loss of `rat_surrogate` with label distributions that are uniform off the true class, at the same mass c and weight alpha. What the
surrogate gains over this is owed to the gradient gaps; what it shares with this is owed to smoothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from trainers.objective import ObjectiveEntry
from trainers.soft_labels import default_smoothing, divergence_from_labels, uniform_label_matrix
from trainers.step import StepContext
from trainers.trades_terms import TradesFamily, TradesFamilyConfig, logits_of_both


class LabelSmoothingConfig(TradesFamilyConfig):
    """Parameters of `label_smoothing`; the defaults are those of `rat_surrogate` with both terms."""

    is_compilable: ClassVar[bool] = True

    name: Literal["label_smoothing"] = Field("label_smoothing", description="TRADES with plain label smoothing.")
    alpha: float = Field(0.2, ge=0, le=1, description="Weight of the smoothed term; cross-entropy has 1 - alpha.")
    ratio: float = Field(1.5, ge=0, description="Smoothed terms over alpha: 1.5 as in rat_surrogate with order 2, 1 with order 1.")
    smoothing: float | None = Field(None, ge=0, le=1, description="c, the mass off the true class; none: 1 - 2/K.")


class LabelSmoothing(TradesFamily):
    """(1-a) CE(s) + beta KL(p(s) || p(s')) + a ratio 1/2 [KL(T_y || p(s')) + KL(T_y || p(s))], T uniform off the diagonal."""

    config: LabelSmoothingConfig

    def outer_loss(
        self, model: nn.Module, x_BCHW: Tensor, adversarial_BCHW: Tensor, y_B: Tensor, context: StepContext
    ) -> Mapping[str, Tensor]:
        config = self.config
        clean_BK, adversarial_BK = logits_of_both(model, x_BCHW, adversarial_BCHW, context)
        terms = self.zeroth_order(clean_BK, adversarial_BK, y_B)
        num_classes = clean_BK.shape[1]
        smoothing = default_smoothing(num_classes) if config.smoothing is None else config.smoothing
        labels_KK = uniform_label_matrix(num_classes, smoothing, clean_BK)
        terms["smoothed"] = 0.5 * (
            divergence_from_labels(labels_KK, y_B, adversarial_BK) + divergence_from_labels(labels_KK, y_B, clean_BK)
        )
        terms["loss"] = terms["loss"] + config.alpha * config.ratio * terms["smoothed"] - config.alpha * terms["cross_entropy"]
        return terms


OBJECTIVES = (ObjectiveEntry("label_smoothing", "TRADES + plain label smoothing", LabelSmoothingConfig, LabelSmoothing),)
