"""ARC: the attack on randomized ensembles, by crossing the members' boundaries one after the other.

Gradients of a mean loss can cancel where members disagree, so that projected gradient descent finds nothing although a point exists that
fools some of them. ARC looks at one member at a time and takes a move only if the expected accuracy, computed over all members, does
not rise. On a continuum of draws it runs on a sample of frozen draws; the points are scored on fresh ones.

Shapes: B batch, K classes; x is (B, C, H, W) in [0,1]. Members are equally likely draws.

Reference: Dbouk and Shanbhag, Adversarial Vulnerability of Randomized Ensembles, ICML 2022, Algorithm 1.
Deviation: the linf local set is a box, into which is clipped; there everything is scaled. A candidate is brought into the ball around
the image before it is judged, there only after each round. Members are equally likely here, so their order is drawn anew in each
round. The best point of all is returned, not the last.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from analysis.attacked_model.draws import Draw, FixedDraws
from analysis.attacked_model.model import AttackedModel, BestPoint
from analysis.attacks.registry import AttackEntry, AttackOutput, AttackProblem, Cost
from models.configuration import Config
from models.randomness import derive_seed
from models.threat_model import Norm
from trainers.attacks import Ball, ball_around, margin

_OVERSHOOT = 1.05
_FURTHER = 0.25  # of the local radius
_SMALLEST = 1e-12


class ArcParameters(Config):
    """ARC. The members are the protocol's draws: all configurations, or as many frozen draws as a gradient would average."""

    rounds: int = Field(20, ge=1, description="K, walks through all members.")
    num_boundaries: int | None = Field(
        None, ge=1, description="G: most likely wrong classes whose boundaries are measured; none: all of them."
    )
    local_radius: float = Field(
        1.0, gt=0, le=1, description="Radius of one walk as a share of epsilon (the authors: 1 for linf, 1/4 for l2)."
    )
    restarts: int = Field(1, ge=1, description="Runs; the first begins at the image, the others at random points.")


