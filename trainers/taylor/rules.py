"""How Taylor coefficients pass through the operations of networks.

Convolution, batch normalization and rectifier have a written-out backward; all rules are exact. Coefficients carry no factorials (x_k is
1/k! times the k-th derivative), so products are plain products of series: with weights w + t u, y_k = w x_k + u x_(k-1).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from trainers.taylor.batch_norm import FirstOrderBatchNorm, JetBatchNorm, laid_out_as
from trainers.taylor.jets import Jet, no_rule, rule

_convolution_backward = torch.ops.aten.convolution_backward
_threshold_backward = torch.ops.aten.threshold_backward
_hardtanh_backward = torch.ops.aten.hardtanh_backward


class _Convolution(torch.autograd.Function):
    """y_k = w * x_k + u * x_(k-1), the bias on y_0, its direction on y_1.

    The weight gradient needs one pass per coefficient, the input gradient two: u is a constant.
    """

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        bias: Tensor | None,
        direction: Tensor | None,
        bias_direction: Tensor | None,
        geometry: tuple[Any, ...],
        num_out: int,
        *xs: Tensor,
    ) -> tuple[Tensor, ...]:
        outs = []
        for k in range(num_out):
            shift = bias if k == 0 else bias_direction if k == 1 else None
            out = torch.conv2d(xs[k], weight, shift, *geometry) if k < len(xs) else None
            if k > 0 and direction is not None:
                moved = torch.conv2d(xs[k - 1], direction, shift if out is None else None, *geometry)
                out = moved if out is None else out.add_(moved)
            assert out is not None
            outs.append(out)
        ctx.save_for_backward(weight, direction, *xs)
        ctx.geometry = geometry
        return tuple(outs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight, direction, *xs = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.geometry

        def adjoint(grad: Tensor, x: Tensor, weight: Tensor, *wanted: bool) -> tuple[Tensor | None, Tensor | None]:
            return _convolution_backward(grad, x, weight, None, stride, padding, dilation, False, [0, 0], groups, [*wanted, False])[:2]

        needs_weight, needs_bias = ctx.needs_input_grad[:2]
        grad_weight: Tensor | None = None
        grad_xs: list[Tensor | None] = []
        for k, x in enumerate(xs):
            needs_x = ctx.needs_input_grad[6 + k]
            grad_x: Tensor | None = None
            if needs_x or needs_weight:
                grad_x, part = adjoint(grads[k], x, weight, needs_x, needs_weight)
                if part is not None:
                    grad_weight = part if grad_weight is None else grad_weight.add_(part)
            if grad_x is not None and direction is not None and k + 1 < len(grads):
                second, _ = adjoint(grads[k + 1], x, direction, True, False)
                assert second is not None
                grad_x.add_(second)
            grad_xs.append(grad_x)
        grad_bias = grads[0].sum((0, 2, 3)) if needs_bias else None
        return grad_weight, grad_bias, None, None, None, None, *grad_xs


@rule(torch.conv2d)
def _conv2d(
    x: Jet,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Jet:
    if isinstance(padding, str):
        raise no_rule(f"convolutions with padding {padding!r}")
    direction, bias_direction = x.directions.of(weight), x.directions.of(bias)
    num_out = min(x.order + 1, x.terms + 1) if direction is not None else x.terms
    geometry = (_pair(stride), _pair(padding), _pair(dilation), groups)
    if bias_direction is not None and num_out == 1 and x.order > 0:
        raise no_rule("noise on a convolution's bias without noise on its weight")
    return x.like(_Convolution.apply(weight, bias, direction, bias_direction, geometry, num_out, *x.coefficients))


@rule(functional.linear)
def _linear(x: Jet, weight: Tensor, bias: Tensor | None = None) -> Jet:
    direction, bias_direction = x.directions.of(weight), x.directions.of(bias)
    outs: list[Tensor] = [functional.linear(x.value, weight, bias)]
    outs += [functional.linear(coefficient, weight) for coefficient in x.coefficients[1:]]
    if direction is not None:
        for k in range(1, min(x.order, x.terms) + 1):
            moved = functional.linear(x.coefficients[k - 1], direction)
            outs[k:] = [outs[k] + moved, *outs[k + 1 :]] if k < len(outs) else [moved]
    if bias_direction is not None and x.order > 0:
        shift = bias_direction.expand_as(outs[0])
        outs[1:] = [outs[1] + shift, *outs[2:]] if len(outs) > 1 else [shift]
    return x.like(outs)


@rule(functional.batch_norm)
def _batch_norm(
    x: Jet,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Jet:
    weight_direction, bias_direction = x.directions.of(weight), x.directions.of(bias)
    if x.terms == 1 and weight_direction is None and bias_direction is None:
        return x.map(lambda value: functional.batch_norm(value, running_mean, running_var, weight, bias, training, momentum, eps))
    if x.ndim != 4:
        raise no_rule("batch normalization of anything else than (B, C, H, W)")
    if training and x.order == 1 and x.terms == 2 and weight_direction is None and bias_direction is None:
        return x.like(FirstOrderBatchNorm.apply(weight, bias, (running_mean, running_var, momentum, eps), *x.coefficients))
    if training:
        settings = (running_mean, running_var, momentum, eps, x.order)
        return x.like(JetBatchNorm.apply(weight, bias, weight_direction, bias_direction, settings, *x.coefficients))
    assert running_mean is not None
    assert running_var is not None
    inverse_std = torch.rsqrt(running_var + eps)
    normalized = _add(x, -_channels(running_mean)).map(lambda c: c * _channels(inverse_std))
    out = normalized if weight is None else normalized.map(lambda c: c * _channels(weight))
    if weight_direction is not None:
        moved = [c * _channels(weight_direction) for c in normalized.coefficients[: x.order]]
        out = _add(out, x.like([torch.zeros_like(x.value), *moved]))
    if bias is not None:
        out = _add(out, _channels(bias))
    if bias_direction is not None:
        out = _add(out, x.like([torch.zeros_like(x.value), _channels(bias_direction).expand_as(x.value)]))
    return out


class _Rectifier(torch.autograd.Function):
    """max(x_0, 0), and all other coefficients where x_0 > 0."""

    @staticmethod
    def forward(ctx: Any, *xs: Tensor) -> tuple[Tensor, ...]:
        value = torch.relu(xs[0])
        ctx.save_for_backward(value)
        return value, *(_threshold_backward(x, xs[0], 0) for x in xs[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        (value,) = ctx.saved_tensors
        return tuple(_threshold_backward(laid_out_as(grad, value), value, 0) for grad in grads)


@rule(functional.relu, torch.relu)
def _relu(x: Jet, inplace: bool = False) -> Jet:
    return x.like(_Rectifier.apply(*x.coefficients))


@rule(functional.hardtanh)
def _hardtanh(x: Jet, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Jet:
    gate = x.value.detach()
    rest = [_hardtanh_backward(c, gate, min_val, max_val) for c in x.coefficients[1:]]
    return x.like([functional.hardtanh(x.value, min_val, max_val), *rest])


@rule(functional.relu6)
def _relu6(x: Jet, inplace: bool = False) -> Jet:
    return _hardtanh(x, 0.0, 6.0)


@rule(functional.leaky_relu)
def _leaky_relu(x: Jet, negative_slope: float = 0.01, inplace: bool = False) -> Jet:
    slope = torch.full_like(x.value, negative_slope).masked_fill_(x.value.detach() > 0, 1)
    return x.map(lambda c: c * slope)


def _smooth(x: Jet, value: Tensor, first: Tensor, second: Tensor) -> Jet:
    """Apply a function given its value and its first and second derivative at x_0 (Faa di Bruno)."""
    if x.order > 2:
        raise no_rule("smooth activations beyond the second order")
    outs = [value]
    if x.terms > 1:
        outs.append(first * x.coefficients[1])
        if x.order == 2:
            bent = 0.5 * second * x.coefficients[1].square()
            outs.append(bent if x.terms == 2 else first * x.coefficients[2] + bent)
    return x.like(outs)


@rule(functional.softplus)
def _softplus(x: Jet, beta: float = 1.0, threshold: float = 20.0) -> Jet:
    sigmoid = torch.sigmoid(beta * x.value)
    linear = beta * x.value > threshold  # where the framework's function continues as the identity
    first = torch.where(linear, torch.ones_like(sigmoid), sigmoid)
    second = torch.where(linear, torch.zeros_like(sigmoid), beta * sigmoid * (1 - sigmoid))
    return _smooth(x, functional.softplus(x.value, beta, threshold), first, second)


@rule(functional.silu)
def _silu(x: Jet, inplace: bool = False) -> Jet:
    value, sigmoid = x.value, torch.sigmoid(x.value)
    slope = sigmoid * (1 - sigmoid)
    return _smooth(x, value * sigmoid, sigmoid + value * slope, slope * (2 + value * (1 - 2 * sigmoid)))


@rule(functional.gelu)
def _gelu(x: Jet, approximate: str = "none") -> Jet:
    if approximate != "none":
        raise no_rule("the tanh approximation of GELU")
    value = x.value
    density = torch.exp(-0.5 * value.square()) / math.sqrt(2 * math.pi)
    distribution = 0.5 * (1 + torch.erf(value / math.sqrt(2)))
    return _smooth(x, value * distribution, distribution + value * density, density * (2 - value.square()))


@rule(torch.sigmoid, functional.sigmoid)
def _sigmoid(x: Jet) -> Jet:
    value = torch.sigmoid(x.value)
    slope = value * (1 - value)
    return _smooth(x, value, slope, slope * (1 - 2 * value))


@rule(torch.tanh, functional.tanh)
def _tanh(x: Jet) -> Jet:
    value = torch.tanh(x.value)
    slope = 1 - value.square()
    return _smooth(x, value, slope, -2 * value * slope)


@rule(torch.max_pool2d, functional.max_pool2d)
def _max_pool2d(
    x: Jet,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Jet:
    if return_indices:
        raise no_rule("max-pooling that returns indices")
    value, indices = functional.max_pool2d(x.value, kernel_size, stride, padding, dilation, ceil_mode, return_indices=True)
    flat = indices.flatten(2)
    return x.like([value, *(c.flatten(2).gather(2, flat).view(value.shape) for c in x.coefficients[1:])])


@rule(functional.avg_pool2d)
def _avg_pool2d(x: Jet, *args: Any, **kwargs: Any) -> Jet:
    return x.map(lambda c: functional.avg_pool2d(c, *args, **kwargs))


@rule(functional.adaptive_avg_pool2d)
def _adaptive_avg_pool2d(x: Jet, output_size: Any) -> Jet:
    return x.map(lambda c: functional.adaptive_avg_pool2d(c, output_size))


@rule(torch.mean)
def _mean(x: Jet, *args: Any, **kwargs: Any) -> Jet:
    return x.mean(*args, **kwargs)


@rule(torch.flatten)
def _flatten(x: Jet, *args: Any, **kwargs: Any) -> Jet:
    return x.flatten(*args, **kwargs)


@rule(functional.dropout)
def _dropout(x: Jet, p: float = 0.5, training: bool = True, inplace: bool = False) -> Jet:
    if training and p > 0:
        raise no_rule("dropout in train mode: forward must be deterministic")
    return x


@rule(torch.add, torch.Tensor.add, torch.Tensor.__add__, torch.Tensor.__radd__)
def _add(a: Any, b: Any) -> Jet:
    if isinstance(a, Jet) and isinstance(b, Jet):
        shared = [p + q for p, q in zip(a.coefficients, b.coefficients, strict=False)]
        longer = a if a.terms > b.terms else b
        return a.like([*shared, *longer.coefficients[len(shared) :]])
    jet, other = (a, b) if isinstance(a, Jet) else (b, a)
    return jet.like([jet.value + _constant(other, jet), *jet.coefficients[1:]])


@rule(torch.sub, torch.Tensor.sub, torch.Tensor.__sub__, torch.Tensor.__rsub__)
def _sub(a: Any, b: Any) -> Jet:
    return _add(a, -b)


@rule(torch.mul, torch.Tensor.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__)
def _mul(a: Any, b: Any) -> Jet:
    if isinstance(a, Jet) and isinstance(b, Jet):
        outs = []
        for k in range(min(a.order + 1, a.terms + b.terms - 1)):
            pairs = [(i, k - i) for i in range(k + 1) if i < a.terms and k - i < b.terms]
            outs.append(torch.stack([a.coefficients[i] * b.coefficients[j] for i, j in pairs]).sum(0))
        return a.like(outs)
    jet, factor = (a, b) if isinstance(a, Jet) else (b, a)
    return jet.map(lambda c: c * _constant(factor, jet))


@rule(torch.div, torch.Tensor.div, torch.Tensor.__truediv__)
def _div(a: Any, b: Any) -> Jet:
    if not isinstance(a, Jet) or isinstance(b, Jet):
        raise no_rule("division by something that depends on the weights")
    return a.map(lambda c: c / _constant(b, a))


def _constant(value: Any, jet: Jet) -> Any:
    """Return `value` if u does not touch it."""
    if isinstance(value, Tensor) and jet.directions.of(value) is not None:
        raise no_rule("noise on a parameter outside a layer")
    return value


def _channels(values_C: Tensor) -> Tensor:
    return values_C.view(1, -1, 1, 1)


def _pair(value: Any) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)
