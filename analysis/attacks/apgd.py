"""Auto-PGD for randomized models: step size and best iterate are decided on common draws, and no example is ever dropped.

Shapes: B batch, K classes; x is (B, C, H, W) in [0,1].

Reference: Croce and Hein, Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse Parameter-free Attacks, ICML 2020,
Algorithm 1 and section 4; expectation over draws: Athalye et al., Synthesizing Robust Adversarial Examples.
Deviation: the official code drops examples that one noisy forward misclassifies, and compares losses of different draws. Here losses
are compared on the same draws throughout, an example is optimized to the end, and the perturbed point is returned in any case.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from analysis.attacked_model import AttackedModel, BestPoint
from analysis.attacks.losses import (
    LossName,
    attack_loss,
    difference_of_logits_ratio,
    targeted_difference_of_logits_ratio,
)
from analysis.attacks.registry import AttackEntry, AttackOutput, AttackProblem, Cost
from models.configuration import Config
from models.errors import UserError
from models.randomness import derive_seed
from models.threat_model import Norm
from trainers.attacks import AttackLoss, ball_around

_MOMENTUM = 0.75  # alpha of the paper
_ENOUGH_INCREASES = 0.75  # rho of the paper


class ApgdParameters(Config):
    """Auto-PGD."""

    steps: int = Field(100, ge=1, description="Number of gradient steps (official strength: 100).")
    restarts: int = Field(1, ge=1, description="Runs from different starts; the best point on common draws is kept.")


class TargetedApgdParameters(ApgdParameters):
    """Auto-PGD towards each of the most likely wrong classes."""

    num_targets: int = Field(9, ge=1, description="Number of target classes, most likely first; at most K - 1 are used.")


def apgd(
    model: AttackedModel,
    x: Tensor,
    y: Tensor,
    *,
    epsilon: float,
    norm: Norm = "linf",
    steps: int = 100,
    loss: AttackLoss,
    restarts: int = 1,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Search the ball around each image for the point of highest mean loss over the model's draws.

    Args:
        model: the model and the draws that the protocol allows.
        x, y: images in [0,1] (B, C, H, W) and labels (B,).
        epsilon: radius in pixels of [0,1]. norm: `linf` or `l2`.
        steps: gradient steps. loss: `(logits_BK, y_B) -> loss_B`, maximized.
        restarts: runs from different random starts. seed: of the starts.

    Returns:
        Perturbed images, their mean loss (B,) and the share of common draws that err (B,). The clean image is never a candidate.
    """
    best = BestPoint(model.is_exact)
    for restart in range(restarts):
        generator = torch.Generator().manual_seed(derive_seed(seed, "start", restart))
        best.update_(*_one_run(model, x, y, epsilon, norm, steps, loss, generator))
    return best.result()