def arc(
    model: AttackedModel,
    x: Tensor,
    y: Tensor,
    *,
    epsilon: float,
    norm: Norm,
    rounds: int = 20,
    num_boundaries: int | None = None,
    local_radius: float = 1.0,
    restarts: int = 1,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Search the ball around each image for the point that fools most members.

    Args:
        model: the model and the draws that the protocol allows.
        x, y: images in [0,1] (B, C, H, W) and labels (B,).
        epsilon, norm: the ball. rounds, num_boundaries, local_radius, restarts: see `ArcParameters`.
        seed: of the orders and of the starts after the first.

    Returns:
        Perturbed images, mean margin over the members (B,) and share of members that err (B,).
    """
    members = model.frozen_draws()
    ensemble = model.on(FixedDraws(members))
    ball = ball_around(x, epsilon, norm)
    best = BestPoint(exact=True)
    radius = local_radius * epsilon
    for restart in range(restarts):
        generator = torch.Generator().manual_seed(derive_seed(seed, "arc", restart))
        current = x.clone() if restart == 0 else ball.random_start(generator)
        for _ in range(rounds):
            order = torch.randperm(len(members), generator=generator).tolist()
            walk = [members[index] for index in order]
            current = _walk(ensemble, walk, ball, current, y, radius, norm, num_boundaries, best)
    return best.result()


def _walk(
    ensemble: AttackedModel,
    members: list[Draw],
    ball: Ball,
    centre: Tensor,
    y: Tensor,
    radius: float,
    norm: Norm,
    num_boundaries: int | None,
    best: BestPoint,
) -> Tensor:
    """Visit each member once and return the point reached; every point tried is entered into `best`."""
    shape = (-1, *(1,) * (centre.dim() - 1))
    step = torch.zeros_like(centre)
    _, wrong_B = ensemble.score(centre, y, margin)
    for member in members:
        direction, distance_B = _nearest_boundary(ensemble, member, centre + step, y, norm, num_boundaries)
        # Long enough to cross also after the sum is brought back into the local set, if the boundary is within reach.
        reachable_B = distance_B < radius
        length_B = torch.where(reachable_B, distance_B * radius / (radius - distance_B).clamp_min(_SMALLEST), radius)
        # A member that errs already is pushed further, so that it still errs when others are crossed, and on draws not seen here.
        length_B = torch.where(distance_B > 0, _OVERSHOOT * length_B, _FURTHER * radius).clamp(max=2 * radius)
        local = _into_local_set(step + length_B.view(shape) * direction, radius, norm)
        candidate = ball.project_(centre + local)
        candidate_loss_B, candidate_wrong_B = ensemble.score(candidate, y, margin)
        best.update_(candidate, candidate_loss_B, candidate_wrong_B)
        # A point that fools as many is taken too, even if it is farther from fooling more: otherwise the walk ends in the first trap.
        taken_B = candidate_wrong_B >= wrong_B
        step = torch.where(taken_B.view(shape), candidate - centre, step)
        wrong_B = torch.where(taken_B, candidate_wrong_B, wrong_B)
    # Once more into the ball: the difference above was rounded.
    return ball.project_(centre + step)


def _nearest_boundary(
    ensemble: AttackedModel, member: Draw, x: Tensor, y: Tensor, norm: Norm, num_boundaries: int | None
) -> tuple[Tensor, Tensor]:
    """Return, for one member, the unit direction to the nearest linearized boundary and the distance to it (B,), 0 beyond it."""
    leaf = x.detach().requires_grad_()
    with torch.enable_grad():
        logits_BK = ensemble.logits(leaf, member)
        others_BK = logits_BK.scatter(1, y[:, None], -torch.inf)
        count = min(num_boundaries or logits_BK.shape[1] - 1, logits_BK.shape[1] - 1)
        classes_BG = others_BK.detach().topk(count, dim=1).indices
        gaps_BG = logits_BK.gather(1, classes_BG) - logits_BK.gather(1, y[:, None])
        gradients = [torch.autograd.grad(gaps_BG[:, index].sum(), leaf, retain_graph=index + 1 < count)[0] for index in range(count)]
    gradients_GB = torch.stack(gradients).nan_to_num(nan=0.0)
    flat_GBD = gradients_GB.flatten(2)
    dual_GB = flat_GBD.abs().sum(2) if norm == "linf" else torch.linalg.vector_norm(flat_GBD, dim=2)
    distance_GB = (-gaps_BG.detach().T).clamp_min(0) / dual_GB.clamp_min(_SMALLEST)
    nearest_B = distance_GB.argmin(0)
    columns = torch.arange(len(x), device=x.device)
    chosen = gradients_GB[nearest_B, columns]
    if norm == "linf":
        direction = chosen.sign()
    else:
        direction = chosen / dual_GB[nearest_B, columns].clamp_min(_SMALLEST).view(-1, *(1,) * (x.dim() - 1))
    return direction, distance_GB[nearest_B, columns]


def _into_local_set(step: Tensor, radius: float, norm: Norm) -> Tensor:
    if norm == "linf":
        return step.clamp(-radius, radius)
    length = torch.linalg.vector_norm(step, dim=tuple(range(1, step.dim())), keepdim=True)
    return step * (radius / length.clamp_min(max(radius, _SMALLEST)))


def _run(model: AttackedModel, problem: AttackProblem, parameters: ArcParameters) -> AttackOutput:
    x_adv, _, _ = arc(
        model,
        problem.x,
        problem.y,
        epsilon=problem.threat_model.epsilon,
        norm=problem.threat_model.norm,
        rounds=parameters.rounds,
        num_boundaries=parameters.num_boundaries,
        local_radius=parameters.local_radius,
        restarts=parameters.restarts,
        seed=problem.seed,
    )
    return AttackOutput(x_adv)


def _cost(parameters: ArcParameters, num_draws: int, num_classes: int, fixed_draws: bool) -> Cost:
    del fixed_draws
    boundaries = min(parameters.num_boundaries or num_classes - 1, num_classes - 1)
    walks = parameters.rounds * parameters.restarts
    # Each member: one forward and a backward per boundary, then all members score; once more at the beginning of a walk.
    forward = walks * (num_draws * (1 + num_draws) + num_draws)
    return Cost(forward, walks * num_draws * boundaries)


ATTACKS = (
    AttackEntry(
        "arc",
        "ARC: boundaries of the members one by one",
        ArcParameters,
        ("linf", "l2"),
        _run,
        _cost,
        climbs_a_loss=False,
        ignores_scale=True,
    ),
)
