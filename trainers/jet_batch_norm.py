"""Batch normalization of Taylor coefficients in train mode, written out, forward and backward.

With c_k = x_k - mean(x_k), the variance is the series v = mean(c c) (product of series), the inverse deviation r = (v + eps)^(-1/2), and
y = (gamma + t u_gamma) r c + beta + t u_beta. The backward is the adjoint of exactly that. What touches images is one of two primitives:
an inner product per channel, and a sum of images weighted per channel; the rest is arithmetic of short series per channel.

Shapes: images (B, C, H, W), series (T, C) with T coefficients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trainers.power_series import convolve_adjoint, power

_batch_norm_backward = torch.ops.aten.native_batch_norm_backward


class JetBatchNorm(torch.autograd.Function):
    """`apply(weight, bias, weight_direction, bias_direction, settings, *xs) -> ys`.

    `settings` is (running_mean, running_var, momentum, eps, number of outputs). The running statistics take in x_0, if given.
    """

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor | None,
        bias: Tensor | None,
        weight_direction: Tensor | None,
        bias_direction: Tensor | None,
        settings: tuple[Any, ...],
        *xs: Tensor,
    ) -> tuple[Tensor, ...]:
        running_mean, running_var, momentum, eps, num_out = settings
        # The value goes through the framework's kernel, so it and the running statistics equal those of nn.BatchNorm2d.
        value, mean, inverse_std = torch.native_batch_norm(xs[0], weight, bias, running_mean, running_var, True, momentum, eps)
        reduction = _CentredProducts(xs[0], mean, inverse_std, eps)
        means, variance = [mean], [inverse_std.pow(-2)]  # the latter includes eps
        for k in range(1, num_out):
            total = None
            if k < len(xs):
                dot, mean_k = reduction(xs[k])
                means.append(mean_k)
                total = 2 * dot
            for i in range(1, k):
                if k - i < len(xs):
                    square = _covariance(xs[i], xs[k - i], means[i], means[k - i])
                    total = square if total is None else total + square
            variance.append(torch.zeros_like(mean) if total is None else total)
        v_TC = torch.stack(variance)
        inverse_TC = power(v_TC, -0.5)
        scale_TC = inverse_TC if weight is None else inverse_TC * weight
        if weight_direction is not None:
            scale_TC = scale_TC.clone()
            scale_TC[1:] += weight_direction * inverse_TC[:-1]
        outs = [value]
        for k in range(1, num_out):
            parts = [(xs[j], scale_TC[k - j], means[j]) for j in range(min(k + 1, len(xs)))]
            outs.append(_weighted_sum(parts, bias_direction if k == 1 else None))
        ctx.save_for_backward(weight, weight_direction, torch.stack(means), v_TC, inverse_TC, scale_TC, *xs)
        ctx.eps = eps
        return tuple(outs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight, weight_direction, means, v_TC, inverse_TC, scale_TC, *xs = ctx.saved_tensors
        layout = xs[0]
        grads = tuple(grad if grad.stride() == layout.stride() else _laid_out_as(grad, layout) for grad in grads)
        reduction = _CentredProducts(xs[0], means[0], inverse_TC[0], ctx.eps)
        dots, grad_means = zip(*(reduction(grad) for grad in grads), strict=True)
        grad_scales = list(dots)
        for i in range(1, len(grads)):
            for j in range(1, min(i + 1, len(xs))):
                grad_scales[i - j] = grad_scales[i - j] + _covariance(grads[i], xs[j], grad_means[i], means[j])
        grad_scale_TC = torch.stack(grad_scales)  # divided by the number of pixels, as all inner products here
        grad_inverse_TC = grad_scale_TC if weight is None else grad_scale_TC * weight
        if weight_direction is not None:
            grad_inverse_TC = grad_inverse_TC.clone()
            grad_inverse_TC[:-1] += weight_direction * grad_scale_TC[1:]
        # r = (v + eps)^(-1/2) as series: dr = -1/2 (v + eps)^(-3/2) dv, a product of series. Twice, because v is quadratic in c.
        twice_grad_variance_TC = convolve_adjoint(grad_inverse_TC, -power(v_TC, -1.5))
        grad_xs = []
        for j in range(len(xs)):
            parts = [(grads[i], scale_TC[i - j], grad_means[i]) for i in range(j, len(grads))]
            parts += [(xs[k - j], twice_grad_variance_TC[k], means[k - j]) for k in range(j, min(len(grads), len(xs) + j))]
            grad_xs.append(_weighted_sum(parts, None))
        grad_weight = reduction.count * (grad_scale_TC * inverse_TC).sum(0) if ctx.needs_input_grad[0] else None
        grad_bias = reduction.count * grad_means[0] if ctx.needs_input_grad[1] else None
        return grad_weight, grad_bias, None, None, None, *grad_xs


class _CentredProducts:
    """Inner products with the centred value, by the reductions of a fused kernel: one pass over memory, no cancellation."""

    def __init__(self, value: Tensor, mean: Tensor, inverse_std: Tensor, eps: float) -> None:
        self.value, self.mean, self.inverse_std, self.eps = value, mean, inverse_std, eps
        self.count = value.numel() // value.shape[1]
        self.scaling = 1 / (inverse_std * self.count)

    def __call__(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean(image (value - mean)) and mean(image), each (C,)."""
        _, scaled, total = _batch_norm_backward(
            image, self.value, None, None, None, self.mean, self.inverse_std, True, self.eps, [False, True, True]
        )
        return scaled * self.scaling, total / self.count


def _covariance(a: Tensor, b: Tensor, mean_a: Tensor, mean_b: Tensor) -> Tensor:
    return torch.addcmul((a * b).mean((0, 2, 3)), mean_a, mean_b, value=-1)


def _weighted_sum(parts: list[tuple[Tensor, Tensor, Tensor]], shift: Tensor | None) -> Tensor:
    """Return the sum over (image, weight, mean) of weight (image - mean), plus shift; all but the image per channel."""
    for _, weight, mean in parts:
        shift = torch.addcmul(shift, weight, mean, value=-1) if shift is not None else -weight * mean
    assert shift is not None
    (first, weight, _), *rest = parts
    out = torch.addcmul(shift.view(1, -1, 1, 1), first, weight.view(1, -1, 1, 1))
    for image, weight, _ in rest:
        out.addcmul_(image, weight.view(1, -1, 1, 1))
    return out


def _laid_out_as(image: Tensor, other: Tensor) -> Tensor:
    """Return `image` in the memory order of `other`: gradients of a mean come expanded, which kernels handle slowly."""
    return torch.empty_like(other).copy_(image)
