"""Batch normalization written in elementary operations, so that every derivative of it is right.

The fused kernel of the framework treats its saved statistics as constants when its forward-mode derivative is differentiated again:
in train mode a weight gradient taken through `torch.func.jvp`, or a nested `jvp`, is wrong without a word. Each of the elementary
operations here has correct derivatives of all orders.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from models.layer_replacement import OfType, replace_modules
from models.layers.channel_map import batch_norm_map
from models.layers.channel_statistics import BatchReduction, at_least_float32, channel_moments, normalize, pool_batch


class ExplicitBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` for (B, C, H, W) without the fused kernel in train mode.

    Same parameters, buffers, state-dict keys, running statistics (unbiased variance, momentum or cumulative average) and
    values up to rounding. In eval mode the map is affine and the fused kernel is used.

    Attributes:
        batch_reduction: how the moments of single examples become those of the batch; with another function than `pool_batch` the batch
            is that of several workers.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.batch_reduction: BatchReduction = pool_batch

    def forward(self, x_BCHW: Tensor) -> Tensor:
        self._check_input_dim(x_BCHW)
        uses_batch = self.training or self.running_mean is None
        if not uses_batch:
            return super().forward(x_BCHW)
        dtype = x_BCHW.dtype
        x_BCHW = at_least_float32(x_BCHW)  # statistics of reduced precision are useless; the fused kernel takes them in float32 as well
        if self.batch_reduction is not pool_batch:
            mean_C, variance_C, num_examples = self.batch_reduction(*channel_moments(x_BCHW))
            self._record(mean_C, variance_C, num_examples * x_BCHW.shape[2] * x_BCHW.shape[3])
            return normalize(x_BCHW, mean_C, variance_C, self.weight, self.bias, self.eps).to(dtype)
        axes = (0, 2, 3)
        mean_C = x_BCHW.mean(axes)
        centred_BCHW = x_BCHW - mean_C.view(1, -1, 1, 1)
        variance_C = centred_BCHW.square().mean(axes)
        self._record(mean_C, variance_C, x_BCHW.numel() // x_BCHW.shape[1])
        scale_C = torch.rsqrt(variance_C + self.eps)
        if self.weight is not None:
            scale_C = scale_C * self.weight
        out_BCHW = centred_BCHW * scale_C.view(1, -1, 1, 1)
        return (out_BCHW if self.bias is None else out_BCHW + self.bias.view(1, -1, 1, 1)).to(dtype)

    def channel_map(self) -> tuple[Tensor, Tensor] | None:
        """Return scale and shift (C,) of eval mode, those of `nn.BatchNorm2d`; None in train mode and without running statistics."""
        return batch_norm_map(self)

    @torch.no_grad()
    def _record(self, mean_C: Tensor, variance_C: Tensor, count: int | Tensor) -> None:
        """Take batch statistics over `count` values per channel into the running ones, where they are tracked."""
        if not (self.training and self.track_running_stats and self.running_mean is not None):
            return
        if isinstance(count, int) and count < 2:
            raise ValueError(f"batch statistics need more than one value per channel, got input with {count}")
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        weight = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean_C.to(self.running_mean.dtype), weight)
        self.running_var.lerp_((variance_C * (count / (count - 1))).to(self.running_var.dtype), weight)


def make_batch_norm_explicit(model: nn.Module) -> list[str]:
    """Replace every `nn.BatchNorm2d` below `model` by an `ExplicitBatchNorm2d` with the same parameters and buffers, in place.

    A subclass stays as it is: its derivatives are its own affair, and what it adds would be lost.

    Parameters and buffers are the same objects as before; state dicts are interchangeable in both directions.

    Returns:
        The names of the replaced layers; empty if there was none to replace.
    """
    fused = _FusedBatchNorm((nn.BatchNorm2d,))
    if not any(fused(name, module) for name, module in model.named_modules()):
        return []
    return replace_modules(model, fused, lambda _name, module: _explicit(module))


class _FusedBatchNorm(OfType):
    def __call__(self, name: str, module: nn.Module) -> bool:
        return type(module) is nn.BatchNorm2d


def _explicit(module: nn.Module) -> ExplicitBatchNorm2d:
    assert isinstance(module, nn.BatchNorm2d)
    new = ExplicitBatchNorm2d(module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats, device="meta")
    new.weight, new.bias = module.weight, module.bias
    new.running_mean, new.running_var = module.running_mean, module.running_var
    new.num_batches_tracked = module.num_batches_tracked
    return new
