"""A user's model as attacks need it: float32 or float64 images in, a tensor of logits out, a gradient to the pixels or plain zeros.

What the registry built is such a model. Others return tuples or dictionaries, compute in half precision (their images then stay in
float32: a radius of 8/255 is no number of float16), or have no path from logits to pixels along which a gradient could flow.

Shapes: B batch, K classes.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from analysis.attacked_model.state_guard import restored_state
from models.errors import UserError
from models.modes import mode

_logger = logging.getLogger(__name__)
_FULL_PRECISION = (torch.float32, torch.float64)


def logits_of(output: Any) -> Tensor:
    """Return the logits in what a model returned: a tensor, the entry `logits`, the only tensor, or the first of a tuple.

    Raises:
        UserError: it is not plain which part is the logits.
    """
    logits_BK = _part_with_logits(output)
    if logits_BK.is_complex():
        raise UserError("the model returns complex numbers; logits (B, K) are real ones")
    return logits_BK if logits_BK.layout == torch.strided else logits_BK.to_dense()


def _part_with_logits(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    if isinstance(output, np.ndarray):
        return torch.as_tensor(output)
    named = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(named, Tensor):
        return named
    if isinstance(output, Mapping):
        tensors = [value for value in output.values() if isinstance(value, Tensor)]
        if len(tensors) == 1:
            return tensors[0]
        raise UserError(
            f"the model returns a dictionary with {', '.join(map(repr, output)) or 'nothing'}; its logits (B, K) must be under 'logits'"
        )
    if isinstance(output, tuple | list) and output and isinstance(output[0], Tensor) and output[0].dim() == 2:
        return output[0]
    first = f" that begins with a {type(output[0]).__name__}" if isinstance(output, tuple | list) and output else ""
    raise UserError(
        "the model must return logits of shape (B, K), or a tuple that begins with them, or a dictionary, "
        f"not a {type(output).__name__}{first}"
    )


def parameter_like(model: nn.Module, default: Tensor) -> Tensor:
    """Return the first floating-point parameter or buffer, whose device and dtype the model's images have; without one, `default`."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            return tensor
    return default


def images_like(model: nn.Module, default: Tensor) -> Tensor:
    """Return an empty tensor with the device and dtype in which images are attacked: never less than float32."""
    like = parameter_like(model, default)
    return torch.empty(0, device=like.device, dtype=like.dtype if like.dtype in _FULL_PRECISION else torch.float32)


class PlainModel(nn.Module):
    """`model` with full-precision images, a tensor of logits, and zeros for a gradient where there is none.

    Args:
        model: any classifier.
        dtype: that its images must have.
        cut: run it outside autograd, which it does not bear.
        has_gradient: whether autograd leads from its logits to its pixels.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, *, cut: bool = False, has_gradient: bool = True) -> None:
        super().__init__()
        self.model = model
        self.dtype = dtype
        self.cut = cut
        self.has_gradient = has_gradient
        self.train(model.training)

    def forward(self, x: Tensor) -> Tensor:
        x_model = x if x.dtype == self.dtype else x.to(self.dtype)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.cut):  # a model that turns autograd off does so for itself
            logits_BK = logits_of(self.model(x_model.detach() if self.cut else x_model))
        logits_BK = logits_BK.to(x)
        if torch.is_grad_enabled() and x.requires_grad and not logits_BK.requires_grad:
            return _zero_gradient(x, logits_BK)
        return logits_BK


class _ZeroGradient(torch.autograd.Function):
    """Values that do not depend on the pixels as autograd sees it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, logits_BK: Tensor) -> Tensor:  # type: ignore[override] # autograd's own signature is (*args)
        ctx.like = (x.shape, x.dtype, x.device)
        return logits_BK.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override] # as above
        del gradient
        shape, dtype, device = ctx.like
        return torch.zeros(shape, dtype=dtype, device=device), None


def _zero_gradient(x: Tensor, logits_BK: Tensor) -> Tensor:
    result: Tensor = _ZeroGradient.apply(x, logits_BK)
    return result


def plain_model(model: nn.Module, x: Tensor) -> nn.Module:
    """Return the model itself where it is one that attacks can work with, else a `PlainModel` around it. It is as before afterwards.

    Args:
        model: any classifier.
        x: an image or a few (B, C, H, W) as `images_like` says, on which it is tried.

    Raises:
        UserError: the model cannot be run on these images, or does not return logits.
    """
    like = parameter_like(model, x)
    dtype = like.dtype
    if getattr(model, "spec", None) is not None and dtype in _FULL_PRECISION:
        return model
    tried = x.to(like)
    with restored_state(model), mode(model, "eval"):
        try:
            with torch.enable_grad():
                given = tried.detach().clone().requires_grad_()
                output = model(given)
                leaves_autograd_on = torch.is_grad_enabled()
            cut = False
        except (Exception, SystemExit):  # e.g. it calls `numpy()`; without a graph it may well run
            cut, leaves_autograd_on = True, True
            given = tried.detach().clone()
            try:
                with torch.no_grad():
                    output = model(given)
            except (Exception, SystemExit) as error:
                shape = tuple(x.shape[1:])
                raise UserError(
                    f"the model cannot be run on images of shape {shape}: {type(error).__name__}: {_first_line(error)}"
                ) from error
        if not torch.equal(given.detach(), tried):
            raise UserError(
                "the model changes the images that it is given in place, so that nobody knows what it answered: let it copy them"
            )
        logits_BK = logits_of(output)
        if logits_BK.requires_grad and not _goes_back(logits_BK, given):
            cut = True
    has_gradient = logits_BK.requires_grad and not cut
    plain = isinstance(output, Tensor) and output.dtype in _FULL_PRECISION and output.dtype == x.dtype == dtype
    if plain and has_gradient and leaves_autograd_on and output.layout == torch.strided:
        return model
    return PlainModel(model, dtype, cut=cut, has_gradient=has_gradient)


def _goes_back(logits_BK: Tensor, x: Tensor) -> bool:
    """Return whether a backward pass ends without an error."""
    try:
        torch.autograd.grad(logits_BK.sum(), x, allow_unused=True)
    except Exception as error:  # of the model's own code: any kind
        _logger.info("no gradient is taken from the model: its backward pass raises %s: %s", type(error).__name__, _first_line(error))
        return False
    return True


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
