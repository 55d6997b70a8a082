"""Square attack, and Square with expectation over draws: random search with square windows, no gradients.

Shapes: B batch, C channels, H, W; x is (B, C, H, W) in [0,1].

Reference: Andriushchenko et al., Square Attack: a Query-efficient Black-box Adversarial Attack via Random Search, ECCV 2020, Algorithms
1 to 3. For randomized models the maintainers of AutoAttack advise to accept a move on the loss averaged over draws and not to
stop early; both are done here, on draws that both points share and that are exchanged from time to time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from analysis.attacked_model.model import AttackedModel
from analysis.attacks.registry import AttackEntry, AttackOutput, AttackProblem, Cost
from models.configuration import Config
from models.one_copy import in_one_copy
from trainers.attacks import ball_around, margin

# Queries of 10 000 at which the share of changed pixels is halved (section 3.1 of the paper).
_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
_SCHEDULE_LENGTH = 10_000
_SMALLEST = 1e-12
_QUERIES_SENT_TOGETHER = 100


class SquareParameters(Config):
    """Square attack."""

    num_queries: int = Field(5000, ge=1, description="Number of candidates tried per image.")
    initial_share: float = Field(0.8, gt=0, le=1, description="p_init: share of the image's pixels in the first windows.")
    rescale_schedule: bool = Field(
        False, description="Stretch the schedule of window sizes to `num_queries` (the paper); AutoAttack does not."
    )
    renew_draws_every: int = Field(50, ge=1, description="With sampled draws: queries after which the common draws are exchanged.")


def square_linf(model: AttackedModel, x: Tensor, y: Tensor, *, epsilon: float, parameters: SquareParameters, seed: int) -> Tensor:
    """Return, per image, a corner-like point of the linf ball with a high mean margin over the model's draws.

    Against one deterministic function images that err are left alone; against several draws every image is searched to the end.
    """
    generator = torch.Generator().manual_seed(seed)
    batch, channels, height, width = x.shape
    lower, upper = (x - epsilon).clamp(min=0), (x + epsilon).clamp(max=1)
    stripes = _signs((batch, channels, 1, width), generator).to(x)
    current = (x + epsilon * stripes).clamp(min=lower, max=upper)
    loss_B, _ = model.score(current, y, margin)
    sides = [_window_side(query, parameters, height, width) for query in range(1, parameters.num_queries)]
    for query, move in enumerate(_moves(sides, 1, x, generator), 1):
        if not model.is_exact and query % parameters.renew_draws_every == 0:
            model.renew_common_draws()
            loss_B, _ = model.score(current, y, margin)
        (windows,), values = move.windows, epsilon * move.signs
        # Random numbers are taken for the whole batch, so what one image sees does not depend on the others' success.
        active = (loss_B <= 0).nonzero().squeeze(1) if model.stops_at_success else torch.arange(batch, device=x.device)
        if active.numel() == 0:
            break
        candidate = torch.where(windows[active], x[active] + values[active], current[active])
        candidate = candidate.clamp(min=lower[active], max=upper[active])
        candidate_loss, _ = model.score(candidate, y[active], margin)
        accepted = candidate_loss > loss_B[active]
        current[active] = torch.where(accepted.view(-1, 1, 1, 1), candidate, current[active])
        loss_B[active] = torch.where(accepted, candidate_loss, loss_B[active])
    return current


def square_l2(model: AttackedModel, x: Tensor, y: Tensor, *, epsilon: float, parameters: SquareParameters, seed: int) -> Tensor:
    """Return, per image, a point of the l2 sphere (or of the pixel range inside it) with a high mean margin over the model's draws.

    Each candidate moves the perturbation of one window into another one, whose content becomes a pyramid of random sign added to what
    is there; what is left of the radius is spent in it as well. Images are left alone as in `square_linf`.
    """
    generator = torch.Generator().manual_seed(seed)
    height, width = x.shape[2:]
    ball = ball_around(x, epsilon, "l2")
    current = ball.project_(x + _tiled_pyramids(x, epsilon, generator))
    loss_B, _ = model.score(current, y, margin)
    sides = [min(max(_window_side(query, parameters, height, width), 3) | 1, height, width) for query in range(1, parameters.num_queries)]
    for query, move in enumerate(_moves(sides, 2, x, generator), 1):
        if not model.is_exact and query % parameters.renew_draws_every == 0:
            model.renew_common_draws()
            loss_B, _ = model.score(current, y, margin)
        (target, source), side, signs = move.windows, move.side, move.signs
        active = (loss_B <= 0).nonzero().squeeze(1) if model.stops_at_success else torch.arange(len(x), device=x.device)
        if active.numel() == 0:
            break
        candidate = x[active] + _moved_mass(current[active] - x[active], target[active], source[active], signs[active], side, epsilon)
        candidate = candidate.clamp(0, 1)
        candidate_loss, _ = model.score(candidate, y[active], margin)
        accepted = candidate_loss > loss_B[active]
        current[active] = torch.where(accepted.view(-1, 1, 1, 1), candidate, current[active])
        loss_B[active] = torch.where(accepted, candidate_loss, loss_B[active])
    return ball.project_(current)


def _moved_mass(step: Tensor, target: Tensor, source: Tensor, signs: Tensor, side: int, epsilon: float) -> Tensor:
    """Return the perturbation after the mass of both windows and the unspent radius went into the target window."""
    dims = (1, 2, 3)
    freed = (step * (target | source)).square().sum(dims, keepdim=True)
    unspent = (epsilon**2 - step.square().sum(dims, keepdim=True)).clamp_min(0)
    inside = step * target
    inside = inside / torch.linalg.vector_norm(inside, dim=(2, 3), keepdim=True).clamp_min(_SMALLEST)
    content = inside + signs * _placed(_pyramid(side).to(step), target)
    content = content / torch.linalg.vector_norm(content, dim=dims, keepdim=True).clamp_min(_SMALLEST)
    return torch.where(target | source, 0.0, step) + content * (freed + unspent).sqrt()


def _pyramid(side: int) -> Tensor:
    """Return a (side, side) array that falls off from its middle like 1/r^2 sums, of unit length.

    Reference: Andriushchenko et al., section 3.3: eta(r, s) = sum over k of 1 / (M + 1 - k)^2 on nested windows around the middle.
    """
    values = torch.zeros(side, side, dtype=torch.float64)
    for ring in range((side + 1) // 2):
        values[ring : side - ring, ring : side - ring] += 1.0 / ((side + 1) // 2 - ring) ** 2
    return values / values.norm()


def _placed(content: Tensor, window: Tensor) -> Tensor:
    """Return (B, 1, H, W) with `content` in each image's window and zeros outside."""
    flat = torch.zeros(window.shape, dtype=content.dtype, device=content.device)
    flat[window] = content.reshape(-1).repeat(len(window))
    return flat


