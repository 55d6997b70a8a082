"""Normalizations as one family: per-(sample, channel) means and variances, pooled over groups of channels and over the batch.

Shapes: B batch, C channels, G groups, H and W pixels. Variances are biased unless said otherwise.

| name             | pooled over the batch | groups                |
|------------------|-----------------------|-----------------------|
| `bn`             | yes                   | C: one channel each   |
| `bgn_groups_32`  | yes                   | 32                    |
| `bgn_size_2`     | yes                   | C / 2, of 2 channels  |
| `in`             | no                    | C                     |
| `gn_groups_32`   | no                    | 32                    |
| `gn_size_2`      | no                    | C / 2                 |
| `ln`             | no                    | 1                     |

Reference: Dong, Chen, Wang, Xu, "Random Normalization Aggregation for Adversarial Defense", NeurIPS 2022, Eq. 3.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.errors import UserError, nearest
from models.layers.example_normalization import is_eager_channels_last, is_faster_by_copies, normalize_each_example

BatchReduction = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, int | Tensor]]

_EXAMPLES = ("bn", "in", "ln", "gn_groups_32", "gn_size_1", "bgn_groups_32", "bgn_size_2")
_GROUPED = re.compile(r"^(gn|bgn)_(groups|size)_(\d+)$")


@dataclass(frozen=True)
class NormalizationType:
    """One normalization, independent of the number of channels. Two are equal if they compute the same: `in` and `gn_size_1`.

    Attributes:
        name: as the user wrote it, e.g. `gn_size_2`.
        over_batch: statistics are pooled over the batch, and running ones are used in eval mode.
        num_groups: number of groups; None if `group_size` says it.
        group_size: channels per group; None if `num_groups` says it.
    """

    name: str = field(compare=False)
    over_batch: bool
    num_groups: int | None = None
    group_size: int | None = None

    def groups(self, num_channels: int) -> int:
        """Return G for a layer of `num_channels` channels.

        More groups than channels become one channel per group, as in the official code.

        Raises:
            UserError: the channels cannot be split evenly, or a group is larger than the layer (the official code fails there, too).
        """
        if self.num_groups is not None:
            count = min(self.num_groups, num_channels)
            if num_channels % count:
                raise UserError(
                    f"normalization {self.name!r}: {num_channels} channels cannot be split into {count} equal groups; "
                    f"possible numbers of groups near it: {_near_divisors(num_channels, count)}"
                )
            return count
        assert self.group_size is not None
        if num_channels % self.group_size:  # also where the group is larger than the layer
            raise UserError(
                f"normalization {self.name!r}: {num_channels} channels cannot be split into groups of {self.group_size}; "
                f"possible sizes near it: {_near_divisors(num_channels, self.group_size)}"
            )
        return num_channels // self.group_size


def parse_normalization(text: str) -> NormalizationType:
    """Read `bn`, `in`, `ln`, `gn_groups_G`, `gn_size_S`, `bgn_groups_G` or `bgn_size_S`.

    Raises:
        UserError: it is none of these, or the number is 0.
    """
    if text == "bn":
        return NormalizationType(text, over_batch=True, group_size=1)
    if text == "in":
        return NormalizationType(text, over_batch=False, group_size=1)
    if text == "ln":
        return NormalizationType(text, over_batch=False, num_groups=1)
    match = _GROUPED.match(text)
    if match and int(match.group(3)) > 0:
        number = int(match.group(3))
        return NormalizationType(
            text,
            over_batch=match.group(1) == "bgn",
            num_groups=number if match.group(2) == "groups" else None,
            group_size=number if match.group(2) == "size" else None,
        )
    close = nearest(text, _EXAMPLES, count=2)
    hint = f" Did you mean {' or '.join(repr(name) for name in close)}?" if close else ""
    raise UserError(
        f"unknown normalization {text!r}.{hint} Known: bn, in, ln, and with a positive number of groups or of channels per group: "
        "gn_groups_32, gn_size_2, bgn_groups_32, bgn_size_2."
    )


def channel_moments(x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance over the pixels, both (B, C), in float32 at least."""
    x_BCHW = at_least_float32(x_BCHW)
    if not is_eager_channels_last(x_BCHW):
        variance_BC, mean_BC = torch.var_mean(x_BCHW, dim=(2, 3), correction=0)
        return mean_BC, variance_BC
    mean_BC = x_BCHW.mean(dim=(2, 3))  # in two passes: there, `var_mean` takes 10 times as long
    return mean_BC, (x_BCHW - mean_BC[:, :, None, None]).square().mean(dim=(2, 3))


