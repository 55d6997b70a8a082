"""Uniform noise in the ball: what an attack must beat before its gradients can be said to lead anywhere (check C11)."""

from __future__ import annotations

import torch
from pydantic import Field

from analysis.attacked_model.model import AttackedModel, BestPoint
from analysis.attacks.registry import AttackEntry, AttackOutput, AttackProblem, Cost
from models.configuration import Config
from trainers.attacks import ball_around, margin


class UniformNoiseParameters(Config):
    """Random points of the ball."""

    num_points: int = Field(20, ge=1, description="Points tried per image; the one of highest mean margin is kept.")


def _run(model: AttackedModel, problem: AttackProblem, parameters: UniformNoiseParameters) -> AttackOutput:
    generator = torch.Generator().manual_seed(problem.seed)
    ball = ball_around(problem.x, problem.threat_model.epsilon, problem.threat_model.norm)
    best = BestPoint(model.is_exact)
    for _ in range(parameters.num_points):
        # Every image is tried equally often, so that its margin can be compared with that of an attack of as many steps.
        points = ball.random_start(generator)
        best.update_(points, *model.score(points, problem.y, margin))
    return AttackOutput(best.result()[0])


def _cost(parameters: UniformNoiseParameters, num_draws: int, num_classes: int, fixed_draws: bool) -> Cost:
    del num_classes, fixed_draws
    return Cost(parameters.num_points * num_draws, 0)


ATTACKS = (
    AttackEntry(
        "uniform_noise", "the worst of some random points", UniformNoiseParameters, ("linf", "l2"), _run, _cost, uses_gradients=False
    ),
)
