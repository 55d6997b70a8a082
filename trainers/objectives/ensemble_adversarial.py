"""Training of every member on adversarial examples: N times adversarial training, or adversarial training of the ensemble.

With `training.attack.steps: 0` it is natural training of N members.
Reference: the ensembles with adversarial training of Yang et al., "DVERGE", section 4.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from models.ensemble import ensemble_in
from models.layers.hypernetwork import generated_weights
from trainers.ensembles.examples import EnsembleExample, ensemble_examples, example_passes
from trainers.ensembles.objective import EnsembleObjective, EnsembleObjectiveConfig, member_cross_entropy
from trainers.objective import ObjectiveEntry
from trainers.step import StepContext


class EnsembleAdversarialConfig(EnsembleObjectiveConfig):
    """Parameters of adversarial training of an ensemble."""

    name: Literal["ensemble_adversarial"] = Field("ensemble_adversarial", description="Adversarial training.")
    example: Literal["own"] | EnsembleExample = Field(
        "own",
        description="Each member on examples against itself (`own`: N independent adversarial trainings), or all on one example against "
        "the ensemble: `random_member_per_step`, `random_member`, `mean_loss`, `mean_prob` (DVERGE's repository). Not measured.",
    )


class EnsembleAdversarial(EnsembleObjective):
    """The sum of the members' cross-entropies on adversarial examples."""

    config: EnsembleAdversarialConfig

    def passes(self, attack_steps: int, num_members: int, epoch: int) -> float:
        example = self.config.example
        attack = 2.0 * attack_steps * num_members if example == "own" else example_passes(attack_steps, num_members, example)
        return attack + 3.0 * num_members

    def training_step(self, model: nn.Module, x_BCHW: Tensor, y_B: Tensor, context: StepContext) -> dict[str, Tensor]:
        total = torch.zeros((), device=x_BCHW.device, dtype=torch.promote_types(x_BCHW.dtype, torch.float32))
        for member, images_BCHW in self._passes(model, x_BCHW, y_B, context):
            loss = member_cross_entropy(member, images_BCHW, y_B, context)
            loss.backward()
            total += loss.detach()
        return {"loss": total}

    def _passes(self, model: nn.Module, x_BCHW: Tensor, y_B: Tensor, context: StepContext) -> Iterator[tuple[nn.Module, Tensor]]:
        """Yield each member with the images that it is trained on."""
        members = ensemble_in(model).members
        if self.config.example != "own":
            images_BCHW = ensemble_examples(model, x_BCHW, y_B, context, self.config.example)
            for member in members:
                yield member, images_BCHW
            return
        for member in members:
            with generated_weights(member, detach=True):
                images_BCHW = context.adversarial_examples(member, x_BCHW, y_B)
            yield member, images_BCHW


OBJECTIVES = (
    ObjectiveEntry(
        "ensemble_adversarial",
        "every member on adversarial examples of its own or of the ensemble",
        EnsembleAdversarialConfig,
        EnsembleAdversarial,
    ),
)
