"""Projected gradient ascent along momenta of several lengths: the noise of the draws is averaged over steps, not only within one.

A gradient of a randomized model is noisy. Averaging E draws at each step (EOT) shrinks the noise by sqrt(E) at E times the cost; a
momentum of factor mu averages about 1 / (1 - mu) steps at no cost, and a mean of several momenta is fast at the beginning and quiet at
the end. Alternatively one set of draws is held for the whole attack: the attacked function is then a fixed one, whose gradients have
no noise between steps at all (a sample average in the place of the expectation).

Shapes: B batch; x is (B, C, H, W) in [0,1].

Reference: Sitawarin, Golan-Strieb, Wagner, Demystifying the Adversarial Robustness of Random Transformation Defenses, ICML 2022,
section 6 (AggMo with a margin loss); Lucas, Sun, Zemel, Grosse, Aggregated Momentum, ICLR 2019, Eq. 4.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from analysis.attacked_model.draws import FixedDraws
from analysis.attacked_model.model import AttackedModel
from analysis.attacks.losses import LossName, attack_loss
from analysis.attacks.registry import AttackEntry, AttackOutput, AttackProblem, Cost
from analysis.attacks.restarts import best_of_restarts, cost_of_restarts
from models.configuration import Config
from models.errors import UserError
from models.threat_model import PixelFraction
from trainers.attacks import AttackLoss, ball_around


class AggregatedMomentumParameters(Config):
    """Projected gradient ascent along the mean of several momenta."""

    steps: int = Field(100, ge=1, description="Number of gradient steps.")
    step_size: PixelFraction | None = Field(
        None, gt=0, description="Length of the first step in pixels of [0,1]; it falls to zero along a cosine. None: half of epsilon."
    )
    momenta: tuple[float, ...] = Field((0.0, 0.9, 0.99), description="Factors of the momenta that are averaged, each in [0, 1).")
    loss: LossName = Field("margin", description="What is maximized; `margin` is the largest wrong logit minus the true one.")
    draws: Literal["fresh", "held"] = Field(
        "fresh", description="`fresh`: other draws at each step. `held`: one set of draws for the whole attack."
    )
    restarts: int = Field(1, ge=1, description="Runs from different starts; the one with most errors on common draws is kept.")

    @field_validator("momenta")
    @classmethod
    def _factors(cls, momenta: tuple[float, ...]) -> tuple[float, ...]:
        if not momenta or any(not 0 <= factor < 1 for factor in momenta):
            raise UserError(f"momenta {momenta}: at least one factor, each at least 0 and below 1")
        return momenta


def ascend_along_momenta(
    model: AttackedModel, problem: AttackProblem, start: Tensor, parameters: AggregatedMomentumParameters, loss: AttackLoss
) -> Tensor:
    """Return the last point (B, ...) of one run from `start`."""
    epsilon, norm = problem.threat_model.epsilon, problem.threat_model.norm
    ball = ball_around(problem.x, epsilon, norm)
    first_step = epsilon / 2 if parameters.step_size is None else parameters.step_size
    velocities = [torch.zeros_like(start) for _ in parameters.momenta]
    x_adv = start
    for step in range(parameters.steps):
        gradient, _, _ = model.gradient(x_adv, problem.y, loss)
        scaled = _unit_mean_size(gradient)
        for velocity, factor in zip(velocities, parameters.momenta, strict=True):
            velocity.mul_(factor).add_(scaled)
        direction = torch.stack(velocities).mean(dim=0)
        length = first_step * (1 + math.cos(math.pi * step / parameters.steps)) / 2
        x_adv = ball.ascend_(x_adv, direction, length)
    return x_adv


def _unit_mean_size(gradient: Tensor) -> Tensor:
    """Return each image's gradient divided by the mean size of its components, so that steps weigh alike; NaN gradients become zero."""
    gradient = gradient.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    dims = tuple(range(1, gradient.dim()))
    # By the largest component first: the mean of gradients below the smallest float would be zero.
    scaled = gradient / gradient.abs().amax(dim=dims, keepdim=True).clamp_min(torch.finfo(gradient.dtype).tiny)
    return scaled / scaled.abs().mean(dim=dims, keepdim=True).clamp_min(torch.finfo(gradient.dtype).tiny)


def _run(model: AttackedModel, problem: AttackProblem, parameters: AggregatedMomentumParameters) -> AttackOutput:
    loss = attack_loss(parameters.loss, problem.num_classes)
    attacked = model.on(FixedDraws(model.frozen_draws())) if parameters.draws == "held" else model

    def climb(start: Tensor) -> Tensor:
        return ascend_along_momenta(attacked, problem, start, parameters, loss)

    return AttackOutput(best_of_restarts(model, problem, parameters.restarts, loss, climb))


def _cost(parameters: AggregatedMomentumParameters, num_draws: int, num_classes: int, fixed_draws: bool) -> Cost:
    del num_classes, fixed_draws
    return cost_of_restarts(parameters.steps, parameters.restarts, num_draws)


ATTACKS = (
    AttackEntry(
        "aggregated_momentum",
        "projected gradient ascent along momenta of several lengths",
        AggregatedMomentumParameters,
        ("linf", "l2"),
        _run,
        _cost,
        ignores_scale=True,
    ),
)
