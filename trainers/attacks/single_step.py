"""Attacks of training that cost less than projected gradient descent: one step from a noisy start, or steps that end once an image errs.

Shapes: B batch, K classes; x has shape (B, C, H, W). Pixels, radii and steps are in [0,1].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from models.randomness import resample
from models.threat_model import Norm
from trainers.attacks.balls import WHOLE, LinfBall, Shard, ball_around, sharded_noise
from trainers.attacks.losses import AttackLoss, cross_entropy
from trainers.attacks.projected_gradient import Model
from trainers.hardware import FULL, Precision, at_least_fp32, channels_last
from trainers.labels import most_probable


@dataclass(frozen=True)
class SingleStep:
    """One step from a noisy start.

    Attributes:
        start: `uniform`: uniform in the ball of radius `radius`; `corners`: at that distance, each pixel by plus or minus `radius` (`linf`)
            or in a random direction (`l2`).
        radius: of the start. step_size: of the step. Both in pixels of [0,1].
        project: back into the threat model's ball afterwards; without, only into the pixel range.
    """

    start: Literal["uniform", "corners"]
    radius: float
    step_size: float
    project: bool


def n_fgsm(epsilon: float, noise_radius: float = 2.0) -> SingleStep:
    """Return N-FGSM: a step of epsilon from noise of `noise_radius` epsilons, never cut back to the ball.

    Reference: de Jorge et al., Make Some Noise: Reliable and Efficient Single-Step Adversarial Training, NeurIPS 2022, Algorithm 1.
    Deviation: start and result are valid images, as in the FastAT benchmark.
    """
    return SingleStep("uniform", noise_radius * epsilon, epsilon, project=False)


def single_step(
    model: Model,
    x_BCHW: Tensor,
    y: Tensor,
    kind: SingleStep,
    *,
    epsilon: float,
    norm: Norm,
    generator: torch.Generator,
    loss: AttackLoss = cross_entropy,
    shard: Shard = WHOLE,
    precision: Precision = FULL,
) -> Tensor:
    """Return adversarial images, detached and channels last.

    Args:
        model, y, loss, generator, shard, precision: as of `pgd`; the draw is the model's own.
        kind: which start and step. epsilon, norm: the threat model's.
    """
    with torch.enable_grad(), precision.autocast():
        x_BCHW = channels_last(x_BCHW.detach())
        start_BCHW = _start(x_BCHW, kind, norm, generator, shard)
        gradient_BCHW, _ = _gradient(model, start_BCHW, y, loss)
        # So large that it cuts nothing but at the pixel range.
        reach = epsilon if kind.project else kind.radius + kind.step_size
        return ball_around(x_BCHW, reach, norm).ascend_(start_BCHW, gradient_BCHW, kind.step_size)


def early_stopped_pgd(
    model: Model,
    x_BCHW: Tensor,
    y_B: Tensor,
    start_BCHW: Tensor,
    *,
    epsilon: float,
    step_size: float,
    steps: int,
    stop_after: int,
    norm: Norm,
    resample_each_step: bool = False,
    loss: AttackLoss = cross_entropy,
    precision: Precision = FULL,
) -> Tensor:
    """Return adversarial images, detached and channels last: projected gradient descent in which an image stays where it is once it was
    misclassified at more than `stop_after` steps. Ends as soon as all stay.

    Args: as of `pgd`; `y_B` are labels, `start_BCHW` images in the ball.

    Reference: Zhang et al., Attacks Which Do Not Kill Training Make Adversarial Learning Stronger, ICML 2020, Algorithm 1 (tau).
    Deviation: images that stay remain in the batch, whose statistics would be those of the others otherwise.
    """
    with torch.enable_grad(), precision.autocast():
        x_BCHW = channels_last(x_BCHW.detach())
        ball, x_adv = ball_around(x_BCHW, epsilon, norm), channels_last(start_BCHW.detach())
        left_B = torch.full((len(x_BCHW),), stop_after, device=x_BCHW.device)
        for _ in range(steps):
            if resample_each_step:
                assert isinstance(model, nn.Module)
                resample(model)
            gradient_BCHW, logits_BK = _gradient(model, x_adv, y_B, loss)
            wrong_B = logits_BK.argmax(1) != most_probable(y_B)
            stays_B = wrong_B & (left_B == 0)
            if bool(stays_B.all()):
                break
            left_B -= (wrong_B & ~stays_B).to(left_B.dtype)
            moved = ball.ascend_(x_adv.clone(), gradient_BCHW, step_size)
            x_adv = torch.where(stays_B.view(-1, 1, 1, 1), x_adv, moved)
        return x_adv


def _start(x_BCHW: Tensor, kind: SingleStep, norm: Norm, generator: torch.Generator, shard: Shard) -> Tensor:
    if kind.start == "uniform":
        return ball_around(x_BCHW, kind.radius, norm).random_start(generator, shard)
    ball = ball_around(x_BCHW, kind.radius, norm)
    if isinstance(ball, LinfBall):
        noise = sharded_noise(x_BCHW, generator, shard, lambda whole: whole.uniform_(generator=generator).sub_(0.5))
    else:
        noise = sharded_noise(x_BCHW, generator, shard, lambda whole: whole.normal_(generator=generator))
    return ball.ascend_(x_BCHW.clone(), noise, kind.radius)


def _gradient(model: Model, x_BCHW: Tensor, y: Tensor, loss: AttackLoss) -> tuple[Tensor, Tensor]:
    """Return the gradient of each image's loss, and the logits (B, K) in float32 at least, both detached."""
    leaf = x_BCHW.detach().requires_grad_()
    logits_BK = at_least_fp32(model(leaf))
    (gradient_BCHW,) = torch.autograd.grad(loss(logits_BK, y).sum(), leaf)
    return gradient_BCHW, logits_BK.detach()
