"""Square attack, and Square with expectation over draws: random search with square windows, no gradients.

Shapes: B batch, C channels, H, W; x is (B, C, H, W) in [0,1].

Reference: Andriushchenko et al., Square Attack: a Query-efficient Black-box Adversarial Attack via Random Search, ECCV 2020, Algorithms
1 and 2. For randomized models the maintainers of AutoAttack advise to accept a move on the loss averaged over draws and not to
stop early; both are done here, on draws that both points share and that are exchanged from time to time.
"""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor

from analysis.attacked_model import AttackedModel
from analysis.attacks.registry import AttackEntry, AttackOutput, AttackProblem, Cost
from models.configuration import Config
from trainers.attacks import margin

# Queries of 10 000 at which the share of changed pixels is halved (section 3.1 of the paper).
_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
_SCHEDULE_LENGTH = 10_000


class SquareParameters(Config):
    """Square attack under linf."""

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
    for query in range(1, parameters.num_queries):
        if not model.is_exact and query % parameters.renew_draws_every == 0:
            model.renew_common_draws()
            loss_B, _ = model.score(current, y, margin)
        side = _window_side(query, parameters, height, width)
        windows = _windows(batch, height, width, side, generator).to(x.device)
        values = epsilon * _signs((batch, channels, 1, 1), generator).to(x)
        # Random numbers are taken for the whole batch, so what one image sees does not depend on the others' success.
        active = (loss_B <= 0).nonzero().squeeze(1) if model.is_single else torch.arange(batch, device=x.device)
        if active.numel() == 0:
            break
        candidate = torch.where(windows[active], x[active] + values[active], current[active])
        candidate = candidate.clamp(min=lower[active], max=upper[active])
        candidate_loss, _ = model.score(candidate, y[active], margin)
        accepted = candidate_loss > loss_B[active]
        current[active] = torch.where(accepted.view(-1, 1, 1, 1), candidate, current[active])
        loss_B[active] = torch.where(accepted, candidate_loss, loss_B[active])
    return current


def _window_side(query: int, parameters: SquareParameters, height: int, width: int) -> int:
    position = query * _SCHEDULE_LENGTH / parameters.num_queries if parameters.rescale_schedule else query
    share = parameters.initial_share / 2 ** sum(position > halving for halving in _HALVINGS)
    return min(max(round(math.sqrt(share * height * width)), 1), height, width)


def _windows(batch: int, height: int, width: int, side: int, generator: torch.Generator) -> Tensor:
    """Return a mask (B, 1, H, W) that is true in one square of `side` pixels per image."""
    top_B = torch.randint(0, height - side + 1, (batch, 1), generator=generator)
    left_B = torch.randint(0, width - side + 1, (batch, 1), generator=generator)
    rows = torch.arange(height)
    columns = torch.arange(width)
    in_rows = (rows >= top_B) & (rows < top_B + side)
    in_columns = (columns >= left_B) & (columns < left_B + side)
    return (in_rows[:, :, None] & in_columns[:, None, :])[:, None]


def _signs(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, shape, generator=generator) * 2 - 1


def _run(model: AttackedModel, problem: AttackProblem, parameters: SquareParameters) -> AttackOutput:
    epsilon = problem.threat_model.epsilon
    with torch.no_grad():
        x_adv = square_linf(model, problem.x, problem.y, epsilon=epsilon, parameters=parameters, seed=problem.seed)
    return AttackOutput(x_adv)


def _cost(parameters: SquareParameters, num_draws: int, num_classes: int, fixed_draws: bool) -> Cost:
    del num_classes
    renewals = 0 if fixed_draws else parameters.num_queries // parameters.renew_draws_every
    return Cost(num_draws * (parameters.num_queries + renewals), 0)


ATTACKS = (AttackEntry("square", "Square attack: random search, no gradients", SquareParameters, ("linf",), _run, _cost),)
