"""Projected gradient descent and the one-step attack, as the trainers have them, under any protocol."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from analysis.attacked_model.model import AttackedModel
from analysis.attacks.losses import LossName, attack_loss
from analysis.attacks.registry import AttackEntry, AttackOutput, AttackProblem, Cost
from models.configuration import Config
from models.threat_model import PixelFraction
from trainers.attacks import AttackLoss, ball_around, pgd

_COMPACT_EVERY = 5  # steps; at every step the shapes would change too often to pay


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
    stop_at_success: bool = Field(
        False,
        description="Keep the first iterate that errs and leave its image alone, where the attacked function is the deterministic one "
        "that scores; the papers go on to the last iterate, which may be right again.",
    )


class FgsmParameters(Config):
    """One step of size epsilon along the sign of the gradient."""

    loss: LossName = Field("cross_entropy", description="What is maximized.")


def _run_pgd(model: AttackedModel, problem: AttackProblem, parameters: PgdParameters) -> AttackOutput:
    epsilon = problem.threat_model.epsilon
    if parameters.stop_at_success and model.stops_at_success:
        return AttackOutput(_run_until_success(model, problem, parameters))
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


def _run_until_success(model: AttackedModel, problem: AttackProblem, parameters: PgdParameters) -> Tensor:
    """Return the first iterate that errs; where there is none, the last one."""
    epsilon, norm = problem.threat_model.epsilon, problem.threat_model.norm
    step_size = epsilon / 4 if parameters.step_size is None else parameters.step_size
    loss = attack_loss(parameters.loss, problem.num_classes)
    generator = torch.Generator().manual_seed(problem.seed)
    whole = ball_around(problem.x, epsilon, norm)
    result = problem.x.clone()
    rows = torch.arange(len(result), device=result.device)
    for _ in range(parameters.restarts):
        # The starts of the whole batch are drawn, so that an image's does not depend on the others' success.
        start = whole.random_start(generator) if parameters.random_start else problem.x
        x_adv, rows = _until_success(model, problem, start[rows], rows, result, parameters.steps, step_size, loss)
        result[rows] = x_adv
        if rows.numel() == 0:
            break
    return result


def _until_success(
    model: AttackedModel,
    problem: AttackProblem,
    x_adv: Tensor,
    rows: Tensor,
    result: Tensor,
    steps: int,
    step_size: float,
    loss: AttackLoss,
) -> tuple[Tensor, Tensor]:
    """Attack the images of `rows`, write the first iterates that err into `result`, return the last ones of the others and their rows."""
    epsilon, norm = problem.threat_model.epsilon, problem.threat_model.norm
    x, y = problem.x[rows], problem.y[rows]
    open_B = torch.ones_like(rows, dtype=torch.bool)
    ball = ball_around(x, epsilon, norm)
    for step in range(steps + 1):
        if step < steps:
            gradient, _, wrong_B = model.gradient(x_adv, y, loss)
        else:
            _, wrong_B = model.score(x_adv, y, loss)
        failed_B = open_B & (wrong_B > 0)
        result[rows[failed_B]] = x_adv[failed_B]
        open_B &= ~failed_B
        if step < steps:
            x_adv = ball.ascend_(x_adv, gradient, step_size)
        if (step % _COMPACT_EVERY == 0 or step == steps) and not bool(open_B.all()):
            rows, x, y, x_adv = rows[open_B], x[open_B], y[open_B], x_adv[open_B]
            open_B = torch.ones_like(rows, dtype=torch.bool)
            ball = ball_around(x, epsilon, norm)
            if rows.numel() == 0:
                break
    return x_adv, rows


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