def pool_groups(mean_BC: Tensor, variance_BC: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """Return mean and variance of groups of channels of equal size, (B, G), by the law of total variance."""
    if num_groups == mean_BC.shape[1]:
        return mean_BC, variance_BC
    mean_BGc = mean_BC.unflatten(1, (num_groups, -1))
    mean_BG = mean_BGc.mean(dim=2)
    between_BG = (mean_BGc - mean_BG.unsqueeze(2)).square().mean(dim=2)
    return mean_BG, variance_BC.unflatten(1, (num_groups, -1)).mean(dim=2) + between_BG


def pool_batch(mean_BG: Tensor, variance_BG: Tensor) -> tuple[Tensor, Tensor, int | Tensor]:
    """Return mean (G,), variance (G,) and number of examples of the whole batch, by the law of total variance.

    The one place where examples meet: a reduction over several workers replaces this function
    (`Normalization2d.batch_reduction`) and returns the number of examples of all of them.
    """
    mean_G = mean_BG.mean(dim=0)
    return mean_G, variance_BG.mean(dim=0) + (mean_BG - mean_G).square().mean(dim=0), mean_BG.shape[0]


@dataclass(frozen=True)
class NormalizedGroups:
    """What a normalization does to a map (B, C, H, W) in eval mode.

    Attributes:
        kind: its name, e.g. `bn` or `gn_size_2`.
        num_groups: G; each group of channels has a mean and a variance of its own.
        eps: added to the variance.
        weight: (C,), multiplies what is normalized; None: nothing does.
        running_var: (G,), of the batches seen in training; None: the variance is that of the example.
    """

    kind: str
    num_groups: int
    eps: float
    weight: Tensor | None
    running_var: Tensor | None


@runtime_checkable
class NormalizesGroups(Protocol):
    """A layer that normalizes groups of channels, and says so by having the method."""

    def normalized_groups(self) -> NormalizedGroups:
        """Return what it does in eval mode."""


def normalized_groups(module: nn.Module) -> NormalizedGroups | None:
    """Return what a layer normalizes in eval mode; None: it is no normalization, or one that does not say."""
    if isinstance(module, NormalizesGroups):
        return module.normalized_groups()
    if isinstance(module, nn.BatchNorm2d) and module.running_var is not None:
        return NormalizedGroups("bn", module.num_features, module.eps, module.weight, module.running_var)
    return None


def is_synchronized(model: nn.Module) -> bool:
    """Return whether some normalization of `model` takes its batch statistics over several workers."""
    return any(
        isinstance(module, nn.SyncBatchNorm) or getattr(module, "batch_reduction", pool_batch) is not pool_batch
        for module in model.modules()
    )


def at_least_float32(x: Tensor) -> Tensor:
    """Return x, half-precision types converted to float32."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def spread(values: Tensor, num_channels: int) -> Tensor:
    """Repeat values of groups (..., G) for their channels: (..., C)."""
    repeats = num_channels // values.shape[-1]
    return values if repeats == 1 else values.repeat_interleave(repeats, dim=-1)


class Normalization2d(nn.Module):
    """Any normalization of the family on maps (B, C, H, W), with affine parameters and, if pooled over the batch, running statistics.

    Equal to BatchNorm2d (`bn`), GroupNorm (`gn`, `in`, `ln`) and InstanceNorm2d (`in`). In training mode a normalization over the
    batch uses batch statistics and, while `track_running_stats`, records them; in eval mode it uses the recorded ones.

    Args:
        num_channels: C.
        kind: which normalization.
        eps: added to the variance.
        momentum: weight of the newest batch in the running statistics; None: they are the mean over all batches since
            `reset_running_stats`, each weighted by its share.
        affine: learn a scale and a shift per channel.

    Deviation: the official code's BGN keeps only `momentum` of the old statistics and corrects the variance twice; here
    BGN of group size 1 is BatchNorm2d.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        num_channels: int,
        kind: NormalizationType,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
    ) -> None:
        super().__init__()
        self.num_channels = num_channels
        self.kind = kind
        self.num_groups = kind.groups(num_channels)
        self.eps = eps
        self.momentum = momentum
        self.track_running_stats = kind.over_batch
        self.batch_reduction: BatchReduction = pool_batch
        if affine:
            self.weight = nn.Parameter(torch.ones(num_channels))
            self.bias = nn.Parameter(torch.zeros(num_channels))
        else:
            self.register_parameter("weight", None)
            self.register_parameter("bias", None)
        if kind.over_batch:
            self.register_buffer("running_mean", torch.zeros(self.num_groups))
            self.register_buffer("running_var", torch.ones(self.num_groups))
            self.register_buffer("num_batches_tracked", torch.tensor(0))
        self._recorded_share: Tensor | float = 0.0

    def reset_running_stats(self) -> None:
        """Forget all batches."""
        if self.kind.over_batch:
            self.running_mean.zero_()
            self.running_var.fill_(1)
            self.num_batches_tracked.zero_()
            self._recorded_share = 0.0

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Normalize with PyTorch's kernels where they exist for this kind."""
        if not self.kind.over_batch:
            return self._per_example(x_BCHW)
        if self.training and self.batch_reduction is not pool_batch:
            mean_BC, variance_BC = self.moments(x_BCHW, *channel_moments(x_BCHW))
            return normalize(x_BCHW, mean_BC, variance_BC, self.weight, self.bias, self.eps)
        record = self.training and self.track_running_stats
        if record:
            self.num_batches_tracked.add_(1)
        momentum = self.momentum if self.momentum is not None else 1 / max(1, int(self.num_batches_tracked)) if record else 0.0
        known = record or not self.training
        mean, variance = (self.running_mean, self.running_var) if known else (None, None)
        if self.num_groups == self.num_channels:
            return functional.batch_norm(x_BCHW, mean, variance, self.weight, self.bias, self.training, momentum, self.eps)
        # A group of channels is one channel of a taller image.
        batch, _, height, width = x_BCHW.shape
        tall = x_BCHW.reshape(batch, self.num_groups, -1, width)
        out = functional.batch_norm(tall, mean, variance, None, None, self.training, momentum, self.eps)
        out_BCHW = out.view(batch, self.num_channels, height, width)
        if self.weight is None or self.bias is None:
            return out_BCHW
        out_BCHW = torch.addcmul(self.bias[:, None, None], out_BCHW, self.weight[:, None, None])
        return out_BCHW.to(x_BCHW.dtype)

    def _per_example(self, x_BCHW: Tensor) -> Tensor:
        if not is_eager_channels_last(x_BCHW):
            return functional.group_norm(x_BCHW, self.num_groups, self.weight, self.bias, self.eps)
        if not is_faster_by_copies(x_BCHW):
            return normalize_each_example(x_BCHW, self.num_groups, self.weight, self.bias, self.eps)
        out_BCHW = functional.group_norm(x_BCHW.contiguous(), self.num_groups, self.weight, self.bias, self.eps)
        return out_BCHW.contiguous(memory_format=torch.channels_last)

    def moments(self, x_BCHW: Tensor, mean_BC: Tensor, variance_BC: Tensor, share: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return mean and variance per channel that this normalization uses, (B, C) or (C,), from those per (sample, channel).

        In training mode the statistics of the batch are recorded with the weight `momentum * share`; a `share` of 0 leaves the
        running ones as they are, None counts as 1.
        """
        if self.kind.over_batch and not self.training:
            mean, variance = self.running_mean, self.running_var
        else:
            mean, variance = pool_groups(mean_BC, variance_BC, self.num_groups)
            if self.kind.over_batch:
                mean, variance, num_examples = self.batch_reduction(mean, variance)
                if self.track_running_stats:
                    values_per_example = math.prod(x_BCHW.shape[1:]) // self.num_groups
                    self._record(mean, variance, num_examples * values_per_example, share)
        return spread(mean, self.num_channels), spread(variance, self.num_channels)

    @torch.no_grad()
    def _record(self, mean_G: Tensor, variance_G: Tensor, count: int | Tensor, share: Tensor | None) -> None:
        if isinstance(count, int) and count < 2:
            raise ValueError(f"Expected more than 1 value per channel when training, got {count} in {self.kind.name}")
        unbiased_G = variance_G.detach() * (count / (count - 1))
        newest = mean_G.new_ones(()) if share is None else share
        if self.momentum is None:
            self._recorded_share = self._recorded_share + newest
            weight = newest / self._recorded_share.clamp_min(torch.finfo(newest.dtype).tiny)
        else:
            weight = self.momentum * newest
        self.running_mean.lerp_(mean_G.detach().to(self.running_mean.dtype), weight.to(self.running_mean.dtype))
        self.running_var.lerp_(unbiased_G.to(self.running_var.dtype), weight.to(self.running_var.dtype))
        self.num_batches_tracked.add_(1 if share is None else (share > 0).long())

    def normalized_groups(self) -> NormalizedGroups:
        """Return what it does in eval mode."""
        return NormalizedGroups(self.kind.name, self.num_groups, self.eps, self.weight, self.running_var if self.kind.over_batch else None)

    def copy_from(self, norm: nn.BatchNorm2d) -> None:
        """Take over affine parameters and, for one channel per group over the batch, running statistics."""
        with torch.no_grad():
            if norm.affine and self.weight is not None and self.bias is not None:
                self.weight.copy_(norm.weight)
                self.bias.copy_(norm.bias)
            if self.kind.over_batch and self.num_groups == self.num_channels and norm.running_mean is not None:
                assert norm.running_var is not None and norm.num_batches_tracked is not None
                self.running_mean.copy_(norm.running_mean)
                self.running_var.copy_(norm.running_var)
                self.num_batches_tracked.copy_(norm.num_batches_tracked)

    def extra_repr(self) -> str:
        return f"{self.num_channels}, {self.kind.name} ({self.num_groups} groups), eps={self.eps}, momentum={self.momentum}"


def normalize(
    x_BCHW: Tensor,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """Return (x - mean) / sqrt(variance + eps) * weight + bias; each of the four is (B, C) or (C,). Keeps the dtype of x."""
    scale = torch.rsqrt(variance + eps)
    if weight is not None:
        scale = scale * weight
    centred_BCHW = at_least_float32(x_BCHW) - mean[..., None, None]
    if bias is None:
        out_BCHW = centred_BCHW * scale[..., None, None]
    else:
        out_BCHW = torch.addcmul(bias[..., None, None], centred_BCHW, scale[..., None, None])
    return out_BCHW.to(x_BCHW.dtype)


def _near_divisors(number: int, target: int) -> str:
    divisors = sorted((d for d in range(1, number + 1) if number % d == 0), key=lambda d: abs(d - target))
    return ", ".join(str(d) for d in sorted(divisors[:3]))
