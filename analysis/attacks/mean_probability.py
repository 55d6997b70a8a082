"""Projected gradient descent on the mean probability over draws: the loss of the averaged predictor, not the mean of the losses.

-log mean_d p_d(y) weights each draw by its own probability of the true class: draws that err already stop pulling. Under randomization
it aims at the predictor that votes; as an attack on single draws it complements the mean loss.

Shapes: B batch; x is (B, C, H, W) in [0,1].
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from analysis.attacked_model.model import AttackedModel
from analysis.attacks.registry import AttackEntry, AttackOutput, AttackProblem, Cost
from analysis.attacks.restarts import best_of_restarts, cost_of_restarts
from models.configuration import Config
from models.threat_model import PixelFraction
from trainers.attacks import ball_around, cross_entropy, margin


class MeanProbabilityParameters(Config):
    """Projected gradient descent on minus the logarithm of the mean probability of the true class."""

    steps: int = Field(40, ge=1, description="Number of gradient steps.")
    step_size: PixelFraction | None = Field(None, gt=0, description="Step size in pixels of [0,1]; none: a quarter of epsilon.")
    restarts: int = Field(1, ge=1, description="Runs from different starts; the one with most errors on common draws is kept.")


def mean_probability_gradient(model: AttackedModel, x: Tensor, y: Tensor) -> Tensor:
    """Return the gradient (B, ...) of -log mean_d p_d(y) over the source's next draws, in one pass and without underflow.

    It is the mean of the gradients of the draws' cross-entropies, weighted by their probabilities; weights are kept relative to the
    largest probability seen so far.
    """
    leaf = x.detach().requires_grad_()
    shape = (-1, *(1,) * (x.dim() - 1))
    largest_B = x.new_full((len(x),), -torch.inf)
    total_B, weighted = x.new_zeros(len(x)), torch.zeros_like(x)
    with torch.enable_grad():
        for _ in range(model.source.count):
            loss_B = cross_entropy(model.logits(leaf, model.source.take()), y)
            (gradient,) = torch.autograd.grad(loss_B.sum(), leaf)
            log_probability_B = -loss_B.detach()
            new_largest_B = torch.maximum(largest_B, log_probability_B)
            old_scale_B, weight_B = (largest_B - new_largest_B).exp(), (log_probability_B - new_largest_B).exp()
            weighted = weighted * old_scale_B.view(shape) + gradient * weight_B.view(shape)
            total_B = total_B * old_scale_B + weight_B
            largest_B = new_largest_B
    return weighted / total_B.view(shape)


def _run(model: AttackedModel, problem: AttackProblem, parameters: MeanProbabilityParameters) -> AttackOutput:
    epsilon = problem.threat_model.epsilon
    ball = ball_around(problem.x, epsilon, problem.threat_model.norm)
    step_size = epsilon / 4 if parameters.step_size is None else parameters.step_size

    def climb(x_adv: Tensor) -> Tensor:
        for _ in range(parameters.steps):
            x_adv = ball.ascend_(x_adv, mean_probability_gradient(model, x_adv, problem.y), step_size)
        return x_adv

    return AttackOutput(best_of_restarts(model, problem, parameters.restarts, margin, climb))


def _cost(parameters: MeanProbabilityParameters, num_draws: int, num_classes: int, fixed_draws: bool) -> Cost:
    del num_classes, fixed_draws
    return cost_of_restarts(parameters.steps, parameters.restarts, num_draws)


ATTACKS = (
    AttackEntry(
        "mean_probability_pgd",
        "projected gradient descent on the mean probability over draws",
        MeanProbabilityParameters,
        ("linf", "l2"),
        _run,
        _cost,
    ),
)
