"""Attacks that find worst-case images inside training: projected gradient descent and what it is made of.

from trainers.attacks import pgd
x_adv = pgd(model, x, y, epsilon=8 / 255, step_size=2 / 255, steps=10)
"""

from trainers.attacks.balls import Ball, L2Ball, LinfBall, ball_around
from trainers.attacks.losses import AttackLoss, cross_entropy, margin
from trainers.attacks.projected_gradient import DEFAULT_SEED, check_pixels, input_gradient, pgd

__all__ = [
    "DEFAULT_SEED",
    "AttackLoss",
    "Ball",
    "L2Ball",
    "LinfBall",
    "ball_around",
    "check_pixels",
    "cross_entropy",
    "input_gradient",
    "margin",
    "pgd",
]
