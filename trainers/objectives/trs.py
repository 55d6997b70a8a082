"""TRS: cross-entropy, similarity of the members' input gradients, and smoothness of each member.

Shapes: B batch, N members. Reference: Yang et al., "TRS: Transferability Reduced Ensemble via Promoting Gradient Diversity and Model
Smoothness", Eq. 4 to 6.
Deviations: any N (the official code is written for 3). The search for large gradients follows the run's attack mode, and each of its
steps goes along that step's own slope; in the official code it moves running statistics, and as that code never clears the slope of the
step before, it climbs the sum of all slopes so far. Gradients of the mean loss are those of a batch of 128 images, its default,
whatever the batch is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from models.ensemble import ensemble_in
from models.layers.hypernetwork import generated_weights
from models.modes import mode
from models.randomness import resample
from models.threat_model import Norm, PixelFraction
from trainers.attacks import ball_around
from trainers.distributed import world
from trainers.ensembles.input_gradients import InputSet, of_batch_mean, pair_cosines
from trainers.ensembles.objective import RegularizedEnsembleObjective, RegularizedObjectiveConfig, RegularizedProblem
from trainers.ensembles.placement import collected_rows, dealt_rows, gather_batch
from trainers.objective import ObjectiveEntry
from trainers.step import StepContext


class TrsObjectiveConfig(RegularizedObjectiveConfig):
    """Parameters of TRS's loss.

    Weights and radii are those that its author states for CIFAR-10 in issue 1 of AI-secure/Transferability-Reduced-Smooth-Ensemble; the
    code itself holds those of MNIST (both weights 5 x 2, radius from 0.1 to 0.2).
    """

    fewest_members = 2
    name: Literal["trs"] = Field("trs", description="TRS.")
    similarity_weight: float = Field(40.0, ge=0, description="lambda_a; 40 on CIFAR-10 (the author), 10 on MNIST (the code).")
    smoothness_weight: float = Field(2.5, ge=0, description="lambda_b; 2.5 on CIFAR-10 (the author), 10 on MNIST (the code).")
    gradient_scale: Literal["batch_mean", "per_sample"] = Field(
        "batch_mean",
        description="Smoothness of the gradients of the mean loss of a batch of 128 (official code; smaller by 128 squared, whatever batch "
        "and number of workers), or of each example's loss.",
    )
    smooth_on: Literal["half_searched", "clean"] = Field(
        "half_searched",
        description="Images of the smoothness term: the second half of the batch moved to where gradients are large (official "
        "code), or the clean batch.",
    )
    initial_epsilon: PixelFraction | None = Field(
        0.01,
        ge=0,
        le=1,
        description="Radius of that search in the first epoch; 0.01 on CIFAR-10 (the author); none: a third of the final one.",
    )
    final_epsilon: PixelFraction | None = Field(
        0.03,
        ge=0,
        le=1,
        description="Radius after the last epoch, reached linearly; 0.03 on CIFAR-10 (the author); none: the threat model's.",
    )
    search_steps: int = Field(6, ge=0, le=1000, description="Steps of the search, each of a third of the radius.")

    @property
    def needs_whole_batch(self) -> bool:
        """The second half of the batch is searched for large gradients."""
        return self.smooth_on == "half_searched"

    @property
    def revision(self) -> int:
        """Weight of the similarity and radii were guesses, and `batch_mean` divided by the worker's batch."""
        return 1


def magnitude(gram_BNN: Tensor) -> Tensor:
    """Return the mean over members of 2 mean_b |g_b|^2, the official code's measure of smoothness."""
    return 2 * gram_BNN.diagonal(dim1=-2, dim2=-1).mean()


def search_epsilon(initial: float, final: float, epoch: int, num_epochs: int) -> float:
    """Return the radius in `epoch` (0-based): `initial` in the first, `final` after the last, linear between."""
    return initial + (final - initial) * epoch / num_epochs


