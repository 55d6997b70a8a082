"""Normalization over the pixels of each example (instance, group, layer normalization) of channels-last maps on a CPU.

PyTorch's own kernel takes 3 to 8 times as long there (torch 2.15, forward and backward, float32; 30 times in bf16): it walks through
the pixels of one channel, which lie C values apart. Here every pass runs along the channels, and over so few examples at a time
that they stay in the cache. Mean and variance are taken in two passes, so that a large mean costs no digits.

Shapes: B batch, C channels, H and W pixels, P = H*W, G groups of c = C/G channels. Statistics are float32 at least.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_CHUNK_BYTES = 1 << 20
"""Of one pass's values; a pass reads and writes two or three of them, and all should fit into the caches. 2**17 to 2**30 were measured."""
_FEW_CHANNELS = 64


def normalize_each_example(x_BCHW: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Return what `functional.group_norm` returns, channels last; differentiable as often as one likes, not in forward mode.

    Args:
        x_BCHW: channels last in memory, on a CPU.
        num_groups: G; C normalizes every channel for itself.
        weight, bias: (C,), both or none.
        eps: added to the variance.
    """
    out_BCHW, _, _ = _NormalizeEachExample.apply(x_BCHW, weight, bias, num_groups, eps)
    return out_BCHW


def is_eager_channels_last(x_BCHW: Tensor) -> bool:
    """Return whether maps are what this file is for: channels last, on a CPU, and neither compiled nor transformed (`torch.func`)."""
    if x_BCHW.device.type != "cpu" or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    return x_BCHW.is_contiguous(memory_format=torch.channels_last) and not x_BCHW.is_contiguous()


def is_faster_by_copies(x_BCHW: Tensor) -> bool:
    """Return whether PyTorch's kernel on contiguous copies is faster: for few channels in half precision, by a third."""
    return x_BCHW.dtype.itemsize < 4 and x_BCHW.shape[1] < _FEW_CHANNELS


class _NormalizeEachExample(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_BCHW: Tensor, weight: Tensor | None, bias: Tensor | None, num_groups: int, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        x_BPC = _pixels_first(x_BCHW)
        out_BCHW = torch.empty_like(x_BCHW)
        out_BPC = _pixels_first(out_BCHW)
        dtype = _statistics_dtype(x_BCHW)
        batch, channels = x_BCHW.shape[:2]
        mean_B1C = torch.empty(batch, 1, channels, dtype=dtype)
        rstd_B1C = torch.empty_like(mean_B1C)
        for rows, (centred, squared) in _chunks(x_BPC, dtype, scratch=2):
            x = _widened(x_BPC[rows], centred)
            mean = _pooled(x.mean(1, keepdim=True), num_groups)
            torch.sub(x, mean, out=centred)
            torch.mul(centred, centred, out=squared)
            rstd = _pooled(squared.mean(1, keepdim=True), num_groups).add(eps).rsqrt_()
            mean_B1C[rows], rstd_B1C[rows] = mean, rstd
            scale, shift = (rstd, rstd.new_zeros(())) if weight is None or bias is None else (rstd * weight, bias.to(dtype))
            into = out_BPC[rows]
            _narrowed(torch.addcmul(shift, centred, scale, out=_room_for(into, squared)), into)
        ctx.save_for_backward(x_BCHW, weight, bias, mean_B1C, rstd_B1C)
        ctx.num_groups, ctx.eps = num_groups, eps
        ctx.mark_non_differentiable(mean_B1C, rstd_B1C)
        return out_BCHW, mean_B1C, rstd_B1C

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x_BCHW, weight, bias, mean_B1C, rstd_B1C = ctx.saved_tensors
        if torch.is_grad_enabled():  # a gradient that is itself differentiated, by x and weight as well
            return (*_differentiable_gradients(x_BCHW, weight, bias, gradients[0], ctx.num_groups, ctx.eps), None, None)
        upstream_BPC = _pixels_first(gradients[0].contiguous(memory_format=torch.channels_last))
        x_BPC = _pixels_first(x_BCHW)
        gradient_BCHW = torch.empty_like(x_BCHW)
        gradient_BPC = _pixels_first(gradient_BCHW)
        dtype = mean_B1C.dtype
        factor = weight.to(dtype) if weight is not None else torch.ones((), dtype=dtype)
        sum_B1C, product_B1C = torch.empty_like(mean_B1C), torch.empty_like(mean_B1C)
        for rows, (centred, product, wide) in _chunks(x_BPC, dtype, scratch=3):
            rstd, upstream = rstd_B1C[rows], _widened(upstream_BPC[rows], wide)
            torch.sub(_widened(x_BPC[rows], centred), mean_B1C[rows], out=centred)
            torch.mul(upstream, centred, out=product)
            sum_ = sum_B1C[rows] = upstream.mean(1, keepdim=True)
            along = product_B1C[rows] = product.mean(1, keepdim=True) * rstd
            constant = _pooled(sum_ * factor, ctx.num_groups) * -rstd
            slope = _pooled(along * factor, ctx.num_groups) * -rstd.square()
            torch.addcmul(constant, centred, slope, out=centred)
            into = gradient_BPC[rows]
            _narrowed(torch.addcmul(centred, upstream, rstd * factor, out=_room_for(into, product)), into)
        num_pixels = x_BPC.shape[1]
        weight_gradient = product_B1C.sum((0, 1)).mul_(num_pixels).to(weight.dtype) if ctx.needs_input_grad[1] else None
        bias_gradient = sum_B1C.sum((0, 1)).mul_(num_pixels).to(bias.dtype) if ctx.needs_input_grad[2] else None
        return gradient_BCHW, weight_gradient, bias_gradient, None, None


def _differentiable_gradients(
    x_BCHW: Tensor, weight: Tensor | None, bias: Tensor | None, upstream_BCHW: Tensor, num_groups: int, eps: float
) -> tuple[Tensor | None, ...]:
    """Return the gradients by x, weight and bias through elementary operations, which autograd differentiates further."""
    inputs = [value for value in (x_BCHW, weight, bias) if value is not None]
    x_BPC = _pixels_first(x_BCHW)
    dtype = _statistics_dtype(x_BCHW)
    centred = x_BPC.to(dtype) - _pooled(x_BPC.mean(1, keepdim=True, dtype=dtype), num_groups)
    out_BPC = centred * (_pooled(centred.square().mean(1, keepdim=True), num_groups) + eps).rsqrt()
    if weight is not None and bias is not None:
        out_BPC = torch.addcmul(bias.to(dtype), out_BPC, weight.to(dtype))
    out_BCHW = out_BPC.unflatten(1, x_BCHW.shape[2:]).permute(0, 3, 1, 2).to(x_BCHW.dtype)
    wanted = [value for value in inputs if value.requires_grad]
    found = iter(torch.autograd.grad(out_BCHW, wanted, upstream_BCHW, create_graph=True))
    return tuple(next(found) if value is not None and value.requires_grad else None for value in (x_BCHW, weight, bias))


def _pixels_first(x_BCHW: Tensor) -> Tensor:
    """Return channels-last maps as (B, P, C), without a copy."""
    return x_BCHW.permute(0, 2, 3, 1).flatten(1, 2)


def _statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.float32 if x.dtype.itemsize < 4 else x.dtype


def _chunks(x_BPC: Tensor, dtype: torch.dtype, scratch: int) -> Iterator[tuple[slice, list[Tensor]]]:
    """Yield slices of the batch small enough for the cache, each with room for this many times its values."""
    batch, pixels, channels = x_BPC.shape
    size = max(1, min(batch, _CHUNK_BYTES // max(1, pixels * channels * dtype.itemsize)))
    room = [torch.empty(size, pixels, channels, dtype=dtype) for _ in range(scratch)]
    for start in range(0, batch, size):
        stop = min(start + size, batch)
        yield slice(start, stop), [values[: stop - start] for values in room]


def _widened(values: Tensor, room: Tensor) -> Tensor:
    """Return values in the precision of `room`: half-precision ones as copies there, for kernels of mixed types are slow."""
    return values if values.dtype == room.dtype else room.copy_(values)


def _room_for(into: Tensor, room: Tensor) -> Tensor:
    return into if into.dtype == room.dtype else room


def _narrowed(values: Tensor, into: Tensor) -> None:
    """Put values into a tensor of half precision; those of full precision were computed there (`_room_for`)."""
    if values.dtype != into.dtype:
        into.copy_(values)


def _pooled(values_B1C: Tensor, num_groups: int) -> Tensor:
    """Return the mean over the channels of each group, for each of them again."""
    if num_groups == values_B1C.shape[-1]:
        return values_B1C
    grouped = values_B1C.unflatten(-1, (num_groups, -1))
    return grouped.mean(-1, keepdim=True).expand_as(grouped).flatten(-2)
