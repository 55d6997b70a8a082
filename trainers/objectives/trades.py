"""TRADES: cross-entropy on clean images plus beta times the KL divergence of adversarial from clean probabilities.

Reference: Zhang et al., "Theoretically Principled Trade-off between Robustness and Accuracy", ICML 2019, Eq. 5 and Algorithm 1.
Deviation: two train-mode passes per step update the running statistics (the public script makes three, one more over the clean images);
the inner attack starts inside the pixel range. AWP around it (TRADES-AWP) is the field `weight_perturbation`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from trainers.objective import ObjectiveEntry
from trainers.step import StepContext
from trainers.trades_terms import TradesFamily, TradesFamilyConfig, logits_of_both


class TradesConfig(TradesFamilyConfig):
    """Parameters of `trades`."""

    takes_soft_labels: ClassVar[bool] = True
    is_compilable: ClassVar[bool] = True

    name: Literal["trades"] = Field("trades", description="TRADES.")


class Trades(TradesFamily):
    """CE(f(x), y) + beta KL(p(x) || p(x')), gradients through both sides of the KL."""

    def outer_loss(
        self, model: nn.Module, x_BCHW: Tensor, adversarial_BCHW: Tensor, y_B: Tensor, context: StepContext
    ) -> Mapping[str, Tensor]:
        return self.zeroth_order(*logits_of_both(model, x_BCHW, adversarial_BCHW, context), y_B)


OBJECTIVES = (ObjectiveEntry("trades", "CE on clean images + beta KL to adversarial ones", TradesConfig, Trades),)
