"""FAB, targeted: looks for the nearest misclassified point by projecting onto linearized boundaries, without a step size.

It minimizes the distance, so it has no use for the radius until the end, where points outside are brought onto the ball. It linearizes
the mean margin over the draws that it may hold; on fresh draws there is no boundary to project onto, so it is for deterministic models
and known draws.

Shapes: B batch, D = C * H * W pixels; x is (B, C, H, W) in [0,1].

Reference: Croce and Hein, Minimally Distorted Adversarial Examples with a Fast Adaptive Boundary Attack, ICML 2020, Algorithm 1, Eq. 5
to 9, with the targeted variant and the constants of AutoAttack.
Deviation: an image for which nothing is found comes back as the last iterate on the ball, never as the image itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from analysis.attacked_model.draws import FixedDraws
from analysis.attacked_model.model import AttackedModel, BestPoint
from analysis.attacks.registry import AttackEntry, AttackOutput, AttackProblem, Cost
from models.configuration import Config
from models.randomness import derive_seed
from models.threat_model import Norm
from trainers.attacks import ball_around, margin

_LARGEST_BIAS = 0.1  # alpha_max of the paper
_EXTRAPOLATION = 1.05  # eta
_BACKWARD = 0.9  # beta
_SMALLEST = 1e-12
_COMPACT_EVERY = 5


class FabParameters(Config):
    """Targeted FAB."""

    steps: int = Field(100, ge=1, description="Number of iterations per target (official strength: 100).")
    num_targets: int = Field(9, ge=1, description="Number of target classes, most likely first; at most K - 1 are used.")
    restarts: int = Field(1, ge=1, description="Runs; the first begins at the image, the others at random points.")


def project_onto_hyperplane(x_BD: Tensor, normal_BD: Tensor, offset_B: Tensor, norm: Norm) -> Tensor:
    """Return the step from x to the nearest point of {z in [0,1]^D: normal . (z - x) + offset = 0} in the norm, (B, D).

    Where the plane does not meet the box, the step goes to the corner of the box closest to the plane.

    Args:
        x_BD: points in [0,1].
        normal_BD, offset_B: of the plane.
    """
    sign_B1 = torch.where(offset_B < 0, 1.0, -1.0).to(x_BD).unsqueeze(1)
    heading_BD = (sign_B1 * normal_BD).sign()  # the direction in which each pixel moves
    room_BD = torch.where(heading_BD > 0, 1 - x_BD, x_BD)
    weight_BD = normal_BD.abs()
    if norm == "linf":
        # All pixels move by t, up to their room: sum of weight * min(t, room) = |offset|.
        rate_BD, limit_BD = weight_BD, room_BD
    else:
        # Pixels move by t * weight, up to their room.
        rate_BD, limit_BD = weight_BD.square(), room_BD / weight_BD.clamp_min(_SMALLEST)
    t_B1 = _solve(rate_BD, limit_BD, offset_B.abs()).unsqueeze(1)
    return heading_BD * torch.minimum(t_B1 if norm == "linf" else t_B1 * weight_BD, room_BD)


def _solve(rate_BD: Tensor, limit_BD: Tensor, needed_B: Tensor) -> Tensor:
    """Return the smallest t with sum of rate * min(t, limit) >= needed, per row; the largest limit where there is none."""
    limit_BD, order = limit_BD.sort(dim=1)
    rate_BD = rate_BD.gather(1, order)
    saturated_BD = (rate_BD * limit_BD).cumsum(1)  # by those up to and including this one
    growing_BD = rate_BD.sum(1, keepdim=True) - rate_BD.cumsum(1)  # rate of those after it
    reached_BD = saturated_BD + limit_BD * growing_BD
    index_B1 = (reached_BD < needed_B[:, None]).sum(1, keepdim=True).clamp(max=limit_BD.shape[1] - 1)
    before_B1 = (index_B1 - 1).clamp(min=0)
    is_first = index_B1 == 0
    base_B1 = torch.where(is_first, 0.0, saturated_BD.gather(1, before_B1))
    rate_B1 = torch.where(is_first, rate_BD.sum(1, keepdim=True), growing_BD.gather(1, before_B1))
    t_B1 = (needed_B[:, None] - base_B1) / rate_B1.clamp_min(_SMALLEST)
    return torch.minimum(t_B1, limit_BD.gather(1, index_B1)).squeeze(1)


def fab_targeted(
    model: AttackedModel,
    x: Tensor,
    y: Tensor,
    target_B: Tensor,
    start: Tensor,
    *,
    norm: Norm,
    steps: int,
    near_enough: float = -1.0,
) -> tuple[Tensor, Tensor]:
    """Return, per image, the nearest misclassified point that was seen, and its distance (B,); without one the last iterate, infinity.

    Args:
        model: the model and the draws that the protocol allows, which must be fixed.
        x, y, target_B: images in [0,1] (B, C, H, W), labels and target classes (B,). start: first iterates.
        norm: of the distance. steps: iterations.
        near_enough: an image with a misclassified point at most this far away is left alone from then on.
    """
    best = x.flatten(1).clone()
    nearest_B = x.new_full((len(x),), torch.inf)
    rows = torch.arange(len(x), device=x.device)
    original_BD, current_BD = x.flatten(1), start.flatten(1)
    for step in range(steps):
        if step % _COMPACT_EVERY == 0:
            open_B = nearest_B[rows] > near_enough
            if not bool(open_B.all()):
                rows, y, target_B, original_BD, current_BD = (values[open_B] for values in (rows, y, target_B, original_BD, current_BD))
            if rows.numel() == 0:
                break
        shape = (-1, *x.shape[1:])
        gradient, gap_B, _ = model.gradient(current_BD.view(shape), y, _Gap(target_B))
        normal_BD = gradient.flatten(1).nan_to_num(nan=0.0)
        gap_of_original_B = gap_B + (normal_BD * (original_BD - current_BD)).sum(1)
        from_current = project_onto_hyperplane(current_BD, normal_BD, gap_B, norm)
        from_original = project_onto_hyperplane(original_BD, normal_BD, gap_of_original_B, norm)
        first_B, second_B = _length(from_current, norm), _length(from_original, norm)
        bias_B1 = (first_B / (first_B + second_B).clamp_min(_SMALLEST)).clamp(0, _LARGEST_BIAS)[:, None]
        moved = (1 - bias_B1) * (current_BD + _EXTRAPOLATION * from_current) + bias_B1 * (original_BD + _EXTRAPOLATION * from_original)
        current_BD = moved.clamp(0, 1)
        _, wrong_B = model.score(current_BD.view(shape), y, margin)
        is_wrong_B = wrong_B > 0.5  # of several held draws: most
        distance_B = _length(current_BD - original_BD, norm)
        better_B = is_wrong_B & (distance_B < nearest_B[rows])
        # Until one is found, the last iterate is what there is.
        taken_B = better_B | nearest_B[rows].isinf()
        best[rows] = torch.where(taken_B[:, None], current_BD, best[rows])
        nearest_B[rows] = torch.where(better_B, distance_B, nearest_B[rows])
        current_BD = torch.where(is_wrong_B[:, None], original_BD + _BACKWARD * (current_BD - original_BD), current_BD)
    return best.view(x.shape), nearest_B


@dataclass(frozen=True)
class _Gap:
    """Logit of the target minus logit of the true class."""

    target_B: Tensor

    def __call__(self, logits_BK: Tensor, y_B: Tensor) -> Tensor:
        aim_B, true_B = (logits_BK.gather(1, index[:, None]).squeeze(1) for index in (self.target_B, y_B))
        return aim_B - true_B


def _length(step_BD: Tensor, norm: Norm) -> Tensor:
    return step_BD.abs().amax(1) if norm == "linf" else torch.linalg.vector_norm(step_BD, dim=1)


def _run(model: AttackedModel, problem: AttackProblem, parameters: FabParameters) -> AttackOutput:
    epsilon, norm = problem.threat_model.epsilon, problem.threat_model.norm
    x, y = problem.x, problem.y
    held = model if model.source.is_fixed else model.on(FixedDraws(model.frozen_draws()))
    ball = ball_around(x, epsilon, norm)
    ranked_BK = held.mean_log_probability(x).scatter(1, y[:, None], -torch.inf)
    targets_BT = ranked_BK.argsort(dim=1, descending=True)[:, : min(parameters.num_targets, problem.num_classes - 1)]
    best = BestPoint(model.is_exact)
    for restart in range(parameters.restarts):
        start = ball.random_start(torch.Generator().manual_seed(derive_seed(problem.seed, "start", restart))) if restart else x
        for index in range(targets_BT.shape[1]):
            rows = best.open_rows(model, x)
            if rows.numel() == 0:
                break
            found, _ = fab_targeted(
                held,
                x[rows],
                y[rows],
                targets_BT[rows, index],
                start[rows],
                norm=norm,
                steps=parameters.steps,
                near_enough=epsilon if model.stops_at_success else -1.0,
            )
            x_adv = ball_around(x[rows], epsilon, norm).project_(found.clone())
            best.update_rows_(rows, x_adv, *model.score(x_adv, y[rows], margin))
    return AttackOutput(best.result()[0])


def _cost(parameters: FabParameters, num_draws: int, num_classes: int, fixed_draws: bool) -> Cost:
    del fixed_draws
    runs = min(parameters.num_targets, num_classes - 1) * parameters.restarts
    return Cost(num_draws * (1 + runs * (2 * parameters.steps + 1)), num_draws * runs * parameters.steps)


ATTACKS = (
    AttackEntry(
        "fab_targeted",
        "targeted FAB: nearest misclassified point",
        FabParameters,
        ("linf", "l2"),
        _run,
        _cost,
        climbs_a_loss=False,
        ignores_scale=True,
    ),
)
