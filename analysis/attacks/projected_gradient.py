"""Projected gradient descent and the one-step attack, as the trainers have them, under any protocol."""

from __future__ import annotations

import torch
from pydantic import Field

from analysis.attacked_model import AttackedModel
from analysis.attacks.losses import LossName, attack_loss
from analysis.attacks.registry import AttackEntry, AttackOutput, AttackProblem, Cost
from models.configuration import Config
from models.threat_model import PixelFraction
from trainers.attacks import pgd


class PgdParameters(Config):
    """Projected gradient descent. Under sampled draws each step takes fresh ones and averages their gradients."""

    steps: int = Field(20, ge=1, description="Number of gradient steps.")
    step_size: PixelFraction | None = Field(
        None, gt=0, description="Step size in pixels of [0,1]; none: a quarter of epsilon, as 2/255 is of 8/255."
    )
    random_start: bool = Field(True, description="Begin uniformly in the ball instead of at the image.")
    loss: LossName = Field("cross_entropy", description="What is maximized; `margin` is the papers' CW loss.")
    keep_best: bool = Field(False, description="Return the iterate of highest mean loss instead of the last (papers: last).")
    restarts: int = Field(1, ge=1, description="Runs from different starts; the one of highest mean loss is kept.")


class FgsmParameters(Config):
    """One step of size epsilon along the sign of the gradient."""

    loss: LossName = Field("cross_entropy", description="What is maximized.")


def _run_pgd(model: AttackedModel, problem: AttackProblem, parameters: PgdParameters) -> AttackOutput:
    epsilon = problem.threat_model.epsilon
    x_adv = pgd(
        model,
        problem.x,
        problem.y,
        epsilon=epsilon,
        step_size=epsilon / 4 if parameters.step_size is None else parameters.step_size,
        steps=parameters.steps,
        norm=problem.threat_model.norm,
        random_start=parameters.random_start,
        generator=torch.Generator().manual_seed(problem.seed),
        loss=attack_loss(parameters.loss, problem.num_classes),
        num_draws=model.source.count,
        resample_each_step=True,
        keep_best=parameters.keep_best,
        restarts=parameters.restarts,
    )
    return AttackOutput(x_adv)


def _run_fgsm(model: AttackedModel, problem: AttackProblem, parameters: FgsmParameters) -> AttackOutput:
    epsilon = problem.threat_model.epsilon
    x_adv = pgd(
        model,
        problem.x,
        problem.y,
        epsilon=epsilon,
        step_size=epsilon,
        steps=1,
        norm=problem.threat_model.norm,
        random_start=False,
        loss=attack_loss(parameters.loss, problem.num_classes),
        num_draws=model.source.count,
        resample_each_step=True,
    )
    return AttackOutput(x_adv)


def _pgd_cost(parameters: PgdParameters, num_draws: int, num_classes: int, fixed_draws: bool) -> Cost:
    del num_classes, fixed_draws
    scored = parameters.keep_best or parameters.restarts > 1
    passes = parameters.steps * num_draws * parameters.restarts
    return Cost(passes + (num_draws * parameters.restarts if scored else 0), passes)


def _fgsm_cost(parameters: FgsmParameters, num_draws: int, num_classes: int, fixed_draws: bool) -> Cost:
    del parameters, num_classes, fixed_draws
    return Cost(num_draws, num_draws)


ATTACKS = (
    AttackEntry("pgd", "projected gradient descent, last iterate", PgdParameters, ("linf", "l2"), _run_pgd, _pgd_cost),
    AttackEntry("fgsm", "one gradient step of size epsilon", FgsmParameters, ("linf", "l2"), _run_fgsm, _fgsm_cost, one_step=True),
)