def _tiled_pyramids(x: Tensor, epsilon: float, generator: torch.Generator) -> Tensor:
    """Return a start of length epsilon: the image covered with pyramids of random signs."""
    batch, channels, height, width = x.shape
    side = max(min(height, width) // 5, 1)
    rows, columns = -(-height // side), -(-width // side)
    tile = _pyramid(side).repeat(rows, columns)[:height, :width].to(x)
    signs = _signs((batch, channels, rows, columns), generator).to(x)
    step = signs.repeat_interleave(side, 2).repeat_interleave(side, 3)[:, :, :height, :width] * tile
    return step * (epsilon / torch.linalg.vector_norm(step, dim=(1, 2, 3), keepdim=True).clamp_min(_SMALLEST))


def _window_side(query: int, parameters: SquareParameters, height: int, width: int) -> int:
    position = query * _SCHEDULE_LENGTH / parameters.num_queries if parameters.rescale_schedule else query
    share = parameters.initial_share / 2 ** sum(position > halving for halving in _HALVINGS)
    return min(max(round(math.sqrt(share * height * width)), 1), height, width)


@dataclass(frozen=True)
class _Move:
    """What is random in one query: masks (B, 1, H, W) of the windows, each a square of `side` pixels per image, and signs (B, C, 1, 1)."""

    side: int
    windows: list[Tensor]
    signs: Tensor


def _moves(sides: Sequence[int], num_windows: int, x: Tensor, generator: torch.Generator) -> Iterator[_Move]:
    """Yield a move for each side. Numbers are drawn on the host and sent for many queries together; masks are made on the device."""
    batch, channels, height, width = x.shape
    rows, columns = torch.arange(height, device=x.device), torch.arange(width, device=x.device)
    for first in range(0, len(sides), _QUERIES_SENT_TOGETHER):
        together = sides[first : first + _QUERIES_SENT_TOGETHER]
        drawn = []
        for side in together:
            corners = [torch.randint(0, extent - side + 1, (batch, 1), generator=generator) for extent in (height, width) * num_windows]
            drawn.append((torch.stack(corners), _signs((batch, channels, 1, 1), generator)))
        corners_Q, signs_Q = in_one_copy([torch.stack(parts) for parts in zip(*drawn, strict=True)], x.device)
        for side, corners, signs in zip(together, corners_Q, signs_Q, strict=True):
            windows = []
            for top_B1, left_B1 in zip(corners[::2], corners[1::2], strict=True):
                in_rows = (rows >= top_B1) & (rows < top_B1 + side)
                in_columns = (columns >= left_B1) & (columns < left_B1 + side)
                windows.append((in_rows[:, :, None] & in_columns[:, None, :])[:, None])
            yield _Move(side, windows, signs.to(x.dtype))


def _signs(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, shape, generator=generator) * 2 - 1


def _run(model: AttackedModel, problem: AttackProblem, parameters: SquareParameters) -> AttackOutput:
    epsilon = problem.threat_model.epsilon
    with torch.no_grad():
        search = square_linf if problem.threat_model.norm == "linf" else square_l2
        x_adv = search(model, problem.x, problem.y, epsilon=epsilon, parameters=parameters, seed=problem.seed)
    return AttackOutput(x_adv)


def _cost(parameters: SquareParameters, num_draws: int, num_classes: int, fixed_draws: bool) -> Cost:
    del num_classes
    renewals = 0 if fixed_draws else parameters.num_queries // parameters.renew_draws_every
    return Cost(num_draws * (parameters.num_queries + renewals), 0)


ATTACKS = (
    AttackEntry(
        "square",
        "Square attack: random search, no gradients",
        SquareParameters,
        ("linf", "l2"),
        _run,
        _cost,
        uses_gradients=False,
        ignores_scale=True,
    ),
)