def _one_run(
    model: AttackedModel,
    x: Tensor,
    y: Tensor,
    epsilon: float,
    norm: Norm,
    steps: int,
    loss: AttackLoss,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    ball = ball_around(x, epsilon, norm)
    shape = (-1, *(1,) * (x.dim() - 1))
    returned, highest = BestPoint(model.is_exact), BestPoint(exact=False)

    def look(point: Tensor, needs_gradient: bool) -> tuple[Tensor, Tensor]:
        """Return gradient and comparable loss at a point, and enter it into both lists of best points."""
        gradient = torch.zeros_like(point)
        if needs_gradient:
            gradient, loss_B, wrong_B = model.gradient(point, y, loss)
        if not (needs_gradient and model.is_exact):
            loss_B, wrong_B = model.score(point, y, loss)
        returned.update_(point, loss_B, wrong_B)
        better_B = highest.update_(point, loss_B, wrong_B)
        highest_gradient.copy_(torch.where(better_B.view(shape), gradient, highest_gradient))
        return gradient, loss_B

    highest_gradient = torch.zeros_like(x)
    current = ball.random_start(generator)
    previous = current
    gradient, loss_B = look(current, needs_gradient=True)
    step_size_B = torch.full((len(x),), 2 * epsilon, dtype=x.dtype, device=x.device)
    checkpoints = _checkpoints(steps)
    increases_B = torch.zeros_like(loss_B)
    step_kept_B = torch.zeros_like(loss_B, dtype=torch.bool)
    highest_before_B = highest.result()[1].clone()
    last_checkpoint = 0
    for step in range(steps):
        ascent = ball.project_(current + step_size_B.view(shape) * _direction(gradient, norm))
        if step == 0:
            moved = ascent
        else:
            moved = current + _MOMENTUM * (ascent - current) + (1 - _MOMENTUM) * (current - previous)
            moved = ball.project_(moved)
        previous, current = current, moved
        loss_before_B = loss_B
        gradient, loss_B = look(current, needs_gradient=step + 1 < steps)
        increases_B += loss_B > loss_before_B
        if step + 1 in checkpoints:
            highest_B = highest.result()[1]
            rarely_up_B = increases_B < _ENOUGH_INCREASES * (step + 1 - last_checkpoint)
            stuck_B = step_kept_B & (highest_B <= highest_before_B)
            halve_B = rarely_up_B | stuck_B
            step_size_B = torch.where(halve_B, step_size_B / 2, step_size_B)
            restart_here = halve_B.view(shape)
            current = torch.where(restart_here, highest.result()[0], current)
            previous = torch.where(restart_here, current, previous)
            gradient = torch.where(restart_here, highest_gradient, gradient)
            loss_B = torch.where(halve_B, highest_B, loss_B)
            step_kept_B = ~halve_B
            highest_before_B = highest_B.clone()
            increases_B.zero_()
            last_checkpoint = step + 1
    return returned.result()


def _checkpoints(steps: int) -> set[int]:
    """Return the steps after which the step size is reviewed: p_0 = 0, p_1 = 0.22, then shrinking gaps of at least 0.06."""
    positions = [0.0, 0.22]
    while positions[-1] < 1:
        positions.append(positions[-1] + max(positions[-1] - positions[-2] - 0.03, 0.06))
    return {step for position in positions[1:] if 0 < (step := int(-(-position * steps // 1))) <= steps}


def _direction(gradient: Tensor, norm: Norm) -> Tensor:
    """Return the direction of steepest ascent of unit length; a NaN or zero gradient gives zero."""
    if norm == "linf":
        return gradient.sign().nan_to_num(nan=0.0)
    dims = tuple(range(1, gradient.dim()))
    smallest = torch.finfo(gradient.dtype).tiny
    # By the largest component first: squares of small gradients would be zero in float32.
    scaled = gradient / gradient.abs().amax(dim=dims, keepdim=True).clamp_min(smallest)
    length = torch.linalg.vector_norm(scaled, dim=dims, keepdim=True)
    return (scaled / length.clamp_min(smallest)).nan_to_num(nan=0.0)


def _untargeted(loss_name: LossName):
    def run(model: AttackedModel, problem: AttackProblem, parameters: ApgdParameters) -> AttackOutput:
        x_adv, _, _ = apgd(
            model,
            problem.x,
            problem.y,
            epsilon=problem.threat_model.epsilon,
            norm=problem.threat_model.norm,
            steps=parameters.steps,
            loss=attack_loss(loss_name, problem.num_classes),
            restarts=parameters.restarts,
            seed=problem.seed,
        )
        return AttackOutput(x_adv)

    return run


def _run_targeted(model: AttackedModel, problem: AttackProblem, parameters: TargetedApgdParameters) -> AttackOutput:
    _check_targeted(parameters, problem.num_classes)
    ranked_BK = model.mean_log_probability(problem.x).scatter(1, problem.y[:, None], -torch.inf)
    targets_BT = ranked_BK.argsort(dim=1, descending=True)[:, : min(parameters.num_targets, problem.num_classes - 1)]
    best = BestPoint(model.is_exact)
    for index in range(targets_BT.shape[1]):
        x_adv, _, _ = apgd(
            model,
            problem.x,
            problem.y,
            epsilon=problem.threat_model.epsilon,
            norm=problem.threat_model.norm,
            steps=parameters.steps,
            loss=targeted_difference_of_logits_ratio(targets_BT[:, index]),
            restarts=parameters.restarts,
            seed=derive_seed(problem.seed, "target", index),
        )
        # Losses towards different targets are not comparable; the untargeted one is.
        best.update_(x_adv, *model.score(x_adv, problem.y, difference_of_logits_ratio))
    return AttackOutput(best.result()[0])


def _check_targeted(parameters: TargetedApgdParameters, num_classes: int) -> None:
    del parameters
    if num_classes < 4:
        raise UserError(f"attack 'apgd_targeted' needs at least 4 classes, the model has {num_classes}; use 'apgd_ce' or 'apgd_margin'")


def _check_dlr(parameters: ApgdParameters, num_classes: int) -> None:
    del parameters
    attack_loss("difference_of_logits_ratio", num_classes)


def _cost(parameters: ApgdParameters, num_draws: int, num_classes: int, fixed_draws: bool) -> Cost:
    runs = parameters.restarts
    extra = 0.0
    if isinstance(parameters, TargetedApgdParameters):
        targets = min(parameters.num_targets, num_classes - 1)
        runs *= targets
        extra = num_draws * (1 + targets)
    scored = num_draws if fixed_draws else num_draws * (parameters.steps + 1)
    return Cost(runs * (num_draws * parameters.steps + scored) + extra, runs * num_draws * parameters.steps)


ATTACKS = (
    AttackEntry("apgd_ce", "Auto-PGD on cross-entropy", ApgdParameters, ("linf", "l2"), _untargeted("cross_entropy"), _cost),
    AttackEntry(
        "apgd_dlr",
        "Auto-PGD on the difference-of-logits ratio",
        ApgdParameters,
        ("linf", "l2"),
        _untargeted("difference_of_logits_ratio"),
        _cost,
        check_arguments=_check_dlr,
    ),
    AttackEntry("apgd_margin", "Auto-PGD on the margin", ApgdParameters, ("linf", "l2"), _untargeted("margin"), _cost),
    AttackEntry(
        "apgd_targeted",
        "Auto-PGD on the targeted difference-of-logits ratio",
        TargetedApgdParameters,
        ("linf", "l2"),
        _run_targeted,
        _cost,
        check_arguments=_check_targeted,
    ),
)
