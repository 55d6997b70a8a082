"""Whether a gradient leads from a model's logits to its pixels, and which attacks make sense where none does."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from analysis.attacked_model.plain_model import PlainModel, images_like, plain_model
from analysis.attacked_model.state_guard import restored_state
from analysis.attacked_model.straight_through import StraightThroughModel
from analysis.attacks.registry import attack_entry
from analysis.evaluation.suites import AttackItem
from models.modes import mode
from trainers.attacks import AttackLoss, cross_entropy, margin

_logger = logging.getLogger(__name__)

GradientPath = Literal["whole", "zero", "none"]

_NUM_TRIED = 8
_NUM_SEARCHED = 200  # images of the attacks that only ask


def gradient_path(model: nn.Module, x: Tensor, y: Tensor) -> GradientPath:
    """Return whether autograd knows a gradient from logits to pixels (`none`: it does not), and whether all of it is `zero`.

    A model that the registry built has one.
    """
    if getattr(model, "spec", None) is not None:
        return "whole"
    x, y = _tried(model, x, y)
    network = plain_model(model, x[:1])
    if isinstance(network, PlainModel) and not network.has_gradient:
        return "none"
    return "whole" if _any_gradient(network, x, y) else "zero"


def with_substitutes(
    items: Sequence[AttackItem], path: GradientPath, model: nn.Module, x: Tensor, y: Tensor
) -> tuple[list[AttackItem], list[str]]:
    """Return the attacks for a model with this path, and what was changed, in words.

    Without a path the attacks that follow gradients are left out. With none, or zeros only, attacks that need no gradient are added.
    """
    if path == "whole":
        return list(items), []
    remarks = []
    kept = [item for item in items if not (attack_entry(item.attack).uses_gradients and path == "none")]
    if len(kept) < len(items):
        names = ", ".join(item.name for item in items if item not in kept)
        remarks.append(f"left out, because no gradient leads from the logits to the pixels: {names}")
    num_draws = max((item.num_draws for item in items), default=1)
    added = [
        AttackItem(name="square", attack="square", parameters={"num_queries": 500}, num_draws=num_draws, num_samples=_NUM_SEARCHED),
        AttackItem(name="smoothed_gradient", attack="smoothed_gradient", num_draws=num_draws, num_samples=_NUM_SEARCHED),
        AttackItem(name="substitute", attack="substitute", num_draws=num_draws),
    ]
    if straight_through_helps(model, x, y):
        added.insert(0, AttackItem(name="straight_through", attack="straight_through", num_draws=num_draws))
    known = {item.attack for item in kept} | {item.name for item in kept}
    added = [item for item in added if item.attack not in known]
    if added:
        remarks.append(f"attacks that need no gradient are added: {', '.join(item.name for item in added)}")
    return [*kept, *added], remarks


def straight_through_helps(model: nn.Module, x: Tensor, y: Tensor) -> bool:
    """Return whether a gradient appears where the steps that cut it are passed straight through."""
    x, y = _tried(model, x, y)
    network = plain_model(model, x[:1])
    try:
        return _any_gradient(StraightThroughModel(network), x, y)
    except Exception as error:  # a step was taken for another: the model is not one for this attack
        _logger.info("the straight-through attack is not for this model: %s", error)
        return False


def _tried(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    like = images_like(model, x)
    return x[:_NUM_TRIED].to(like), y[:_NUM_TRIED].to(like.device)


def _any_gradient(network: nn.Module, x: Tensor, y: Tensor) -> bool:
    """Return whether some loss has a finite gradient other than zero at some image."""
    losses: tuple[AttackLoss, ...] = (cross_entropy, margin)
    with restored_state(network), mode(network, "eval"), torch.enable_grad():
        for loss in losses:
            leaf = x.detach().clone().requires_grad_()
            values_B = loss(network(leaf), y)
            if not values_B.requires_grad:
                continue
            (gradient,) = torch.autograd.grad(values_B.sum(), leaf, allow_unused=True)
            if gradient is not None and bool((gradient.flatten(1).isfinite().all(1) & (gradient.flatten(1) != 0).any(1)).any()):
                return True
    return False
