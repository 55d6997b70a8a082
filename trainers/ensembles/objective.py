"""What the objectives of ensembles share: the check of the model, and the two ways to train with coupled input gradients."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from models.configuration import Config
from models.ensemble import EnsembleConfig, ensemble_in, num_members_of
from models.layers.hypernetwork import generated_weights
from trainers.ensembles.input_gradients import Computation, InputSet, Regularizer, regularized_backward, regularized_loss
from trainers.ensembles.placement import LocalMembers, MemberPlacement
from trainers.hardware import at_least_fp32
from trainers.objective import Objective, ObjectiveConfig, backward
from trainers.step import StepContext


class EnsembleObjectiveConfig(ObjectiveConfig):
    """Base of the parameters of objectives that train an ensemble; `fewest_members`: 2 where the loss is one of pairs alone."""

    fewest_members: ClassVar[int] = 1

    def problem_with(self, defence: Config, num_classes: int) -> str | None:
        """What is no ensemble has no members to train, and one member has no other to differ from."""
        if not isinstance(defence, EnsembleConfig):
            return f"training.objective {self.name} trains an ensemble; defences red, ps_red, gal, adp, dverge and trs are"
        if num_members_of(defence) < self.fewest_members:
            return (
                f"training.objective {self.name}: defence.num_members is {num_members_of(defence)}; its loss compares members, "
                f"at least {self.fewest_members}"
            )
        return None


class RegularizedObjectiveConfig(EnsembleObjectiveConfig):
    """Parameters of objectives that regularize input gradients."""

    computation: Computation = Field(
        "cached",
        description="How the coupled gradients come about: `cached` (member by member, memory of one member), `joint` (one backward pass, "
        "memory of all). The same numbers.",
    )


@dataclass(frozen=True)
class RegularizedProblem:
    """What one step minimizes: see `trainers.ensembles.input_gradients.regularized_loss`. `placement` None: all members here."""

    sets: Mapping[str, InputSet]
    y_B: Tensor
    regularizer: Regularizer
    placement: MemberPlacement | None = None


class EnsembleObjective(Objective):
    """An objective that trains an ensemble."""

    def prepare(self, model: nn.Module) -> None:
        """Raise a `UserError` unless `model` is an ensemble."""
        ensemble_in(model)


class RegularizedEnsembleObjective(EnsembleObjective):
    """An objective whose regularizer couples the input gradients of the members. Subclasses state the `problem` of a step."""

    config: RegularizedObjectiveConfig

    @abstractmethod
    def problem(self, model: nn.Module, x_BCHW: Tensor, y_B: Tensor, context: StepContext) -> RegularizedProblem:
        """Return what this step minimizes, after making its examples and taking its draw."""

    def set_passes(self, regularized: bool) -> float:
        """Return what one member costs on one set of images: cross-entropy, and, where regularized, the gradient of its input gradient.

        Cached gradients are computed twice, once for their coupling.
        """
        if not regularized:
            return 3.0
        return 6.0 if self.config.computation == "joint" else 8.0

    def terms(self, model: nn.Module, x_BCHW: Tensor, y_B: Tensor, context: StepContext) -> Mapping[str, Tensor]:
        problem = self.problem(model, x_BCHW, y_B, context)
        return regularized_loss(list(ensemble_in(model).members), problem.sets, problem.y_B, problem.regularizer)

    def training_step(self, model: nn.Module, x_BCHW: Tensor, y_B: Tensor, context: StepContext) -> dict[str, Tensor]:
        with generated_weights(model):
            problem = self.problem(model, x_BCHW, y_B, context)
            members = list(ensemble_in(model).members)
            if self.config.computation == "joint":
                return backward(regularized_loss(members, problem.sets, problem.y_B, problem.regularizer))
            placement: MemberPlacement = problem.placement or LocalMembers(len(members))
            return regularized_backward(members, problem.sets, problem.y_B, problem.regularizer, placement)


def member_cross_entropy(member: nn.Module, x_BCHW: Tensor, y_B: Tensor, context: StepContext) -> Tensor:
    """Return the mean cross-entropy of one member in the run's precision; logits are compared in fp32 at least."""
    with context.precision.autocast():
        logits_BK = member(x_BCHW)
    return functional.cross_entropy(at_least_fp32(logits_BK), y_B)