def steepest_images(
    members: Sequence[nn.Module],
    x_BCHW: Tensor,
    y_B: Tensor,
    *,
    epsilon: float,
    norm: Norm,
    steps: int,
    generator: torch.Generator,
) -> Tensor:
    """Return images in the ball around x where the members' squared input gradients, summed over members, are large.

    Ascent from a random start with steps of epsilon / 3; one member's graph is alive at a time. With several workers all call this with
    the same images and a generator in the same state; each searches its share.
    """
    num_images = len(x_BCHW)
    searched_BCHW = dealt_rows(ball_around(x_BCHW, epsilon, norm).random_start(generator))
    x_BCHW, y_B = dealt_rows(x_BCHW), dealt_rows(y_B)
    ball = ball_around(x_BCHW, epsilon, norm)
    for _ in range(steps):
        ascent_BCHW = torch.zeros_like(searched_BCHW)
        for member in members:
            leaf_BCHW = searched_BCHW.clone().requires_grad_()
            with torch.enable_grad():
                (slope_BCHW,) = torch.autograd.grad(_squared_gradient(member, leaf_BCHW, y_B), leaf_BCHW)
            ascent_BCHW += slope_BCHW
        searched_BCHW = ball.ascend_(searched_BCHW, ascent_BCHW, epsilon / 3)
    return collected_rows(searched_BCHW.detach(), num_images)


def _squared_gradient(member: nn.Module, leaf_BCHW: Tensor, y_B: Tensor) -> Tensor:
    with torch.autocast(leaf_BCHW.device.type, enabled=False):
        loss = nn.functional.cross_entropy(member(leaf_BCHW), y_B, reduction="sum")
        (gradient_BCHW,) = torch.autograd.grad(loss, leaf_BCHW, create_graph=True)
    return gradient_BCHW.square().sum()


class Trs(RegularizedEnsembleObjective):
    """TRS's training step."""

    config: TrsObjectiveConfig

    def passes(self, attack_steps: int, num_members: int, epoch: int) -> float:
        """The gradient of a squared input gradient, taken for half of the images in each step of the search, costs 5."""
        searching = self.config.smooth_on == "half_searched"
        return num_members * ((2 if searching else 1) * self.set_passes(regularized=True) + 2.5 * self.config.search_steps * searching)

    def problem(self, model: nn.Module, x_BCHW: Tensor, y_B: Tensor, context: StepContext) -> RegularizedProblem:
        resample(model)
        sets = {"clean": InputSet(x_BCHW, 1.0, regularized=True)}
        if self.config.smooth_on == "half_searched":
            smooth_BCHW = self._half_searched(model, x_BCHW, y_B, context)
            sets["smooth"] = InputSet(smooth_BCHW, 0.0, regularized=True)
        return RegularizedProblem(sets, y_B, self._regularization)

    def _half_searched(self, model: nn.Module, x_BCHW: Tensor, y_B: Tensor, context: StepContext) -> Tensor:
        config = self.config
        final = context.threat_model.epsilon if config.final_epsilon is None else config.final_epsilon
        initial = final / 3 if config.initial_epsilon is None else config.initial_epsilon
        rank, _ = world()
        whole_BCHW, labels_B = gather_batch(x_BCHW, y_B)
        half = len(whole_BCHW) // 2
        with mode(model, context.attack.mode), generated_weights(model, detach=True):
            searched_BCHW = steepest_images(
                list(ensemble_in(model).members),
                whole_BCHW[half:],
                labels_B[half:],
                epsilon=search_epsilon(initial, final, context.epoch, context.num_epochs),
                norm=context.threat_model.norm,
                steps=config.search_steps,
                generator=context.streams.attack,
            )
        return torch.cat([whole_BCHW[:half], searched_BCHW])[rank * len(x_BCHW) : (rank + 1) * len(x_BCHW)]

    def _regularization(self, grams: Mapping[str, Tensor]) -> dict[str, Tensor]:
        config = self.config
        clean_BNN = grams["clean"]
        cosines_BP = pair_cosines(clean_BNN)
        similarity = cosines_BP.abs().mean() if cosines_BP.shape[1] else clean_BNN.sum() * 0
        smooth_BNN = grams.get("smooth", clean_BNN)
        if config.gradient_scale == "batch_mean":
            smooth_BNN = of_batch_mean(smooth_BNN)
        smoothness = magnitude(smooth_BNN)
        return {
            "regularization": config.similarity_weight * similarity + config.smoothness_weight * smoothness,
            "similarity": similarity,
            "smoothness": smoothness,
        }


OBJECTIVES = (
    ObjectiveEntry("trs", "cross-entropy, gradient similarity and smoothness of an ensemble", TrsObjectiveConfig, Trs, selection="last"),
)
