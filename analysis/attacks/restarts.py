"""Running an attack from several starts and keeping, per image, the point with most errors on common draws.

Shapes: B batch; x is (B, C, H, W) in [0,1].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from analysis.attacked_model.model import AttackedModel, BestPoint
from analysis.attacks.registry import AttackProblem, Cost
from models.randomness import derive_seed
from trainers.attacks import AttackLoss, ball_around


def best_of_restarts(
    model: AttackedModel, problem: AttackProblem, restarts: int, loss: AttackLoss, run: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return the points (B, ...) of `run(start)` from random starts; with one start its last point, unscored."""
    ball = ball_around(problem.x, problem.threat_model.epsilon, problem.threat_model.norm)
    best = BestPoint(exact=True)
    for restart in range(restarts):
        x_adv = run(ball.random_start(torch.Generator().manual_seed(derive_seed(problem.seed, "start", restart))))
        if restarts == 1:
            return x_adv
        best.update_(x_adv, *model.score(x_adv, problem.y, loss))
    return best.result()[0]


def cost_of_restarts(steps: int, restarts: int, num_draws: int) -> Cost:
    """Return the passes of `best_of_restarts` where a step takes the gradient over `num_draws` draws."""
    passes = steps * num_draws * restarts
    return Cost(passes + (num_draws * restarts if restarts > 1 else 0), passes)
