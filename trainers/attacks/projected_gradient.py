"""Projected gradient descent on the images, for deterministic and randomized models.

Shapes: B batch, E draws, K classes; x has shape (B, ...), usually (B, C, H, W). Pixels, radii and steps are in [0,1].

The loop asks autograd for the gradient of the input alone, so no weight gradient is computed and no `.grad` touched.
It works in place on bounds that are computed once and reads nothing back to the host.

Reference: Madry et al., Towards Deep Learning Models Resistant to Adversarial Attacks, section 2.1. The average over
draws (expectation over transformation, EOT) is that of Athalye et al., Synthesizing Robust Adversarial Examples.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor, nn

from models.errors import UserError, unknown_name
from models.profiling import timed
from models.randomness import resample
from models.shared_prefix import SharedPrefix
from models.threat_model import Norm
from trainers.attacks.balls import WHOLE, Shard, ball_around, sharded_noise
from trainers.attacks.losses import AttackLoss, cross_entropy
from trainers.hardware import FULL, Precision, channels_last

DEFAULT_SEED = 0
"""Seed of the private CPU generator of the start where the caller gives none: every such call starts alike."""

Model = nn.Module | Callable[[Tensor], Tensor]


@timed("attack")
def pgd(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    epsilon: float = 8 / 255,
    step_size: float = 2 / 255,
    steps: int = 10,
    norm: Norm = "linf",
    random_start: bool = True,
    gaussian_start: float | None = None,
    start: Tensor | None = None,
    generator: torch.Generator | None = None,
    loss: AttackLoss = cross_entropy,
    num_draws: int = 1,
    resample_each_step: bool = False,
    precision: Precision = FULL,
    keep_best: bool = False,
    restarts: int = 1,
    shard: Shard = WHOLE,
) -> Tensor:
    """Search the ball around each image for a point of high loss.

    Each step goes along the sign of the gradient (`linf`) or the gradient divided by its length (`l2`), then back into
    the ball and the pixel range. A zero or NaN gradient moves nothing: a pixel of `linf`, an image of `l2`.

    Args:
        model: maps pixels (B, ...) to logits (B, K). Its mode is the caller's choice and stays as it is.
        x: images in [0,1], of a floating type; their values are not looked at here (see `check_pixels`).
        y: labels (B,), or whatever else with B rows `loss` takes as its second argument.
        epsilon: radius in pixels of [0,1]; `l2`: Euclidean length.
        step_size: length of one step, in the same norm.
        steps: number of gradient steps; 0 returns the start.
        norm: `linf` or `l2`.
        random_start: begin at a point drawn uniformly from the ball instead of at x.
        gaussian_start: begin at x plus Gaussian noise of this standard deviation instead (TRADES: 0.001), whatever
            `random_start` says.
        start: begin at these images, brought into the ball, whatever else is said of the start.
        generator: source of the start, on the CPU or on the device of x; nothing else random is used. None: a private
            one with seed `DEFAULT_SEED`.
        loss: `(logits_BK, y) -> loss_B`, maximized. Logits arrive in float32 at least.
        num_draws: E, draws of a randomized model over which each gradient is averaged (EOT). More than 1 takes E fresh
            draws at each step; 1 attacks the draw that the model holds and never replaces it.
        resample_each_step: with `num_draws` 1, take a fresh draw before each forward. Fresh draws come from the model's
            own streams; within `frozen(model)` there are none.
        precision: arithmetic of the model's forward.
        keep_best: return per example the iterate of highest loss (mean over the draws of its step) instead of the last;
            costs one more evaluation of the loss.
        restarts: attack this often from different starts and keep per example the result of highest loss.
        shard: (rank, number of ranks) when x is one rank's equal part of a batch: random starts are then those of the whole batch.

    Returns:
        The adversarial images, detached, with dtype and device of x; channels last in memory if x has 4 dimensions.

    Raises:
        UserError: an argument is out of range.

    Deviation: the code of TRADES cuts a Gaussian start at the pixel range only after its first step; here every iterate
    is a valid image.
    """
    _check_numbers(epsilon, step_size, steps, norm, gaussian_start, num_draws, restarts)
    objective = _Objective(model, y, loss, num_draws, fresh_draws=resample_each_step or num_draws > 1)
    objective.check(x)
    if restarts > 1 and not random_start and gaussian_start is None and not objective.fresh_draws:
        raise UserError(f"restarts is {restarts}, but without a random start each one repeats the first.")
    if generator is None:
        generator = torch.Generator().manual_seed(DEFAULT_SEED)
    # One region of autocast around all steps: the weights are cast once, not at each step.
    with _gradients_enabled(), precision.autocast():
        x = _ready(x)
        ball = ball_around(x, epsilon, norm)
        best = _Best(x) if keep_best or restarts > 1 else None
        x_adv = x
        for _ in range(restarts):
            if start is not None:
                x_adv = ball.project_(channels_last(start.detach().clone()))
            elif gaussian_start is not None:
                noise = sharded_noise(x, generator, shard, lambda whole: whole.normal_(generator=generator))
                x_adv = ball.project_(x.clone().add_(noise, alpha=gaussian_start))
            elif random_start:
                x_adv = ball.random_start(generator, shard)
            else:
                x_adv = x.clone()
            for _ in range(steps):
                gradient, loss_B = objective.gradient(x_adv)
                if best is not None and keep_best:
                    best.update(x_adv, loss_B)
                x_adv = ball.ascend_(x_adv, gradient, step_size)
            if best is not None:
                best.update(x_adv, objective.value(x_adv))
        return x_adv if best is None else best.x


def input_gradient(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    loss: AttackLoss = cross_entropy,
    num_draws: int = 1,
    resample_each_draw: bool = False,
    precision: Precision = FULL,
) -> tuple[Tensor, Tensor]:
    """Return the gradient of each example's loss by its pixels, shaped as x, and the losses (B,), both detached.

    Args:
        model, x, y, loss, precision: as in `pgd`.
        num_draws: E, draws over which gradient and loss are averaged; more than 1 takes E fresh ones.
        resample_each_draw: take a fresh draw also with `num_draws` 1.

    Raises:
        UserError: an argument is out of range.
    """
    _check_numbers(num_draws=num_draws)
    objective = _Objective(model, y, loss, num_draws, fresh_draws=resample_each_draw or num_draws > 1)
    objective.check(x)
    with _gradients_enabled(), precision.autocast():
        return objective.gradient(_ready(x))


def check_pixels(x: Tensor) -> None:
    """Raise a `UserError` unless every value of x is in [0,1]. It waits for the device: call it once per data set."""
    if x.numel() == 0:
        return
    lowest, highest = (bound.item() for bound in x.detach().aminmax())
    if not (lowest >= 0 and highest <= 1):
        raise UserError(
            f"pixels must be in [0,1], these are in [{lowest:g}, {highest:g}]. Divide images of 0..255 by 255; "
            "normalization by mean and standard deviation is a layer of the model, not of the images."
        )


@dataclass
class _Objective:
    """The loss as a function of the image, averaged over `num_draws` draws."""

    model: Model
    y: Tensor
    loss: AttackLoss
    num_draws: int
    fresh_draws: bool

    def check(self, x: Tensor) -> None:
        """Check what can be checked without a look at tensor values, and make y usable in a graph."""
        if not x.is_floating_point() or x.dim() < 2:
            raise UserError(f"images are a batch of floating-point pixels, not {x.dtype} of shape {tuple(x.shape)}.")
        if self.y.dim() == 0 or len(self.y) != len(x):
            raise UserError(f"{len(x)} images come with labels of shape {tuple(self.y.shape)}; one row each is needed.")
        if self.fresh_draws and not isinstance(self.model, nn.Module):
            raise UserError(f"fresh draws need an nn.Module that holds them, not a {type(self.model).__name__}.")
        self.y = _without_inference_mode(self.y)

    def gradient(self, x_adv: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradient (B, ...) and the losses (B,)."""
        leaf = x_adv.detach().requires_grad_()
        total_B = torch.zeros((), device=leaf.device)
        with SharedPrefix(self.model, leaf, self.num_draws) as shared:
            for _ in range(self.num_draws):
                loss_B = self._losses(leaf)
                # The sum, not the mean: an example's gradient does not shrink with the size of the batch.
                shared.add_gradient_of(loss_B.sum())
                total_B = total_B + loss_B.detach()
            gradient = shared.input_gradient()
        return (gradient, total_B) if self.num_draws == 1 else (gradient / self.num_draws, total_B / self.num_draws)

    @torch.no_grad()
    def value(self, x_adv: Tensor) -> Tensor:
        """Return the losses (B,)."""
        return torch.stack([self._losses(x_adv) for _ in range(self.num_draws)]).mean(dim=0)

    def _losses(self, x_adv: Tensor) -> Tensor:
        if self.fresh_draws:
            assert isinstance(self.model, nn.Module)
            with torch.autocast(x_adv.device.type, enabled=False):  # a draw is the same in every arithmetic
                resample(self.model)
        logits_BK = self.model(x_adv)
        if logits_BK.dtype in (torch.bfloat16, torch.float16):
            logits_BK = logits_BK.float()
        loss_B = self.loss(logits_BK, self.y)
        if loss_B.shape != x_adv.shape[:1]:
            raise UserError(f"the attack's loss has shape {tuple(loss_B.shape)}; one value per example is needed.")
        return loss_B


