"""Randomized adversarial training by Taylor expansion in the weights: TRADES plus first- and second-order terms.

L = CE(g_s, y) + beta D(g_s, g_s') + eta E_u D(d1_s, d1_s') + eta/2 E_u D(d2_s, d2_s'), with d1 = g' u, d2 = u' g'' u, u ~ N(0, sigma^2).

Reference: Jin et al., "Randomized Adversarial Training via Taylor Expansion", CVPR 2023, Algorithm 1 and Eq. 8.
Deviation: the paper leaves open what D is (KL in Eq. 2, "calibrated loss" in Eq. 3, cross-entropy in section 5.1): KL by default. Its Eq. 7
(an upper bound by Jensen's inequality) does not hold for softmax divergences, so the sum is a regularizer, not a bound. The public
code does not compute these terms at all: see `rat_surrogate`. D is nearly quadratic, so both terms scale with sigma^2 or more: at the
public code's sigma of 1e-4 they vanish.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from models.errors import UserError
from models.layers.channel_statistics import is_synchronized
from models.layers.explicit_batch_norm import make_batch_norm_explicit
from trainers.objective import ObjectiveEntry
from trainers.step import StepContext
from trainers.taylor.terms import taylor_terms
from trainers.trades_terms import DivergenceName, TradesFamily, TradesFamilyConfig, divergence, logits_of_both
from trainers.weight_noise import WeightNoiseConfig


class TaylorConfig(TradesFamilyConfig, WeightNoiseConfig):
    """Parameters of `rat_taylor`. The paper uses eta 0.3 with order 1 and 0.2 with order 2."""

    name: Literal["rat_taylor"] = Field("rat_taylor", description="Taylor-randomized adversarial training.")
    order: Literal[0, 1, 2] = Field(2, description="Highest Taylor term: 0 (TRADES), 1, or 2 (first and second; the paper reports both).")
    eta: float = Field(0.2, ge=0, description="Weight eta of the first-order term; the second-order one has eta/2.")
    divergence: DivergenceName = Field(
        "kl", description="D of all terms: `kl` (the paper, Eq. 2), `ce` (KL without entropy), `mse`; not measured."
    )
    num_noise_samples: int = Field(1, ge=1, le=64, description="Samples of u per step over which E_u is averaged.")
    derivatives: Literal["exact", "nested_jvp", "antithetic"] = Field(
        "exact",
        description="`exact`: Taylor-mode forward differentiation; `nested_jvp`: exact too, slower, for networks that `exact` does not "
        "know; `antithetic`: differences at w +- u, with ReLU a finite-size effect and not the derivatives that the paper writes.",
    )
    attack_noise: bool = Field(True, description="Attack w + u with one u per batch (Algorithm 1) instead of w.")


class Taylor(TradesFamily):
    """TRADES plus Taylor terms. One fresh u, shared by clean and adversarial images and by the whole batch, per sample of E_u."""

    config: TaylorConfig

    def __init__(self, config: TaylorConfig) -> None:
        super().__init__(config)
        self.divergence_name = config.divergence

    @property
    def uses_derivatives(self) -> bool:
        """Whether there is anything beyond TRADES to compute."""
        return self.config.order > 0 and self.config.eta > 0

    def prepare(self, model: nn.Module) -> None:
        """Check the scope of the noise, and make batch normalization explicit where derivatives pass through it in forward mode."""
        self.config.names(model)
        if not self.uses_derivatives:
            return
        if is_synchronized(model):
            raise UserError(
                "rat_taylor: derivatives through synchronized batch statistics are not supported; set training.batch_norm: local"
            )
        if self.config.derivatives == "nested_jvp":
            make_batch_norm_explicit(model)

    def outer_passes(self) -> float:
        """Each batch: convolutions of values and derivatives with w (backward to maps and weights) and of maps with u (to maps only).

        First order: 2 with w and 1 with u, so 2 * 3 + 1 * 2; second order: 1 more with w and 1 more with u. `antithetic` takes whole
        passes at w, w + u and, for the second order, w - u.
        """
        if not self.uses_derivatives:
            return 6.0
        second = self.config.order == 2
        if self.config.derivatives == "antithetic":
            one = 9.0
        else:
            one = 13.0 if second else 8.0
        return 2 * one * self.config.num_noise_samples

    def attack_noise(self) -> WeightNoiseConfig | None:
        return self.config if self.config.attack_noise else None

    def outer_loss(
        self, model: nn.Module, x_BCHW: Tensor, adversarial_BCHW: Tensor, y_B: Tensor, context: StepContext
    ) -> Mapping[str, Tensor]:
        config = self.config
        if not self.uses_derivatives or config.order == 0:
            return self.zeroth_order(*logits_of_both(model, x_BCHW, adversarial_BCHW, context), y_B)
        first_terms, second_terms = [], []
        for sample in range(config.num_noise_samples):
            u = config.sample(model, context.streams.noise)
            clean, adversarial = (
                taylor_terms(
                    model,
                    images,
                    u,
                    order=config.order,
                    derivatives=config.derivatives,
                    update_statistics=model.training and sample == 0,
                )
                for images in (x_BCHW, adversarial_BCHW)
            )
            if sample == 0:
                terms = self.zeroth_order(clean.value_BK, adversarial.value_BK, y_B)
            first_terms.append(divergence(config.divergence, clean.first_BK, adversarial.first_BK).mean())
            if clean.second_BK is not None and adversarial.second_BK is not None:
                second_terms.append(divergence(config.divergence, clean.second_BK, adversarial.second_BK).mean())
        terms["taylor_first"] = torch.stack(first_terms).mean()
        terms["loss"] = terms["loss"] + config.eta * terms["taylor_first"]
        if second_terms:
            terms["taylor_second"] = torch.stack(second_terms).mean()
            terms["loss"] = terms["loss"] + config.eta / 2 * terms["taylor_second"]
        return terms


OBJECTIVES = (ObjectiveEntry("rat_taylor", "TRADES + first- and second-order Taylor terms of weight noise", TaylorConfig, Taylor),)
