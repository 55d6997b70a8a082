"""A model's answers with the gradients of another one: the backward pass that a caller knows for what autograd cannot pass through.

Reference: Athalye, Carlini, Wagner, Obfuscated Gradients Give a False Sense of Security, ICML 2018, section 4.1 (BPDA).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from analysis.attacked_model.plain_model import PlainModel, images_like, logits_of, parameter_like, plain_model
from analysis.attacked_model.state_guard import restored_state
from models.errors import UserError
from models.modes import mode


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


def with_backward(model: nn.Module, backward: Any, x: Tensor) -> WithBackward:
    """Return a model with another one's backward pass, which may compute in another precision, tried on a few images (B, C, H, W).

    Raises:
        UserError: `backward` is no module, its logits have another shape, or no gradient leads from them to the pixels.
    """
    if not isinstance(backward, nn.Module):
        raise UserError(f"backward must be a torch.nn.Module that maps the model's images to logits, not {type(backward).__name__}")
    x = x.to(images_like(model, x))
    judged = plain_model(model, x)
    try:
        stand_in = plain_model(backward, x)
    except UserError as error:
        raise UserError(f"backward: {error}") from None
    if not isinstance(stand_in, PlainModel):
        stand_in = PlainModel(stand_in, parameter_like(stand_in, x).dtype)  # the model may have its images in another precision
    if not stand_in.has_gradient:
        raise UserError("no gradient leads from the logits of backward to the pixels, so that it cannot stand in for the model's own")
    with restored_state(judged), restored_state(stand_in), mode(judged, "eval"), mode(stand_in, "eval"), torch.no_grad():
        given, wanted = tuple(stand_in(x).shape), tuple(judged(x).shape)
    if given != wanted:
        raise UserError(f"backward gives logits of shape {given} where the model gives {wanted}")
    return WithBackward(model, stand_in)


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


__all__ = ["WithBackward", "values_with_gradient_of", "with_backward"]
