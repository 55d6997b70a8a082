"""RED's training: cross-entropy of every member, a Lipschitz regularizer of each and a similarity regularizer of all pairs.

Shapes: B batch, N members. Reference: RED, "Efficiently Boosting Ensemble Robustness via Random Sampling Inference", Eq. 3, 4, 11 to 13.
Deviation: the minus sign printed in Eq. 4 would reward similarity, against Eq. 3 and the text; it is a plus here. How the adversarial
example of Eq. 4 is made is not in the text; it is one example per image for all members, from an attack on the random ensemble (`example`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from models.ensemble import ensemble_in
from models.errors import UserError
from models.layers.channel_statistics import is_synchronized
from models.randomness import resample
from trainers.distributed import world
from trainers.ensembles.examples import EnsembleExample, ensemble_examples, example_passes
from trainers.ensembles.input_gradients import InputSet, gradient_lengths, of_batch_mean, pair_cosines
from trainers.ensembles.objective import RegularizedEnsembleObjective, RegularizedObjectiveConfig, RegularizedProblem
from trainers.ensembles.placement import LocalMembers, MemberPlacement, SpreadMembers, gather_batch
from trainers.objective import ObjectiveEntry
from trainers.step import StepContext

Where = Literal["clean", "adv", "both"]


class RedObjectiveConfig(RegularizedObjectiveConfig):
    """Parameters of RED's loss. "adv. training" of the paper's Table 3 is `ce_on: adv`."""

    name: Literal["red"] = Field("red", description="RED.")
    lambda_a: float = Field(10.0, ge=0, description="Weight of the Lipschitz regularizer; 10 in the paper.")
    lambda_b: float = Field(10.0, ge=0, description="Weight of the gradient similarity regularizer; 10 in the paper.")
    warmup_epochs: float = Field(
        5.0,
        ge=0,
        le=100_000,
        description="Both weights rise linearly from 0 during this many epochs, as double backward spikes early on; not measured.",
    )
    example: EnsembleExample = Field(
        "random_member_per_step",
        description="What the attack climbs: the random ensemble (`random_member_per_step`), one member per batch (`random_member`), "
        "the mean loss of all members (`mean_loss`, N times dearer), the mean probability (`mean_prob`). Not in the paper's "
        "text, not measured.",
    )
    pair_norm: Literal["ordered", "unordered"] = Field(
        "ordered",
        description="`ordered`: each pair counts twice, as in Eq. 3 (at most 2); `unordered`: once (at most 1).",
    )
    grad_scale: Literal["per_sample", "batch_mean"] = Field(
        "batch_mean",
        description="Input gradients of the mean loss of a batch of 128, whatever batch and number of workers (lambda_a then acts as "
        "lambda_a / 128), or of each example's loss. Measured: at 10 the latter learns to answer one class (docs/ensembles.md).",
    )
    lip_power: Literal[1, 2] = Field(
        1, description="Power of the gradient's length in the Lipschitz regularizer: 1 in Eq. 12; 2 not measured."
    )
    sim_on: Where = Field("both", description="Images of the similarity regularizer; `both` takes the mean, as Eq. 4 does.")
    lip_on: Where = Field("both", description="Images of the Lipschitz regularizer; `both` takes the mean, as Eq. 12 does.")
    ce_on: Where = Field("clean", description="Images of the cross-entropy; `adv` is the paper's adversarial training.")
    members: Literal["replicated", "spread"] = Field(
        "replicated",
        description="With several workers: each has all members and a part of the batch (`replicated`), or some of the members and the "
        "whole batch (`spread`; workers exchange input gradients). The same numbers.",
    )

    @property
    def revision(self) -> int:
        """Gradients were each example's by default, and `batch_mean` divided by the worker's batch."""
        return 1

    @model_validator(mode="after")
    def _spread_members_are_cached(self) -> RedObjectiveConfig:
        if self.members == "spread" and self.computation == "joint":
            raise ValueError("members `spread` needs computation `cached`: no worker has the graphs of all members")
        return self


def similarity_regularizer(gram_BNN: Tensor, pair_norm: Literal["ordered", "unordered"] = "ordered") -> Tensor:
    """Return R_sim, the mean over examples of the mean absolute cosine of all pairs: in [0,2] ordered, [0,1] unordered; 0 for one member.

    Reference: RED, Eq. 3 (its double sum visits each pair twice).
    """
    cosines_BP = pair_cosines(gram_BNN)
    if cosines_BP.shape[1] == 0:
        return gram_BNN.sum() * 0
    mean = cosines_BP.abs().mean()
    return 2 * mean if pair_norm == "ordered" else mean


def lipschitz_regularizer(gram_BNN: Tensor, power: Literal[1, 2] = 1) -> Tensor:
    """Return R_Lip on one set of images, the mean over examples and members of the gradient's length to a power. Reference: RED, Eq. 12."""
    if power == 2:
        return gram_BNN.diagonal(dim1=-2, dim2=-1).mean()
    return gradient_lengths(gram_BNN).mean()


