"""What the TRADES family shares: the divergence between logits, the attack that maximizes it, the zeroth-order loss.

Shapes: B batch, K classes. Divergences are in nats (`mse`: in squared logits).

Reference: Zhang et al., "Theoretically Principled Trade-off between Robustness and Accuracy", ICML 2019, Eq. 5 and Algorithm 1.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from models.randomness import random_sites
from trainers.attacks import AttackLoss
from trainers.hardware import at_least_fp32
from trainers.labels import most_probable
from trainers.step import StepContext
from trainers.weight_noise import WeightNoiseConfig, perturbed
from trainers.weight_perturbation import PerturbableConfig, PerturbableObjective

DivergenceName = Literal["kl", "ce", "mse"]

START_DEVIATION = 0.001
"""Standard deviation of the Gaussian start of the inner attack, in pixels of [0,1]."""


def divergence(name: DivergenceName, clean_BK: Tensor, other_BK: Tensor) -> Tensor:
    """Return the divergence of each example, (B,); gradients flow through both arguments.

    Args:
        name: `kl`: KL(softmax(clean) || softmax(other)); `ce`: the same without the entropy of the clean side; `mse`: squared distance,
            summed over classes.
        clean_BK, other_BK: logits, or derivatives of logits, which enter as if they were logits.
    """
    if name == "mse":
        return (clean_BK - other_BK).square().sum(1)
    log_clean_BK, log_other_BK = functional.log_softmax(clean_BK, 1), functional.log_softmax(other_BK, 1)
    clean_probability_BK = log_clean_BK.exp()
    if name == "ce":
        return -(clean_probability_BK * log_other_BK).sum(1)
    return (clean_probability_BK * (log_clean_BK - log_other_BK)).sum(1)


def divergence_from_clean(model: nn.Module, x_BCHW: Tensor, name: DivergenceName = "kl") -> AttackLoss:
    """Return an attack loss: the divergence of the attacked logits from those of the clean images under the same draw.

    The clean logits are computed without graph at the first call, when the attack has put the model into its mode, draw and arithmetic,
    and again whenever the model holds another draw than before: divergences between two draws would be climbed otherwise.
    """
    clean_BK: Tensor | None = None
    draw: list[int] = []

    def loss(logits_BK: Tensor, _labels_B: Tensor) -> Tensor:
        nonlocal clean_BK, draw
        held = [site.draw_key for _, site in random_sites(model)]
        if clean_BK is None or held != draw:
            draw = held
            with torch.no_grad():
                clean_BK = at_least_fp32(model(x_BCHW))
        return divergence(name, clean_BK, logits_BK)

    return loss


class TradesFamilyConfig(PerturbableConfig):
    """Fields that all objectives of the family have."""

    beta: float = Field(6.0, ge=0, description="Weight of the divergence: beta of TRADES, 1/lambda of the Taylor paper.")


class TradesFamily(PerturbableObjective):
    """An objective that attacks by divergence from the clean logits and starts from CE(clean) + beta divergence(clean, adversarial)."""

    config: TradesFamilyConfig
    divergence_name: DivergenceName = "kl"
    ascent_passes = 6.0

    def outer_passes(self) -> float:
        """Two cross-entropies' worth: clean and adversarial images."""
        return 6.0

    def attack_passes(self, attack_steps: int) -> float:
        """One pass more than that of cross-entropy: the clean logits."""
        return 2.0 * attack_steps + 1 if attack_steps else 0.0

    def attack_noise(self) -> WeightNoiseConfig | None:
        """Return the noise on the weights that are attacked, or None for the weights themselves."""
        return None

    def attack(self, model: nn.Module, x_BCHW: Tensor, y_B: Tensor, context: StepContext) -> Tensor:
        """Return examples that maximize the divergence from the clean logits, at w or at w + u with one u per batch."""
        noise = self.attack_noise()
        place: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if noise is not None and noise.sigma > 0:
            place = perturbed(model, noise.sample(model, context.streams.noise))
        with place:
            return context.adversarial_examples(
                model,
                x_BCHW,
                y_B,
                loss=divergence_from_clean(model, x_BCHW, self.divergence_name),
                gaussian_start=START_DEVIATION,
            )

    def ascent_loss(self, model: nn.Module, x_BCHW: Tensor, adversarial_BCHW: Tensor, y_B: Tensor, context: StepContext) -> Tensor:
        """Return the zeroth-order loss: AWP ascends on it whatever the objective adds."""
        return self.zeroth_order(*logits_of_both(model, x_BCHW, adversarial_BCHW, context), y_B)["loss"]

    def zeroth_order(self, clean_BK: Tensor, adversarial_BK: Tensor, y_B: Tensor) -> dict[str, Tensor]:
        """Return TRADES' loss of two batches of logits, its two parts, and accuracies in [0,1]."""
        cross_entropy = functional.cross_entropy(clean_BK, y_B)
        mean_divergence = divergence(self.divergence_name, clean_BK, adversarial_BK).mean()
        return {
            "loss": cross_entropy + self.config.beta * mean_divergence,
            "cross_entropy": cross_entropy,
            "divergence": mean_divergence,
            **accuracies(clean_BK, adversarial_BK, y_B),
        }


def logits_of_both(model: nn.Module, x_BCHW: Tensor, adversarial_BCHW: Tensor, context: StepContext) -> tuple[Tensor, Tensor]:
    """Return the logits of clean and adversarial images: two passes, each with batch statistics of its own."""
    with context.precision.autocast():
        clean_BK, adversarial_BK = model(x_BCHW), model(adversarial_BCHW)
    return at_least_fp32(clean_BK), at_least_fp32(adversarial_BK)


def accuracies(clean_BK: Tensor, adversarial_BK: Tensor, y_B: Tensor) -> Mapping[str, Tensor]:
    """Return clean_accuracy and robust_accuracy of a batch, in [0,1]."""
    pairs = {"clean_accuracy": clean_BK, "robust_accuracy": adversarial_BK}
    return {name: (logits.detach().argmax(1) == most_probable(y_B)).float().mean() for name, logits in pairs.items()}
