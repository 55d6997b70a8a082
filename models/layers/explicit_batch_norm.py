"""Batch normalization written in elementary operations, so that every derivative of it is right.

The fused kernel of the framework treats its saved statistics as constants when its forward-mode derivative is differentiated again:
in train mode a weight gradient taken through `torch.func.jvp`, or a nested `jvp`, is wrong without a word. Each of the elementary
operations here has correct derivatives of all orders.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.layer_replacement import OfType, replace_modules


class ExplicitBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` for (B, C, H, W) without the fused kernel in train mode.

    Same parameters, buffers, state-dict keys, running statistics (unbiased variance, momentum or cumulative average) and
    values up to rounding. In eval mode the map is affine and the fused kernel is used.
    """

    def forward(self, x_BCHW: Tensor) -> Tensor:
        self._check_input_dim(x_BCHW)
        uses_batch = self.training or self.running_mean is None
        if not uses_batch:
            return super().forward(x_BCHW)
        dtype = x_BCHW.dtype
        if dtype.itemsize < 4:  # statistics of reduced precision are useless; the fused kernel takes them in float32 as well
            x_BCHW = x_BCHW.float()
        axes = (0, 2, 3)
        mean_C = x_BCHW.mean(axes)
        centred_BCHW = x_BCHW - mean_C.view(1, -1, 1, 1)
        variance_C = centred_BCHW.square().mean(axes)
        if self.training and self.track_running_stats and self.running_mean is not None:
            self._update_running_statistics(mean_C.detach(), variance_C.detach(), x_BCHW.numel() // x_BCHW.shape[1])
        scale_C = torch.rsqrt(variance_C + self.eps)
        if self.weight is not None:
            scale_C = scale_C * self.weight
        out_BCHW = centred_BCHW * scale_C.view(1, -1, 1, 1)
        return (out_BCHW if self.bias is None else out_BCHW + self.bias.view(1, -1, 1, 1)).to(dtype)

    @torch.no_grad()
    def _update_running_statistics(self, mean_C: Tensor, variance_C: Tensor, count: int) -> None:
        if count < 2:
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
        return super().__call__(name, module) and not isinstance(module, ExplicitBatchNorm2d)


def _explicit(module: nn.Module) -> ExplicitBatchNorm2d:
    assert isinstance(module, nn.BatchNorm2d)
    new = ExplicitBatchNorm2d(module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats, device="meta")
    new.weight, new.bias = module.weight, module.bias
    new.running_mean, new.running_var = module.running_mean, module.running_var
    new.num_batches_tracked = module.num_batches_tracked
    return new