class Red(RegularizedEnsembleObjective):
    """RED's training step."""

    config: RedObjectiveConfig

    def prepare(self, model: nn.Module) -> None:
        """Raise a `UserError` unless `model` is an ensemble whose batch statistics fit the placement of its members."""
        super().prepare(model)
        if self.config.members == "spread" and is_synchronized(model):
            raise UserError(
                "members `spread` gives each worker the whole batch, so its statistics are those of all workers already: "
                "set training.batch_norm: local"
            )

    def passes(self, attack_steps: int, num_members: int, epoch: int) -> float:
        attack = example_passes(attack_steps, num_members, self.config.example) if self._needs("adv") else 0.0
        sets = [self.set_passes(self._regularizes(name)) for name in ("clean", "adv") if self._needs(name)]
        return attack + num_members * sum(sets)

    def problem(self, model: nn.Module, x_BCHW: Tensor, y_B: Tensor, context: StepContext) -> RegularizedProblem:
        num_members = ensemble_in(model).num_members
        adversarial_BCHW = x_BCHW
        if self._needs("adv"):
            adversarial_BCHW = ensemble_examples(model, x_BCHW, y_B, context, self.config.example)
        else:
            resample(model)
        placement: MemberPlacement = LocalMembers(num_members)
        if self.config.members == "spread" and world()[1] > 1:
            placement = SpreadMembers(num_members)
            x_BCHW, y_B, adversarial_BCHW = gather_batch(x_BCHW, y_B, adversarial_BCHW)
        warmup = self._warmup(context)
        return RegularizedProblem(
            sets=self._sets(x_BCHW, adversarial_BCHW, num_members),
            y_B=y_B,
            regularizer=lambda grams: self._regularization(grams, warmup),
            placement=placement,
        )

    def is_settled(self, context: StepContext) -> bool:
        return self._warmup(context) == 1.0

    def _needs(self, where: str) -> bool:
        config = self.config
        return any(option in (where, "both") for option in (config.ce_on, config.sim_on, config.lip_on))

    def _regularizes(self, name: str) -> bool:
        return any(option in (name, "both") for option in (self.config.sim_on, self.config.lip_on))

    def _sets(self, x_BCHW: Tensor, adversarial_BCHW: Tensor, num_members: int) -> dict[str, InputSet]:
        config = self.config
        weights = {"clean": (1.0, 0.0), "adv": (0.0, 1.0), "both": (0.5, 0.5)}[config.ce_on]
        images = {"clean": x_BCHW, "adv": adversarial_BCHW}
        return {
            name: InputSet(
                images[name],
                weight / num_members,
                regularized=self._regularizes(name),
            )
            for name, weight in zip(images, weights, strict=True)
            if self._needs(name)
        }

    def _warmup(self, context: StepContext) -> float:
        steps = self.config.warmup_epochs * context.steps_per_epoch
        return min(1.0, (context.step + 1) / steps) if steps > 0 else 1.0

    def _regularization(self, grams: Mapping[str, Tensor], warmup: float) -> dict[str, Tensor]:
        config = self.config
        if config.grad_scale == "batch_mean":
            grams = {name: of_batch_mean(gram_BNN) for name, gram_BNN in grams.items()}
        similarity = _mean_over(grams, config.sim_on, lambda gram: similarity_regularizer(gram, config.pair_norm))
        lipschitz = _mean_over(grams, config.lip_on, lambda gram: lipschitz_regularizer(gram, config.lip_power))
        return {
            "regularization": warmup * (config.lambda_a * lipschitz + config.lambda_b * similarity),
            "lipschitz": lipschitz,
            "similarity": similarity,
        }


def _mean_over(grams: Mapping[str, Tensor], where: Where, function: object) -> Tensor:
    assert callable(function)
    chosen = grams if where == "both" else {where: grams[where]}
    return torch.stack([function(gram_BNN) for gram_BNN in chosen.values()]).mean()


OBJECTIVES = (ObjectiveEntry("red", "cross-entropy with gradient similarity and Lipschitz regularizers", RedObjectiveConfig, Red),)
