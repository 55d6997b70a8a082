"""GAL: cross-entropy and the gradient alignment loss, which spreads the members' input gradients.

Shapes: B batch, N members. Reference: Kariyappa and Qureshi, "Improving Adversarial Robustness of Ensembles with Diversity Training",
Eq. 7, 8.
Deviation: one forward pass serves cross-entropy and gradient; the published re-implementation makes two, which moves running
statistics twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from models.ensemble import ensemble_in
from models.randomness import resample
from trainers.attacks.balls import WHOLE, Shard, sharded_noise
from trainers.ensembles.input_gradients import InputSet, pair_cosines
from trainers.ensembles.objective import RegularizedEnsembleObjective, RegularizedObjectiveConfig, RegularizedProblem
from trainers.objective import ObjectiveEntry
from trainers.step import StepContext


class GalObjectiveConfig(RegularizedObjectiveConfig):
    """Parameters of GAL's loss."""

    fewest_members = 2
    name: Literal["gal"] = Field("gal", description="GAL.")
    alignment_weight: float = Field(
        0.5, ge=0, description="lambda, weight of the alignment loss; 0.5 in DVERGE's and TRS's codes (GAL has none)."
    )
    cross_entropy: Literal["mean", "sum"] = Field(
        "mean",
        description="Mean of the members' cross-entropies (paper, DVERGE's re-implementation) or their sum (TRS's).",
    )
    noise_std: float = Field(
        0.045, ge=0, le=1, description="Standard deviation of Gaussian noise on training images; 0.045 in DVERGE's code."
    )
    noise_probability: float = Field(0.5, ge=0, le=1, description="Probability that an image gets that noise; 0.5 in DVERGE's code.")


def gradient_alignment_loss(gram_BNN: Tensor) -> Tensor:
    """Return the mean over examples of log sum over pairs of exp(cosine), signed; 1 + log C(N,2) for equal members, 0 for one member."""
    cosines_BP = pair_cosines(gram_BNN)
    if cosines_BP.shape[1] == 0:
        return gram_BNN.sum() * 0
    return cosines_BP.logsumexp(dim=1).mean()


class Gal(RegularizedEnsembleObjective):
    """GAL's training step."""

    config: GalObjectiveConfig

    def passes(self, attack_steps: int, num_members: int, epoch: int) -> float:
        return num_members * self.set_passes(regularized=True)

    def problem(self, model: nn.Module, x_BCHW: Tensor, y_B: Tensor, context: StepContext) -> RegularizedProblem:
        resample(model)
        num_members = ensemble_in(model).num_members
        weight = 1 / num_members if self.config.cross_entropy == "mean" else 1.0
        noisy_BCHW = self.noisy(x_BCHW, context.streams.noise, context.shard)
        return RegularizedProblem({"clean": InputSet(noisy_BCHW, weight, regularized=True)}, y_B, self._regularization)

    def noisy(self, x_BCHW: Tensor, generator: torch.Generator, shard: Shard = WHOLE) -> Tensor:
        """Return the images with noise on some of them; `shard` as for attacks: the noise of an image does not depend on the workers."""
        if self.config.noise_std == 0 or self.config.noise_probability == 0:
            return x_BCHW
        uniform_B111 = sharded_noise(x_BCHW, generator, shard, lambda whole: whole.uniform_(generator=generator), per_example=True)
        noise_BCHW = sharded_noise(x_BCHW, generator, shard, lambda whole: whole.normal_(generator=generator))
        return x_BCHW + self.config.noise_std * noise_BCHW * (uniform_B111 < self.config.noise_probability)

    def _regularization(self, grams: Mapping[str, Tensor]) -> dict[str, Tensor]:
        alignment = gradient_alignment_loss(grams["clean"])
        return {"regularization": self.config.alignment_weight * alignment, "alignment": alignment}


OBJECTIVES = (ObjectiveEntry("gal", "cross-entropy and gradient alignment loss of an ensemble", GalObjectiveConfig, Gal, selection="last"),)
