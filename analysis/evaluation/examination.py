"""What is measured on the model itself for the checks: whether its randomness lives, its gradients exist, its outputs are logits.

Shapes: B batch, K classes. All measurements return JSON-able values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from analysis.attacked_model.draws import ONLY_DRAW, Draw, FixedDraws, seeded_draws, set_draw
from analysis.attacked_model.model import AttackedModel, Predictor
from models.randomness import is_randomized, random_sites
from models.threat_model import Norm, ThreatModel
from trainers.attacks import AttackLoss, ball_around, cross_entropy, margin

_DIFFERENT = 1e-4  # relative to the largest logit
_NUM_OTHER_DRAWS = 64  # so that no model with few configurations, one of them likely, is called dead by coincidence
_LOOKS = (1, 4, 8, 16, 32)
_NUM_GRADIENT_DRAWS = 10
_NUM_IN_COMPANY = 32
_NUM_CALLS = 120
_STEPS = (1 / 50, 1 / 10, 1 / 3)  # of the radius
_FEWEST_STEPS = 8
_ABOVE_ROUNDING = 1e-5  # of the largest logit, so that a change of float32 logits says something


@torch.no_grad()
def liveness(model: nn.Module, x: Tensor, seed: int) -> dict[str, float]:
    """Return the shares of samples whose logits differ between draws, and whose logits differ under one and the same draw.

    The model is measured in the mode in which it is; draws in place are not restored.
    """
    draws = seeded_draws(1 + _NUM_OTHER_DRAWS, seed, "liveness") if is_randomized(model) else (ONLY_DRAW,) * 2
    set_draw(model, draws[0])
    first = model(x)
    repeated = _differ(model(x), first)
    differs = torch.zeros_like(repeated)
    for count, draw in enumerate(draws[1:], 1):
        set_draw(model, draw)
        differs |= _differ(model(x), first)
        # A look saves most models the other draws; each one waits for the device. Where images have draws of their own, or one
        # configuration is likely, it takes many draws until every image met another one.
        if count in _LOOKS and bool(differs.all()):
            break
    differing, unrepeatable = torch.stack([differs.float().mean(), repeated.float().mean()]).tolist()
    return {"differing": differing, "unrepeatable": unrepeatable}


@torch.no_grad()
def shares_draw_in_batch(model: nn.Module, x: Tensor, seed: int) -> bool:
    """Return whether one image twice in a batch meets the same draw."""
    (draw,) = seeded_draws(1, seed, "scope")
    set_draw(model, draw)
    logits_2K = model(torch.cat([x[:1], x[:1]]))
    return not bool(_differ(logits_2K[:1], logits_2K[1:]).any())


@torch.no_grad()
def company_facts(model: nn.Module, x: Tensor, seed: int) -> dict[str, float]:
    """Return the shares of images whose logits, under one draw, depend on what they should not depend on.

    Returns:
        `batch_size`: how many images follow in the batch. `companions`: which images stand beside it. `order`: its place (0 where each
        place has a draw of its own). `calls`: how often the model was called before, up to 120 times, of one image. `autograd`: whether
        gradients are recorded.
    """
    (draw,) = seeded_draws(1, seed, "company")
    x = x[: _NUM_IN_COMPANY - _NUM_IN_COMPANY % 2]
    others = torch.rand(x.shape, generator=torch.Generator().manual_seed(draw.value)).to(x)
    mixed = torch.where(torch.arange(len(x), device=x.device).view(-1, 1, 1, 1) % 2 == 0, x, others)

    def answers(images: Tensor) -> Tensor:
        set_draw(model, draw)
        return model(images)

    together = answers(x)
    rough = _roughness(model)
    alone = torch.cat([_differ(answers(x[:count]), together[:count], rough) for count in (1, max(1, len(x) // 2))])
    facts = {
        "batch_size": alone.float().mean().item(),
        "companions": _differ(answers(mixed)[::2], together[::2], rough).float().mean().item(),
        "order": 0.0,
    }
    if all(site.draw_scope != "per_example" for _, site in random_sites(model)):
        facts["order"] = _differ(answers(x.flip(0)).flip(0), together, rough).float().mean().item()
    with torch.enable_grad():
        watched = answers(x.detach().clone().requires_grad_()).detach()
    facts["autograd"] = _differ(watched, together, rough).float().mean().item()
    first = answers(x[:1])
    facts["calls"] = float(torch.cat([_differ(answers(x[:1]), first) for _ in range(_NUM_CALLS)]).any().item())
    return facts


def _roughness(model: nn.Module) -> float:
    """Return the relative difference that another order of summation may make in the model's precision."""
    kinds = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    return max([1e-3, *(50 * torch.finfo(kind).eps for kind in kinds)])


