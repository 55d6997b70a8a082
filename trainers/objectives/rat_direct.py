"""One-sample weight noise: the control of `rat_taylor`, which minimizes the expectation itself instead of its Taylor terms.

Reference: Jin et al., "Randomized Adversarial Training via Taylor Expansion", CVPR 2023, Eq. 5 (cross-entropy at w) and Eq. 2 (at w + u).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from models.modes import AttackMode, mode
from trainers.hardware import at_least_fp32
from trainers.objective import ObjectiveEntry
from trainers.step import StepContext
from trainers.trades_terms import DivergenceName, TradesFamily, TradesFamilyConfig, accuracies, divergence
from trainers.weight_noise import WeightNoiseConfig


class DirectConfig(TradesFamilyConfig, WeightNoiseConfig):
    """Parameters of `rat_direct`."""

    name: Literal["rat_direct"] = Field("rat_direct", description="TRADES at noisy weights.")
    divergence: DivergenceName = Field(
        "kl", description="D: `kl` (what the paper calls it), `ce` (KL without entropy), `mse`; not measured."
    )
    cross_entropy_at: Literal["weights", "noisy_weights"] = Field(
        "weights", description="`weights`: CE(f_w(s), y) as in Eq. 5, one pass more; `noisy_weights`: as in Eq. 2, the cost of TRADES."
    )
    num_noise_samples: int = Field(1, ge=1, le=64, description="Samples of u per step over which E_u is averaged.")
    attack_noise: bool = Field(
        True, description="Attack w + u with one u per batch, another than that of the loss, instead of w (Algorithm 1)."
    )


class Direct(TradesFamily):
    """CE(f_w(s), y) + beta E_u D(f_(w+u)(s), f_(w+u)(s')), by plain backpropagation.

    Running statistics take in each of the two batches once per step: the clean one where cross-entropy is computed, the adversarial one at
    the first w + u.
    """

    config: DirectConfig

    def __init__(self, config: DirectConfig) -> None:
        super().__init__(config)
        self.divergence_name = config.divergence

    def prepare(self, model: nn.Module) -> None:
        """Check the scope of the noise."""
        self.config.names(model)

    def outer_passes(self) -> float:
        """Cross-entropy at w, if it is taken there, and both batches at each w + u."""
        return (3.0 if self.config.cross_entropy_at == "weights" else 0.0) + 6.0 * self.config.num_noise_samples

    def attack_noise(self) -> WeightNoiseConfig | None:
        return self.config if self.config.attack_noise else None

    def outer_loss(
        self, model: nn.Module, x_BCHW: Tensor, adversarial_BCHW: Tensor, y_B: Tensor, context: StepContext
    ) -> Mapping[str, Tensor]:
        config = self.config
        at_weights = config.cross_entropy_at == "weights"
        parameters = dict(model.named_parameters())

        def logits(images: Tensor, u: dict[str, Tensor] | None, update: bool) -> Tensor:
            moved = {} if u is None else {name: parameters[name] + value for name, value in u.items()}
            quiet: AttackMode = "train_without_update" if model.training else "eval"
            with context.precision.autocast():
                if update:
                    return at_least_fp32(functional_call(model, moved, (images,)))
                with mode(model, quiet):
                    return at_least_fp32(functional_call(model, moved, (images,)))

        cross_entropies, divergences, pairs = [], [], []
        if at_weights:
            unperturbed_BK = logits(x_BCHW, None, True)
            cross_entropies.append(functional.cross_entropy(unperturbed_BK, y_B))
        for sample in range(config.num_noise_samples):
            u = config.sample(model, context.streams.noise)
            clean_BK = logits(x_BCHW, u, sample == 0 and not at_weights)
            adversarial_BK = logits(adversarial_BCHW, u, sample == 0)
            if not at_weights:
                cross_entropies.append(functional.cross_entropy(clean_BK, y_B))
            divergences.append(divergence(config.divergence, clean_BK, adversarial_BK).mean())
            pairs.append((clean_BK, adversarial_BK))
        cross_entropy = sum(cross_entropies[1:], start=cross_entropies[0]) / len(cross_entropies)
        mean_divergence = sum(divergences[1:], start=divergences[0]) / len(divergences)
        return {
            "loss": cross_entropy + config.beta * mean_divergence,
            "cross_entropy": cross_entropy,
            "divergence": mean_divergence,
            **accuracies(unperturbed_BK if at_weights else pairs[0][0], pairs[0][1], y_B),
        }


OBJECTIVES = (ObjectiveEntry("rat_direct", "TRADES at one sample of noisy weights (no Taylor expansion)", DirectConfig, Direct),)