class _Best:
    """Per example, the point of highest loss seen so far."""

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self.loss_B: Tensor | None = None

    def update(self, x_adv: Tensor, loss_B: Tensor) -> None:
        if self.loss_B is None:  # x_adv will be moved in place
            self.x, self.loss_B = x_adv.clone(), torch.where(loss_B.isnan(), float("-inf"), loss_B)
            return
        better_B = loss_B > self.loss_B  # never for NaN
        self.loss_B = torch.where(better_B, loss_B, self.loss_B)
        self.x = torch.where(better_B.view(-1, *(1 for _ in x_adv.shape[1:])), x_adv, self.x)


@contextlib.contextmanager
def _gradients_enabled() -> Iterator[None]:
    with torch.inference_mode(False), torch.enable_grad():
        yield


def _ready(x: Tensor) -> Tensor:
    """Return x detached and channels last; a copy only where that needs one, because it is never written to."""
    return _without_inference_mode(channels_last(x.detach()))


def _without_inference_mode(tensor: Tensor) -> Tensor:
    """Return a tensor that can be part of a graph: those made in inference mode cannot."""
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        return tensor.clone()


def _check_numbers(
    epsilon: float = 0.0,
    step_size: float = 0.0,
    steps: int = 0,
    norm: str = "linf",
    gaussian_start: float | None = None,
    num_draws: int = 1,
    restarts: int = 1,
) -> None:
    if norm not in get_args(Norm):
        raise unknown_name("norm", str(norm), get_args(Norm))
    for name, value in (("epsilon", epsilon), ("step_size", step_size), ("gaussian_start", gaussian_start)):
        if value is not None and not 0 <= value < float("inf"):
            raise UserError(f"{name} is {value}; it is a finite number of at least 0, in pixels of [0,1], e.g. 8/255.")
    if norm == "linf" and epsilon > 1:
        raise UserError(f"epsilon {epsilon:g}: pixels are in [0,1]; did you mean {epsilon:g}/255?")
    for name, count, least in (("steps", steps, 0), ("num_draws", num_draws, 1), ("restarts", restarts, 1)):
        if count != int(count) or count < least:
            raise UserError(f"{name} is {count}; it is a whole number of at least {least}.")
