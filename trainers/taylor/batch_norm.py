"""Batch normalization of Taylor coefficients in train mode, written out, forward and backward, up to the second order.

With c_k = x_k - mean(x_k) and r the inverse deviation of x_0, the variance along the direction is a series, v(t) + eps = r^-2 (1 + v_1 t +
v_2 t^2), its inverse root is r rho(t), and y(t) = (gamma + t u_gamma) r rho(t) c(t) + beta + t u_beta, products being products of series.
The backward is the adjoint of exactly that. What touches images is an inner product per channel or a sum of images weighted per channel,
each one pass over memory; all else are vectors of C numbers.

At first order, where nothing but x depends on u, both directions of the Jacobian J = w r (1 - mean - c_0 c_0' r^2 / n) are the framework's
own backward kernel: J is symmetric, so y_1 = J x_1 and the gradient of x_1 is J grad_1 (`FirstOrderBatchNorm`).

Shapes: images (B, C, H, W), everything else (C,). n is the number of values per channel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_batch_norm_backward = torch.ops.aten.native_batch_norm_backward


class JetBatchNorm(torch.autograd.Function):
    """`apply(weight, bias, weight_direction, bias_direction, settings, *xs) -> ys`.

    `settings` is (running_mean, running_var, momentum, eps, order). The running statistics take in x_0, if given.
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
        running_mean, running_var, momentum, eps, order = settings
        # The value goes through the framework's kernel, so it and the running statistics equal those of nn.BatchNorm2d.
        value, mean, r = torch.native_batch_norm(xs[0], weight, bias, running_mean, running_var, True, momentum, eps)
        products = _Products(xs[0], mean, r, eps)
        means, rhos = [mean], []
        if len(xs) > 1:
            e_1, mean_1 = products(xs[1])
            means.append(mean_1)
            rhos.append(-r * e_1)  # rho_1 = -v_1 / 2 with v_1 = 2 r mean(c_1 c_0 r)
        if len(xs) > 1 and order == 2:
            # rho_2 = -v_2 / 2 + 3/8 v_1^2 with v_2 = 2 r mean(c_2 c_0 r) + r^2 mean(c_1 c_1)
            rho_2 = torch.addcmul(1.5 * rhos[0].square(), r.square(), products.covariance(xs[1], xs[1], mean_1, mean_1), value=-0.5)
            if len(xs) > 2:
                e_2, mean_2 = products(xs[2])
                means.append(mean_2)
                rho_2 = torch.addcmul(rho_2, r, e_2, value=-1)
            rhos.append(rho_2)
        rhos += [torch.zeros_like(r)] * (order - len(rhos))
        scales = _scales(weight, weight_direction, r, rhos)
        outs = [value]
        for k in range(1, order + 1):
            parts = [(xs[j], scales[k - j], means[j]) for j in range(min(k + 1, len(xs)))]
            outs.append(_weighted_sum(parts, bias_direction if k == 1 else None))
        ctx.save_for_backward(weight, weight_direction, r, *means, *rhos, *scales, *xs)
        ctx.sizes, ctx.eps = (len(xs), order), eps
        return tuple(outs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight, weight_direction, r, *saved = ctx.saved_tensors
        num_in, order = ctx.sizes
        means, rhos = saved[:num_in], saved[num_in : num_in + order]
        scales, xs = saved[num_in + order : num_in + 2 * order + 1], saved[num_in + 2 * order + 1 :]
        grads = tuple(laid_out_as(grad, xs[0]) for grad in grads)
        products = _Products(xs[0], means[0], r, ctx.eps)

        # Gradients of the scales times r: r mean(grad_i c_j) summed over i - j = k.
        dots, grad_means = zip(*(products(grad) for grad in grads), strict=True)
        grad_scales = list(dots)
        for i in range(1, order + 1):
            for j in range(1, min(i + 1, num_in)):
                covariance = products.covariance(grads[i], xs[j], grad_means[i], means[j])
                grad_scales[i - j] = torch.addcmul(grad_scales[i - j], r, covariance)

        # Gradients of r rho_k, times r^3; then of v_k: dr = -1/2 r^3 rho^3 dv as series. Twice, because v is quadratic in c.
        square = r.square()
        grad_rhos = []
        for k, grad_scale in enumerate(grad_scales):
            total = grad_scale if weight is None else weight * grad_scale
            if weight_direction is not None and k < order:
                total = torch.addcmul(total, weight_direction, grad_scales[k + 1])
            grad_rhos.append(-square * total)
        twice_grad_variance = list(grad_rhos)
        cubes = [3 * rho for rho in rhos[:1]] + [3 * (rhos[0].square() + rho) for rho in rhos[1:]]
        for k in range(order):
            for i in range(k + 1, order + 1):
                twice_grad_variance[k] = torch.addcmul(twice_grad_variance[k], grad_rhos[i], cubes[i - k - 1])

        grad_xs = []
        for j in range(num_in):
            parts = [(grads[i], scales[i - j], grad_means[i]) for i in range(j, order + 1)]
            parts += [(xs[k - j], twice_grad_variance[k], means[k - j]) for k in range(j, min(order + 1, num_in + j))]
            grad_xs.append(_weighted_sum(parts, None))
        grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            total = grad_scales[0]
            for k in range(1, order + 1):
                total = torch.addcmul(total, grad_scales[k], rhos[k - 1])
            grad_weight = products.count * total
        if ctx.needs_input_grad[1]:
            grad_bias = products.count * grad_means[0]
        return grad_weight, grad_bias, None, None, None, *grad_xs


class FirstOrderBatchNorm(torch.autograd.Function):
    """`apply(weight, bias, settings, x_0, x_1) -> y_0, y_1`: what `JetBatchNorm` computes at order 1 without noise on weight and bias.

    `settings` is (running_mean, running_var, momentum, eps). With a = c_0 . grad_1, b = c_0 . x_1 and q = grad_1 . c_1 per channel, the
    gradient of x_0 is J (grad_0 - r^2/n (a x_1 + b grad_1)) + w r^3/n (r^2 a b / n - q) c_0.
    """

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor | None, bias: Tensor | None, settings: tuple[Any, ...], x_0: Tensor, x_1: Tensor
    ) -> tuple[Tensor, Tensor]:
        running_mean, running_var, momentum, eps = settings
        value, mean, r = torch.native_batch_norm(x_0, weight, bias, running_mean, running_var, True, momentum, eps)
        y_1, r_b, sum_1 = _batch_norm_backward(x_1, x_0, weight, None, None, mean, r, True, eps, [True, True, True])
        ctx.save_for_backward(weight, r, mean, r_b, sum_1, x_0, x_1)
        ctx.eps = eps
        return value, y_1

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_0: Tensor, grad_1: Tensor) -> tuple[Tensor | None, ...]:
        weight, r, mean, r_b, sum_1, x_0, x_1 = ctx.saved_tensors
        grad_0, grad_1, eps = laid_out_as(grad_0, x_0), laid_out_as(grad_1, x_0), ctx.eps
        share = x_0.shape[1] / x_0.numel()
        mean_1 = sum_1 * share
        grad_x_1, r_a, sum_grad_1 = _batch_norm_backward(grad_1, x_0, weight, None, None, mean, r, True, eps, [True, True, True])
        _, r_dot, sum_grad_0 = _batch_norm_backward(grad_0, x_0, None, None, None, mean, r, True, eps, [False, True, True])
        _, r_q, _ = _batch_norm_backward(grad_1, x_1, None, None, None, mean_1, r, True, eps, [False, True, False])
        r_share = r * share
        crossed = r_share * r_a * r_b
        grad_weight = r_dot + r_q - crossed
        scale = r if weight is None else r * weight
        minus = scale * -r_share
        of_grad_1, of_x_1 = minus * r_b, minus * r_a
        of_x_0 = minus * torch.sub(grad_weight, crossed, alpha=2)
        shift = torch.addcmul(of_x_1 * mean_1, of_x_0, mean)
        shift = torch.addcmul(torch.addcmul(shift, scale, sum_grad_0, value=share), of_grad_1, sum_grad_1, value=share).neg_()
        grad_x_0 = torch.addcmul(_image(shift), grad_0, _image(scale))
        grad_x_0.addcmul_(grad_1, _image(of_grad_1)).addcmul_(x_1, _image(of_x_1)).addcmul_(x_0, _image(of_x_0))
        needs_weight, needs_bias = ctx.needs_input_grad[:2]
        return grad_weight if needs_weight else None, sum_grad_0 if needs_bias else None, None, grad_x_0, grad_x_1


