"""DVERGE: each member learns to classify the examples that distil the other members' features.

Shapes: B batch, N members. Reference: Yang et al., "DVERGE: Diversifying Vulnerabilities for Enhanced Robust Generation of Ensembles",
Algorithm 1.
Deviations: the target images are the batch in another order instead of a second pass over the data; one optimizer has all members'
parameters (their gradients are separate).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from models.ensemble import Ensemble, ensemble_in
from models.errors import UserError
from models.layers.hypernetwork import generated_weights
from models.modes import mode
from models.randomness import derive_seed, resample
from models.threat_model import PixelFraction
from models.weights import load_pretrained
from trainers.distributed import world
from trainers.ensembles.distilled_features import distilled_examples, feature_layers
from trainers.ensembles.objective import EnsembleObjective, EnsembleObjectiveConfig, member_cross_entropy
from trainers.ensembles.placement import gather_batch
from trainers.objective import ObjectiveEntry
from trainers.step import StepContext


class DvergeObjectiveConfig(EnsembleObjectiveConfig):
    """Parameters of DVERGE."""

    fewest_members = 2
    name: Literal["dverge"] = Field("dverge", description="DVERGE.")
    epsilon: PixelFraction = Field(
        0.07,
        ge=0,
        le=1,
        description="Radius of the distillation; 0.07 for three members (its code). The 0.05 that recipes of eight members have is a "
        "guess: no source at hand gives a value for them.",
    )
    steps: int = Field(10, ge=1, le=1000, description="Steps of the distillation, each of a tenth of the radius.")
    momentum: float = Field(1.0, ge=0, le=10, description="Momentum of the distillation.")
    layer: int | None = Field(
        None, ge=1, le=1000, description="Feature layer to distil, 1 for the stem's; none: drawn uniformly for each epoch."
    )
    pretrained: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        (),
        max_length=64,
        description="Folders of trained members to begin with: one folder of an ensemble, or one folder per member. The paper begins with "
        "a trained ensemble.",
    )
    pretraining_epochs: int = Field(
        0, ge=0, le=100_000, description="Train the members on clean images for this many epochs first, in this run."
    )
    adversarial_training: bool = Field(False, description="Add each member's cross-entropy on PGD examples of its own; the paper has both.")
    distillation_weight: float = Field(1.0, ge=0, description="Weight of the distilled examples' loss beside adversarial training.")

    @property
    def needs_whole_batch(self) -> bool:
        """Each image is distilled from another one of the batch."""
        return True


class Dverge(EnsembleObjective):
    """DVERGE's training step."""

    config: DvergeObjectiveConfig

    def prepare(self, model: nn.Module) -> None:
        """Load the trained members.

        Raises:
            UserError: no ensemble of at least two members, no such feature layer, or trained members that do not fit.
        """
        super().prepare(model)
        ensemble = ensemble_in(model)
        if ensemble.num_members < 2:
            raise UserError("DVERGE trains each member on the others' features: num_members must be at least 2")
        layers = feature_layers(ensemble.members[0])
        if self.config.layer is not None and self.config.layer > len(layers):
            raise UserError(f"layer {self.config.layer} does not exist: the members have {len(layers)} feature layers")
        if self.config.pretrained:
            load_members(ensemble, self.config.pretrained)
        elif not self.config.pretraining_epochs:
            warnings.warn("DVERGE begins with a trained ensemble; set `pretrained` or `pretraining_epochs` to do so", stacklevel=2)

    def passes(self, attack_steps: int, num_members: int, epoch: int) -> float:
        """A member is trained on the others' examples; their distillation passes through half of a network, on average of layers."""
        if epoch < self.config.pretraining_epochs:
            return 3.0 * num_members
        own = 2.0 * attack_steps + 3.0 if self.config.adversarial_training else 0.0
        return num_members * (3.0 * (num_members - 1) + self.config.steps + own)

    def training_step(self, model: nn.Module, x_BCHW: Tensor, y_B: Tensor, context: StepContext) -> dict[str, Tensor]:
        total = torch.zeros((), device=x_BCHW.device, dtype=torch.promote_types(x_BCHW.dtype, torch.float32))
        with generated_weights(model):
            for member, images_BCHW, weight in self._passes(model, x_BCHW, y_B, context):
                loss = weight * member_cross_entropy(member, images_BCHW, y_B, context)
                loss.backward()
                total += loss.detach()
        return {"loss": total}

    def _passes(self, model: nn.Module, x_BCHW: Tensor, y_B: Tensor, context: StepContext) -> list[tuple[nn.Module, Tensor, float]]:
        """Return what is trained: (member, images, weight). Member i never gets the examples distilled from itself."""
        members = ensemble_in(model).members
        resample(model)
        if context.epoch < self.config.pretraining_epochs:
            return [(member, x_BCHW, 1.0) for member in members]
        distilled = self.distil(model, x_BCHW, context)
        weight = self.config.distillation_weight if self.config.adversarial_training else 1.0
        passes = []
        for index, member in enumerate(members):
            passes += [(member, images, weight) for other, images in enumerate(distilled) if other != index]
            if self.config.adversarial_training:
                with generated_weights(model, detach=True):
                    passes.append((member, context.adversarial_examples(member, x_BCHW, y_B), 1.0))
        return passes

    def distil(self, model: nn.Module, x_BCHW: Tensor, context: StepContext) -> list[Tensor]:
        """Return one batch of distilled examples per member, (B, C, H, W) each."""
        targets_BCHW = self._targets(x_BCHW, context)
        members = ensemble_in(model).members
        layer = self.layer_of_epoch(members[0], context)
        with mode(model, context.attack.mode), generated_weights(model, detach=True), context.precision.autocast():
            return [
                distilled_examples(
                    member,
                    x_BCHW,
                    targets_BCHW,
                    layer,
                    epsilon=self.config.epsilon,
                    steps=self.config.steps,
                    momentum=self.config.momentum,
                )
                for member in members
            ]

    def _targets(self, x_BCHW: Tensor, context: StepContext) -> Tensor:
        """Return the batch in another order: that of all workers together, of which each takes its rows."""
        noise = context.streams.noise
        rank, _ = world()
        (whole_BCHW,) = gather_batch(x_BCHW)
        order_B = torch.randperm(len(whole_BCHW), generator=noise, device=noise.device).to(x_BCHW.device)
        return whole_BCHW[order_B[rank * len(x_BCHW) : (rank + 1) * len(x_BCHW)]]

    def layer_of_epoch(self, member: nn.Module, context: StepContext) -> str:
        """Return the name of the feature layer that this epoch distils: the same on every worker and after a resume."""
        layers = feature_layers(member)
        if self.config.layer is not None:
            return layers[self.config.layer - 1]
        return layers[derive_seed(context.streams.seed, "distilled layer", context.epoch) % len(layers)]


def load_members(ensemble: Ensemble, folders: Sequence[str]) -> None:
    """Load trained weights into the members: from one folder of an ensemble of as many members, or from one folder per member.

    Raises:
        UserError: the number or the structure of the saved networks does not fit.
    """
    models = [load_pretrained(folder, resample_on_forward=False) for folder in folders]
    sources: list[nn.Module] = models
    if len(models) == 1 and isinstance(models[0], Ensemble):
        sources = list(models[0].members)
    if len(sources) != ensemble.num_members:
        raise UserError(f"`pretrained` has {len(sources)} trained networks, the ensemble {ensemble.num_members} members")
    for index, (member, source) in enumerate(zip(ensemble.members, sources, strict=True)):
        try:
            member.load_state_dict(source.state_dict())
        except RuntimeError as error:
            raise UserError(f"the trained network {index} does not fit member {index}: {error}") from None


OBJECTIVES = (
    ObjectiveEntry("dverge", "each member learns the others' distilled features", DvergeObjectiveConfig, Dverge, selection="last"),
)
