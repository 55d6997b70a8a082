"""Adversarial examples against an ensemble: which of its members' losses the attack climbs.

Shapes: B batch, C channels, H and W pixels, K classes, N members.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.ensemble import ensemble_in, inference_mode_of
from models.layers.hypernetwork import generated_weights
from models.randomness import Stream, derive_seed
from trainers.step import StepContext

EnsembleExample = Literal["random_member_per_step", "random_member", "mean_loss", "mean_prob"]
"""`random_member_per_step`: a new random member at each attack step (projected gradient descent on the random ensemble itself);
`random_member`: one random member per batch; `mean_loss`: mean cross-entropy over all members, the exact expectation over the draw;
`mean_prob`: cross-entropy of the mean probability."""


def ensemble_examples(model: nn.Module, x_BCHW: Tensor, y_B: Tensor, context: StepContext, example: EnsembleExample) -> Tensor:
    """Return one detached adversarial example per image, shared by all members.

    Radius, steps, start and mode are the context's. Random layers inside members redraw by the context's policy, and at each attack
    step under `random_member_per_step`. One member's graph is alive at a time, except under `mean_prob`. Random members are the same on
    every worker, so that each attacks its part of the batch as one worker would attack the whole.
    """
    with generated_weights(model, detach=True):
        if example == "mean_loss":
            surface = _MeanLossSurface(model, y_B)
            return context.adversarial_examples(surface, x_BCHW, y_B, loss=_given_loss)
        if example == "mean_prob":
            with inference_mode_of(model, "mean_prob"):
                return context.adversarial_examples(model, x_BCHW, y_B)
        redraw = "each_attack_step" if example == "random_member_per_step" else context.redraw
        if example == "random_member" and redraw == "each_attack_step":
            redraw = "attack_then_step"
        with inference_mode_of(model, "rsi_call"), _common_members(model, context):
            return dataclasses.replace(context, redraw=redraw).adversarial_examples(model, x_BCHW, y_B)


def example_passes(attack_steps: int, num_members: int, example: EnsembleExample) -> float:
    """Return what such an example costs, counted as `Objective.passes` does."""
    return 2.0 * attack_steps * (num_members if example in ("mean_loss", "mean_prob") else 1)


@contextlib.contextmanager
def _common_members(model: nn.Module, context: StepContext) -> Iterator[None]:
    """Within, the members that are drawn depend on seed, epoch and step alone, not on the rank as those that answer examples do."""
    ensemble = ensemble_in(model)
    own = ensemble.stream
    ensemble.stream = Stream(derive_seed(context.streams.seed, "attacked members", context.epoch, context.step))
    try:
        yield
    finally:
        ensemble.stream = own


def mean_member_loss(members: Iterable[nn.Module], x_BCHW: Tensor, y_B: Tensor) -> Tensor:
    """Return the mean over the members of each example's cross-entropy, (B,), differentiable once with respect to x alone.

    Members are evaluated and differentiated one after the other: memory does not grow with N.
    """
    return _MemberByMember.apply(x_BCHW, y_B, tuple(members))


class _MemberByMember(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BCHW: Tensor, y_B: Tensor, members: tuple[nn.Module, ...]) -> Tensor:
        leaf = x_BCHW.detach().requires_grad_()
        loss_sum_B, gradient_sum = x_BCHW.new_zeros(len(x_BCHW)), torch.zeros_like(x_BCHW)
        for member in members:
            with torch.enable_grad():
                logits_BK = member(leaf)
                loss_B = functional.cross_entropy(logits_BK.to(x_BCHW.dtype), y_B, reduction="none")
                (gradient,) = torch.autograd.grad(loss_B.sum(), leaf)
            loss_sum_B = loss_sum_B + loss_B.detach()
            gradient_sum = gradient_sum + gradient
        ctx.save_for_backward(gradient_sum / len(members))
        return loss_sum_B / len(members)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, weight_B: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * weight_B.view(-1, *(1 for _ in gradient.shape[1:])), None, None


class _MeanLossSurface(nn.Module):
    """The mean loss of all members as the single output of a module that attacks can redraw and put in a mode."""

    def __init__(self, model: nn.Module, y_B: Tensor) -> None:
        super().__init__()
        self.model = model
        self.y_B = y_B

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return mean_member_loss(list(ensemble_in(self.model).members), x_BCHW, self.y_B).unsqueeze(1)


def _given_loss(loss_B1: Tensor, _: Tensor) -> Tensor:
    return loss_B1.squeeze(1)