class _Products:
    """Inner products per channel, divided by n."""

    def __init__(self, value: Tensor, mean: Tensor, r: Tensor, eps: float) -> None:
        self.value, self.mean, self.r, self.eps = value, mean, r, eps
        self.count = float(value.numel() // value.shape[1])
        self.share = 1 / self.count

    def __call__(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean(image c_0 r) and mean(image), by the reductions of a fused kernel: one pass, no cancellation."""
        _, scaled, total = _batch_norm_backward(image, self.value, None, None, None, self.mean, self.r, True, self.eps, [False, True, True])
        return scaled.mul_(self.share), total.mul_(self.share)

    def covariance(self, a: Tensor, b: Tensor, mean_a: Tensor, mean_b: Tensor) -> Tensor:
        """Return mean(a b) - mean(a) mean(b)."""
        return (a * b).sum((0, 2, 3)).mul_(self.share).addcmul_(mean_a, mean_b, value=-1)


def _scales(weight: Tensor | None, weight_direction: Tensor | None, r: Tensor, rhos: list[Tensor]) -> list[Tensor]:
    """Return the coefficients of (gamma + t u_gamma) r rho(t)."""
    first = r if weight is None else r * weight
    scales = [first, *(first * rho for rho in rhos)]
    if weight_direction is not None:
        moved = r * weight_direction
        for k in range(1, len(scales)):
            scales[k] = scales[k] + (moved if k == 1 else moved * rhos[k - 2])
    return scales


def _weighted_sum(parts: list[tuple[Tensor, Tensor, Tensor]], shift: Tensor | None) -> Tensor:
    """Return the sum over (image, weight, mean) of weight (image - mean), plus shift; all but the image per channel."""
    for _, weight, mean in parts:
        shift = torch.addcmul(shift, weight, mean, value=-1) if shift is not None else (weight * mean).neg_()
    assert shift is not None
    (first, weight, _), *rest = parts
    out = torch.addcmul(shift.view(1, -1, 1, 1), first, weight.view(1, -1, 1, 1))
    for image, weight, _ in rest:
        out.addcmul_(image, weight.view(1, -1, 1, 1))
    return out


def _image(values_C: Tensor) -> Tensor:
    return values_C.view(1, -1, 1, 1)


def laid_out_as(image: Tensor, other: Tensor) -> Tensor:
    """Return `image` in the memory order of `other`: gradients of a mean come expanded, which kernels handle slowly."""
    return image if image.stride() == other.stride() else torch.empty_like(other).copy_(image)