def missing_gradients(model: nn.Module, x: Tensor, y: Tensor, threat_model: ThreatModel, seed: int) -> dict[str, float]:
    """Return, per loss and point, the share of samples whose mean input gradient over draws is zero or not finite."""
    draws = seeded_draws(_NUM_GRADIENT_DRAWS, seed, "gradient") if is_randomized(model) else (ONLY_DRAW,)
    ball = ball_around(x, threat_model.epsilon, threat_model.norm)
    start = ball.random_start(torch.Generator().manual_seed(draws[0].value))
    losses: dict[str, AttackLoss] = {"cross_entropy": cross_entropy, "margin": margin}
    shares = {}
    for point_name, point in (("image", x), ("random start", start)):
        for loss_name, loss in losses.items():
            attacked = AttackedModel(Predictor(model), FixedDraws(draws))
            gradient, _, _ = attacked.gradient(point, y, loss)
            flat = gradient.flatten(1)
            missing = ~flat.isfinite().all(1) | (flat == 0).all(1)
            shares[f"{loss_name}, {point_name}"] = missing.float().mean().item()
    return shares


def gradient_prediction(model: nn.Module, x: Tensor, y: Tensor, threat_model: ThreatModel, seed: int) -> dict[str, list[float]]:
    """Return what steps along the gradient of the margin do to it, as multiples of what the gradient predicts: 1 where it is a gradient.

    Steps of 1/50, 1/10 and 1/3 of the radius from images and from random starts, under one draw. Which of them a function is straight over
    depends on its size and precision; over none of them where the gradient is that of a wave, or of another function.

    Returns:
        Per point, the median over images for each step over which at least eight images have a gradient that rounding does not drown and
        an answer that moves at all; nothing where that is at most one.
    """
    (draw,) = seeded_draws(1, seed, "prediction") if is_randomized(model) else (ONLY_DRAW,)
    start = ball_around(x, threat_model.epsilon, threat_model.norm).random_start(torch.Generator().manual_seed(draw.value))
    predictor, found = Predictor(model), {}
    for name, point in (("image", x), ("random start", start)):
        gradient, _, _ = AttackedModel(predictor, FixedDraws((draw,))).gradient(point, y, margin)
        medians = [_moved(predictor, draw, point, y, gradient, share * threat_model.epsilon, threat_model.norm) for share in _STEPS]
        seen = [median for median in medians if median is not None]
        if len(seen) > 1:
            found[name] = seen
    return found


@torch.no_grad()
def _moved(predictor: Predictor, draw: Draw, x: Tensor, y: Tensor, gradient: Tensor, length: float, norm: Norm) -> float | None:
    """Return the median over images of what the margin gains by a step, as a multiple of what is predicted; None: too few say anything."""
    direction = gradient.sign() if norm == "linf" else gradient / gradient.flatten(1).norm(dim=1).clamp_min(1e-30).view(-1, 1, 1, 1)
    moved = (x + length * direction).clamp(0, 1)
    logits_BK, moved_BK = predictor.logits(x, draw).double(), predictor.logits(moved, draw).double()
    predicted_B = (gradient.double() * (moved.double() - x.double())).flatten(1).sum(1)
    gained_B = margin(moved_BK, y) - margin(logits_BK, y)
    usable = (predicted_B > _ABOVE_ROUNDING * logits_BK.abs().amax(1)) & (gained_B != 0) & gained_B.isfinite() & predicted_B.isfinite()
    if int(usable.sum()) < _FEWEST_STEPS:
        return None
    return (gained_B[usable] / predicted_B[usable]).median().item()


@torch.no_grad()
def output_facts(model: nn.Module, x: Tensor, y: Tensor, seed: int) -> dict[str, Any]:
    """Return whether outputs are probabilities instead of logits, and the median margin (absolute)."""
    (draw,) = seeded_draws(1, seed, "outputs")
    set_draw(model, draw)
    output = model(x)
    sums_to_one = ((output.sum(1) - 1).abs() <= 1e-5).all()
    return {
        "are_probabilities": bool((output >= 0).all() & sums_to_one),
        "median_margin": margin(output, y).abs().median().item(),
        "finite": bool(output.isfinite().all()),
    }


def gradient_calls_in_forward(model: nn.Module, x: Tensor) -> int:
    """Return how often one forward of `model` asks autograd for a gradient: more than 0 is optimization at test time."""
    calls = 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            return function(*arguments, **options)

        return call

    # Where `Tensor.backward` and `torch.autograd.grad` meet.
    with (
        mock.patch.object(torch.autograd, "backward", counted(torch.autograd.backward)),
        mock.patch.object(torch.autograd, "grad", counted(torch.autograd.grad)),
        torch.enable_grad(),
    ):
        model(x)
    return calls


def _differ(logits_BK: Tensor, reference_BK: Tensor, limit: float = _DIFFERENT) -> Tensor:
    """Return, per sample, whether logits differ by more than rounding, in units of the reference's largest logit."""
    scale_B = reference_BK.double().abs().amax(1).clamp_min(1e-300)
    return (logits_BK.double() - reference_BK.double()).abs().amax(1) > limit * scale_B
