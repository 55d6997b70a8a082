"""A model's answers with the gradients of another one: the backward pass that a caller knows for what autograd cannot pass through.

Reference: Athalye, Carlini, Wagner, Obfuscated Gradients Give a False Sense of Security, ICML 2018, section 4.1 (BPDA).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from analysis.attacked_model.plain_model import logits_of


class WithBackward(nn.Module):
    """`model` forward, `backward` backward.

    Args:
        model: the classifier that is judged.
        backward: maps the same images to logits of the same shape, differentiably: for instance the same network with a smooth stand-in
            for the step that cuts the gradient. It may share modules with `model`. Only its gradients are used.
    """

    def __init__(self, model: nn.Module, backward: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.stand_in = backward
        self.train(model.training)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            values_BK = logits_of(self.model(x))
        if not (torch.is_grad_enabled() and x.requires_grad):
            return values_BK
        return values_with_gradient_of(values_BK, logits_of(self.stand_in(x)))


def values_with_gradient_of(values: Tensor, differentiable: Tensor) -> Tensor:
    """Return `values`, exactly, through which gradients pass as if they were `differentiable`, a tensor of the same shape.

    Raises:
        ValueError: the shapes differ.
    """
    if values.shape != differentiable.shape:
        raise ValueError(f"the backward pass gives {tuple(differentiable.shape)} for answers of shape {tuple(values.shape)}")
    result: Tensor = _Values.apply(values.detach().to(differentiable.dtype), differentiable)
    return result


class _Values(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, differentiable: Tensor) -> Tensor:  # type: ignore[override] # autograd's is (*args)
        del ctx, differentiable
        return values.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:  # type: ignore[override] # as above
        del ctx
        return None, gradient


__all__ = ["WithBackward", "values_with_gradient_of"]
