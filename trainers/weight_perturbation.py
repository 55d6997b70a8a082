"""Adversarial weight perturbation (AWP): ascend on the weights before the descent step.

Per step: attack at w; one gradient of the loss of these examples at w; move each weight tensor by gamma times its own norm along it;
gradients and optimizer step at w + delta; subtract delta.

Reference: Wu, Xia, Wang, "Adversarial Weight Perturbation Helps Robust Generalization", NeurIPS 2020, Eq. 8 to 10.
Deviation: no proxy model with an optimizer of its own. Its learning rate cancels in the normalization, so delta is a function of the
gradient; and batch statistics of the ascent leave no trace, as with the proxy.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor, nn

from models.configuration import Config
from models.modes import mode
from trainers.distributed import all_reduce_flat
from trainers.objective import Objective, ObjectiveConfig, backward
from trainers.step import StepContext


class WeightPerturbationConfig(Config):
    """Settings of AWP."""

    gamma: float = Field(0.005, gt=0, lt=1, description="Size of the perturbation relative to each weight (AT: 0.01, TRADES: 0.005).")
    warmup_epochs: int = Field(
        9,
        ge=0,
        le=100_000,
        description="Epochs without it at the beginning (AT: 0; TRADES: 9, as the public script begins in its tenth epoch).",
    )

    @property
    def revision(self) -> int:
        """The default was 10."""
        return 1


class PerturbableConfig(ObjectiveConfig):
    """Base of the configs of objectives that can run with AWP."""

    weight_perturbation: WeightPerturbationConfig | None = Field(
        None, description="Adversarial weight perturbation around the training step; none: without."
    )

    @property
    def needs_whole_batch(self) -> bool:
        """The weights are moved along the gradient of the whole batch."""
        return self.weight_perturbation is not None


class PerturbableObjective(Objective):
    """An objective of the form "attack, then loss", which AWP can wrap.

    A subclass implements `attack` and `outer_loss`, has a config derived from `PerturbableConfig`, and overrides `ascent_loss` where the
    perturbation does not ascend on the training loss itself.
    """

    config: PerturbableConfig
    ascent_passes = 3.0
    """What the weight perturbation costs for one image, as `passes` counts."""

    def __init__(self, config: PerturbableConfig) -> None:
        super().__init__(config)
        self.perturbation: dict[str, Tensor] = {}

    @abstractmethod
    def attack(self, model: nn.Module, x_BCHW: Tensor, y_B: Tensor, context: StepContext) -> Tensor:
        """Return the adversarial examples of this step."""

    @abstractmethod
    def outer_passes(self) -> float:
        """Return what the loss and its gradients cost for one image without attack and weight perturbation, as `passes` counts."""

    def attack_passes(self, attack_steps: int) -> float:
        """Return what the attack costs for one image, as `passes` counts."""
        return 2.0 * attack_steps

    def passes(self, attack_steps: int, num_members: int, epoch: int) -> float:
        settings = self.config.weight_perturbation
        ascends = settings is not None and epoch >= settings.warmup_epochs
        return num_members * (self.attack_passes(attack_steps) + (self.ascent_passes if ascends else 0.0) + self.outer_passes())

    @abstractmethod
    def outer_loss(
        self, model: nn.Module, x_BCHW: Tensor, adversarial_BCHW: Tensor, y_B: Tensor, context: StepContext
    ) -> Mapping[str, Tensor]:
        """Return `loss` (with graph) and scalars to log, at the weights as they are now."""

    def ascent_loss(self, model: nn.Module, x_BCHW: Tensor, adversarial_BCHW: Tensor, y_B: Tensor, context: StepContext) -> Tensor:
        """Return what the weight perturbation ascends on: the training loss, unless overridden."""
        return self.outer_loss(model, x_BCHW, adversarial_BCHW, y_B, context)["loss"]

    def terms(self, model: nn.Module, x_BCHW: Tensor, y_B: Tensor, context: StepContext) -> Mapping[str, Tensor]:
        return self.outer_loss(model, x_BCHW, self.attack(model, x_BCHW, y_B, context), y_B, context)

    def training_step(self, model: nn.Module, x_BCHW: Tensor, y_B: Tensor, context: StepContext) -> dict[str, Tensor]:
        """Attack at w, perturb the weights if AWP is on, and add the gradients taken at w + delta.

        The weights stay at w + delta until `after_optimizer_step`.
        """
        adversarial_BCHW = self.attack(model, x_BCHW, y_B, context)
        settings = self.config.weight_perturbation
        if settings is not None and context.epoch >= settings.warmup_epochs:
            with mode(model, "train_without_update"):
                ascent = self.ascent_loss(model, x_BCHW, adversarial_BCHW, y_B, context)
                self.perturbation = weight_perturbation(model, ascent, settings.gamma)
            _add(model, self.perturbation, 1)
        try:
            return backward(self.outer_loss(model, x_BCHW, adversarial_BCHW, y_B, context))
        except BaseException:  # An interrupt too must not leave the weights at w + delta.
            self.after_optimizer_step(model, context)
            raise

    def after_optimizer_step(self, model: nn.Module, context: StepContext) -> None:
        """Subtract the weight perturbation."""
        _add(model, self.perturbation, -1)
        self.perturbation = {}


def perturbed_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return what AWP moves: trained weight tensors of convolutions and linear layers; no biases, no normalizations."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.ndim > 1 and name.rpartition(".")[2] == "weight"
    }


def weight_perturbation(model: nn.Module, loss: Tensor, gamma: float) -> dict[str, Tensor]:
    """Return delta_l = gamma ||w_l|| grad_l / ||grad_l|| by parameter name (Eq. 8, 10): norm gamma ||w_l||, zero where grad_l is.

    In a process group the gradients are averaged over the workers first, so that all workers stand at the same weights.
    """
    parameters = perturbed_parameters(model)
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    filled = [
        torch.zeros_like(parameter) if gradient is None else gradient
        for parameter, gradient in zip(parameters.values(), gradients, strict=True)
    ]
    all_reduce_flat(filled, "mean")
    return {
        name: gradient * (gamma * parameter.detach().norm() / gradient.norm().clamp_min(1e-30))
        for (name, parameter), gradient in zip(parameters.items(), filled, strict=True)
    }


@torch.no_grad()
def _add(model: nn.Module, perturbation: dict[str, Tensor], sign: int) -> None:
    for name, delta in perturbation.items():
        model.get_parameter(name).add_(delta, alpha=sign)
