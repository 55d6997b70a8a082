"""How Taylor coefficients pass through the operations of networks.

The heavy rules are autograd functions with a written-out backward; each is exact at every order. Coefficients carry no factorials
(x_k is 1/k! times the k-th derivative), so products are plain convolutions of series: with weights w + t u, y_k = w x_k + u x_(k-1).

Shapes: B batch, T stored coefficients, C channels, stack (T B, C, H, W).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from models.errors import UserError
from trainers.jets import Jet, rule
from trainers.power_series import convolve_adjoint, power

_convolution_backward = torch.ops.aten.convolution_backward
_batch_norm_backward = torch.ops.aten.native_batch_norm_backward
_threshold_backward = torch.ops.aten.threshold_backward
_hardtanh_backward = torch.ops.aten.hardtanh_backward


class _Convolution(torch.autograd.Function):
    """y_k = w * x_k + u * x_(k-1), bias on y_0, its direction on y_1."""

    @staticmethod
    def forward(
        ctx: Any,
        stack: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        direction: Tensor,
        bias_direction: Tensor | None,
        batch: int,
        num_out: int,
        geometry: tuple[Any, ...],
    ) -> Tensor:
        stride, padding, dilation, groups = geometry
        out = torch.conv2d(stack, weight, None, stride, padding, dilation, groups)
        source = stack[: (num_out - 1) * batch]
        shifted = torch.conv2d(source, direction, None, stride, padding, dilation, groups)
        if num_out * batch == out.shape[0]:
            out[batch:] += shifted
        else:
            shared = out.shape[0] - batch
            shifted[:shared] += out[batch:]
            out = torch.cat([out[:batch], shifted])
        if bias is not None:
            out[:batch] += bias.view(1, -1, 1, 1)
        if bias_direction is not None:
            out[batch : 2 * batch] += bias_direction.view(1, -1, 1, 1)
        ctx.save_for_backward(stack, weight, direction)
        ctx.batch, ctx.geometry, ctx.has_bias = batch, geometry, bias is not None
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        stack, weight, direction = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.geometry
        batch = ctx.batch
        needs_stack, needs_weight, needs_bias = ctx.needs_input_grad[:3]

        def adjoint(grad: Tensor, stack: Tensor, weight: Tensor, mask: list[bool]) -> tuple[Tensor, Tensor]:
            return _convolution_backward(
                grad, stack, weight, None, stride, padding, dilation, False, [0, 0], groups, mask
            )[:2]

        grad_stack, grad_weight = adjoint(grad[: stack.shape[0]], stack, weight, [needs_stack, needs_weight, False])
        if needs_stack:
            shifted = grad[batch:]
            rows = shifted.shape[0]
            grad_stack[:rows] += adjoint(shifted, stack[:rows], direction, [True, False, False])[0]
        grad_bias = grad[:batch].sum((0, 2, 3)) if needs_bias else None
        return grad_stack, grad_weight, grad_bias, None, None, None, None, None


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
        raise UserError(f"exact Taylor terms need numeric padding, not {padding!r}; use derivatives nested_jvp")
    direction, bias_direction = x.directions.of(weight), x.directions.of(bias)
    if direction is None and bias_direction is None:
        out = functional.conv2d(x.stack, weight, None, stride, padding, dilation, groups)
        return x.like(out if bias is None else _add_to_value(out, bias.view(1, -1, 1, 1), x.batch))
    num_out = min(x.order, x.terms) + 1
    if num_out == 1:
        return x.like(functional.conv2d(x.stack, weight, bias, stride, padding, dilation, groups))
    geometry = (_pair(stride), _pair(padding), _pair(dilation), groups)
    if direction is None:
        direction = torch.zeros_like(weight)
    return x.like(_Convolution.apply(x.stack, weight, bias, direction, bias_direction, x.batch, num_out, geometry))


@rule(functional.linear)
def _linear(x: Jet, weight: Tensor, bias: Tensor | None = None) -> Jet:
    direction, bias_direction = x.directions.of(weight), x.directions.of(bias)
    num_out = min(x.order, x.terms) + 1
    parts = [functional.linear(x.coefficient(k), weight) for k in range(x.terms)]
    if num_out > 1 and (direction is not None or bias_direction is not None):
        parts += [torch.zeros_like(parts[0])] * (num_out - len(parts))
        if direction is not None:
            for k in range(1, num_out):
                parts[k] = parts[k] + functional.linear(x.coefficient(k - 1), direction)
        if bias_direction is not None:
            parts[1] = parts[1] + bias_direction
    if bias is not None:
        parts[0] = parts[0] + bias
    return x.like(torch.cat(parts))


class _BatchNorm(torch.autograd.Function):
    """Batch normalization of a jet in train mode, written out.

    With c_k = x_k - mean(x_k), the variance is the series v = mean(c c), the inverse deviation r = (v + eps)^(-1/2), and
    y = (gamma + t u_gamma) r c + beta + t u_beta; products are those of series. `power_series` holds the arithmetic of (T, C) series, the
    rest are inner products per channel and sums of images weighted per channel, each one pass over memory.
    """

    @staticmethod
    def forward(
        ctx: Any,
        stack: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        weight_direction: Tensor | None,
        bias_direction: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
        batch: int,
        num_out: int,
    ) -> Tensor:
        xs = stack.split(batch)
        count = xs[0].numel() // xs[0].shape[1]
        # The value goes through the framework's kernel, so it and the running statistics equal those of nn.BatchNorm2d.
        value, mean, inverse_std = torch.native_batch_norm(
            xs[0], weight, bias, running_mean, running_var, True, momentum, eps
        )
        gamma = torch.ones_like(mean) if weight is None else weight
        kernel_state = (torch.ones_like(mean), mean, inverse_std, eps)
        means, variance = [mean], [inverse_std.pow(-2)]  # variance[0] includes eps
        for k in range(1, num_out):
            total = torch.zeros_like(mean)
            if k < len(xs):
                dot, mean_k = _dot_with_centred_value(xs[k], xs[0], kernel_state, count)
                means.append(mean_k)
                total = total + 2 * dot
            for i in range(1, k):
                if i < len(xs) and k - i < len(xs):
                    total = total + _covariance(xs[i], xs[k - i], means[i], means[k - i])
            variance.append(total)
        v_TC = torch.stack(variance)
        inverse_TC = power(v_TC, -0.5)
        scale_TC = gamma * inverse_TC
        if weight_direction is not None:
            scale_TC[1:] += weight_direction * inverse_TC[:-1]
        outs = [value]
        for k in range(1, num_out):
            sources = range(min(k + 1, len(xs)))
            shift = -sum((scale_TC[k - j] * means[j] for j in sources), start=torch.zeros_like(mean))
            if k == 1 and bias_direction is not None:
                shift = shift + bias_direction
            outs.append(_weighted_sum([(xs[j], scale_TC[k - j]) for j in sources], shift))
        ctx.save_for_backward(stack, gamma, weight_direction, torch.stack(means), v_TC, inverse_TC, scale_TC)
        ctx.batch, ctx.eps, ctx.count = batch, eps, count
        return torch.cat(outs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        stack, gamma, weight_direction, means, v_TC, inverse_TC, scale_TC = ctx.saved_tensors
        count = ctx.count
        xs, grads = stack.split(ctx.batch), grad.split(ctx.batch)
        kernel_state = (torch.ones_like(gamma), means[0], inverse_TC[0], ctx.eps)
        grad_means: list[Tensor] = []
        grad_scale = torch.zeros_like(scale_TC)  # divided by the number of pixels, as all inner products here
        for i, grad_i in enumerate(grads):
            dot, grad_mean = _dot_with_centred_value(grad_i, xs[0], kernel_state, count)
            grad_means.append(grad_mean)
            grad_scale[i] += dot
            for j in range(1, min(i + 1, len(xs))):
                grad_scale[i - j] += _covariance(grad_i, xs[j], grad_mean, means[j])
        grad_inverse = gamma * grad_scale
        if weight_direction is not None:
            grad_inverse[:-1] += weight_direction * grad_scale[1:]
        grad_variance = convolve_adjoint(grad_inverse, -0.5 * power(v_TC, -1.5))
        grad_xs = []
        for j in range(len(xs)):
            parts: list[tuple[Tensor, Tensor]] = []
            shift = torch.zeros_like(gamma)
            for i in range(j, len(grads)):
                parts.append((grads[i], scale_TC[i - j]))
                shift = shift - scale_TC[i - j] * grad_means[i]
            for k in range(j, len(grads)):
                if k - j < len(xs):
                    parts.append((xs[k - j], 2 * grad_variance[k]))
                    shift = shift - 2 * grad_variance[k] * means[k - j]
            grad_xs.append(_weighted_sum(parts, shift))
        grad_weight = count * (grad_scale * inverse_TC).sum(0) if ctx.needs_input_grad[1] else None
        grad_bias = count * grad_means[0] if ctx.needs_input_grad[2] else None
        return torch.cat(grad_xs), grad_weight, grad_bias, *(None,) * 8


def _dot_with_centred_value(
    other: Tensor, value: Tensor, kernel_state: tuple[Tensor, Tensor, Tensor, float], count: int
) -> tuple[Tensor, Tensor]:
    """Return mean(other (value - mean)) and mean(other) per channel, from the reductions of a fused kernel."""
    ones, mean, inverse_std, eps = kernel_state
    _, scaled, total = _batch_norm_backward(
        other, value, ones, None, None, mean, inverse_std, True, eps, [False, True, True]
    )
    return scaled / (inverse_std * count), total / count


def _covariance(a: Tensor, b: Tensor, mean_a: Tensor, mean_b: Tensor) -> Tensor:
    return (a * b).mean((0, 2, 3)) - mean_a * mean_b


def _weighted_sum(parts: list[tuple[Tensor, Tensor]], shift: Tensor) -> Tensor:
    """Return sum of image times weight, plus shift; weights and shift per channel."""
    first, weight = parts[0]
    out = torch.addcmul(_channels(shift), first, _channels(weight))
    for image, weight in parts[1:]:
        out.addcmul_(image, _channels(weight))
    return out


def _channels(values_C: Tensor) -> Tensor:
    return values_C.view(1, -1, 1, 1)


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
    gamma_direction, beta_direction = x.directions.of(weight), x.directions.of(bias)
    if x.terms == 1 and gamma_direction is None and beta_direction is None:
        return x.like(functional.batch_norm(x.stack, running_mean, running_var, weight, bias, training, momentum, eps))
    if x.stack.ndim != 4:
        raise UserError(
            "exact Taylor terms know batch normalization of images (B, C, H, W) only; use derivatives nested_jvp"
        )
    num_out = x.order + 1 if training else min(x.order, x.terms if gamma_direction is not None else x.terms - 1) + 1
    if training:
        return x.like(
            _BatchNorm.apply(
                x.stack,
                weight,
                bias,
                gamma_direction,
                beta_direction,
                running_mean,
                running_var,
                momentum,
                eps,
                x.batch,
                num_out,
            )
        )
    assert running_mean is not None and running_var is not None
    inverse_std = torch.rsqrt(running_var + eps)
    centred = _add_to_value(x.stack, -_channels(running_mean), x.batch) * _channels(inverse_std)
    jet = x.like(centred if weight is None else centred * _channels(weight))
    if gamma_direction is not None:
        num_shifted = min(x.order, x.terms)
        shifted = x.like(
            torch.cat(
                [torch.zeros_like(centred[: x.batch]), centred[: num_shifted * x.batch] * _channels(gamma_direction)]
            )
        )
        jet = _add(jet, shifted)
    if bias is not None:
        jet = x.like(_add_to_value(jet.stack, _channels(bias), x.batch))
    if beta_direction is not None:
        stack = jet.padded(2)
        shift = _channels(beta_direction).expand(x.batch, *stack.shape[1:])
        jet = x.like(torch.cat([stack[: x.batch], stack[x.batch : 2 * x.batch] + shift, stack[2 * x.batch :]]))
    return jet


class _Rectifier(torch.autograd.Function):
    """max(x_0, 0), and all other coefficients where x_0 > 0."""

    @staticmethod
    def forward(ctx: Any, stack: Tensor, batch: int) -> Tensor:
        out = _gated(stack, stack[:batch], batch)
        ctx.save_for_backward(out)
        ctx.batch = batch
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (out,) = ctx.saved_tensors
        return _gated(grad, out[: ctx.batch], ctx.batch), None


def _gated(stack: Tensor, gate: Tensor, batch: int) -> Tensor:
    return _threshold_backward(stack.unflatten(0, (-1, batch)), gate.unsqueeze(0), 0).flatten(0, 1)


@rule(functional.relu, torch.relu)
def _relu(x: Jet, inplace: bool = False) -> Jet:
    return x.like(_Rectifier.apply(x.stack, x.batch))


@rule(functional.hardtanh)
def _hardtanh(x: Jet, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Jet:
    value = functional.hardtanh(x.coefficient(0), min_val, max_val)
    gate = x.coefficient(0).detach()
    rest = [_hardtanh_backward(x.coefficient(k), gate, min_val, max_val) for k in range(1, x.terms)]
    return x.like(torch.cat([value, *rest]))


@rule(functional.relu6)
def _relu6(x: Jet, inplace: bool = False) -> Jet:
    return _hardtanh(x, 0.0, 6.0)


@rule(functional.leaky_relu)
def _leaky_relu(x: Jet, negative_slope: float = 0.01, inplace: bool = False) -> Jet:
    value = x.coefficient(0)
    slope = torch.where(value.detach() > 0, 1.0, negative_slope).to(value.dtype)
    return x.like((x.stack.unflatten(0, (-1, x.batch)) * slope).flatten(0, 1))


def _smooth(x: Jet, value: Tensor, first: Tensor, second: Tensor) -> Jet:
    """Apply a function given its value and its first and second derivative at x_0 (Faa di Bruno)."""
    if x.order > 2:
        raise UserError("exact Taylor terms of smooth activations exist up to the second order")
    parts = [value]
    if x.terms > 1:
        parts.append(first * x.coefficient(1))
        if x.order == 2:
            bent = 0.5 * second * x.coefficient(1).square()
            parts.append(bent if x.terms == 2 else first * x.coefficient(2) + bent)
    return x.like(torch.cat(parts))


@rule(functional.softplus)
def _softplus(x: Jet, beta: float = 1.0, threshold: float = 20.0) -> Jet:
    value = x.coefficient(0)
    sigmoid = torch.sigmoid(beta * value)
    linear = beta * value > threshold  # where the framework's function continues as the identity
    first = torch.where(linear, torch.ones_like(sigmoid), sigmoid)
    second = torch.where(linear, torch.zeros_like(sigmoid), beta * sigmoid * (1 - sigmoid))
    return _smooth(x, functional.softplus(value, beta, threshold), first, second)


@rule(functional.silu)
def _silu(x: Jet, inplace: bool = False) -> Jet:
    value = x.coefficient(0)
    sigmoid = torch.sigmoid(value)
    slope = sigmoid * (1 - sigmoid)
    return _smooth(x, value * sigmoid, sigmoid + value * slope, slope * (2 + value * (1 - 2 * sigmoid)))


@rule(functional.gelu)
def _gelu(x: Jet, approximate: str = "none") -> Jet:
    if approximate != "none":
        raise UserError(
            "exact Taylor terms know the exact GELU only, not its tanh approximation; use derivatives nested_jvp"
        )
    value = x.coefficient(0)
    density = torch.exp(-0.5 * value.square()) / math.sqrt(2 * math.pi)
    distribution = 0.5 * (1 + torch.erf(value / math.sqrt(2)))
    return _smooth(x, value * distribution, distribution + value * density, density * (2 - value.square()))


@rule(torch.sigmoid, functional.sigmoid)
def _sigmoid(x: Jet) -> Jet:
    value = torch.sigmoid(x.coefficient(0))
    slope = value * (1 - value)
    return _smooth(x, value, slope, slope * (1 - 2 * value))


@rule(torch.tanh, functional.tanh)
def _tanh(x: Jet) -> Jet:
    value = torch.tanh(x.coefficient(0))
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
        raise UserError("exact Taylor terms know max-pooling without returned indices only")
    value, indices = functional.max_pool2d(
        x.coefficient(0), kernel_size, stride, padding, dilation, ceil_mode, return_indices=True
    )
    flat = indices.flatten(2)
    rest = [x.coefficient(k).flatten(2).gather(2, flat).view_as(value) for k in range(1, x.terms)]
    return x.like(torch.cat([value, *rest]))


@rule(functional.avg_pool2d)
def _avg_pool2d(x: Jet, *args: Any, **kwargs: Any) -> Jet:
    return x.like(functional.avg_pool2d(x.stack, *args, **kwargs))


@rule(functional.adaptive_avg_pool2d)
def _adaptive_avg_pool2d(x: Jet, output_size: Any) -> Jet:
    return x.like(functional.adaptive_avg_pool2d(x.stack, output_size))


@rule(torch.mean)
def _mean(x: Jet, dim: Any = None, keepdim: bool = False) -> Jet:
    axes = (dim,) if isinstance(dim, int) else tuple(dim or ())
    if not axes or any(axis % x.ndim == 0 for axis in axes):
        raise UserError("exact Taylor terms know means over axes other than the batch only")
    return x.like(x.stack.mean(axes, keepdim=keepdim))


@rule(torch.flatten)
def _flatten(x: Jet, start_dim: int = 0, end_dim: int = -1) -> Jet:
    if start_dim % x.ndim == 0:
        raise UserError("exact Taylor terms cannot flatten the batch axis")
    return x.like(x.stack.flatten(start_dim, end_dim))


@rule(torch.reshape)
def _reshape(x: Jet, shape: Any) -> Jet:
    shape = tuple(shape)
    if shape[0] not in (x.batch, -1) or (shape[0] == -1 and math.prod(shape[1:]) * x.batch != x.shape.numel()):
        raise UserError("exact Taylor terms need the batch axis in front when a tensor is reshaped")
    return x.like(x.stack.reshape(x.stack.shape[0], *shape[1:]))


@rule(functional.dropout)
def _dropout(x: Jet, p: float = 0.5, training: bool = True, inplace: bool = False) -> Jet:
    if training and p > 0:
        raise UserError("exact Taylor terms need a deterministic network: dropout must be 0")
    return x


@rule(torch.add, torch.Tensor.add, torch.Tensor.__add__, torch.Tensor.__radd__)
def _add(a: Any, b: Any) -> Jet:
    if isinstance(a, Jet) and isinstance(b, Jet):
        terms = max(a.terms, b.terms)
        return a.like(a.padded(terms) + b.padded(terms))
    jet, other = (a, b) if isinstance(a, Jet) else (b, a)
    return jet.like(_add_to_value(jet.stack, other, jet.batch))


@rule(torch.sub, torch.Tensor.sub, torch.Tensor.__sub__)
def _sub(a: Any, b: Any) -> Jet:
    return _add(a, -b)


@rule(torch.mul, torch.Tensor.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__)
def _mul(a: Any, b: Any) -> Jet:
    if isinstance(a, Jet) and isinstance(b, Jet):
        terms = min(a.order + 1, a.terms + b.terms - 1)
        products = []
        for k in range(terms):
            pairs = [(i, k - i) for i in range(k + 1) if i < a.terms and k - i < b.terms]
            products.append(sum(a.coefficient(i) * b.coefficient(j) for i, j in pairs))
        return a.like(torch.cat(products))
    jet, factor = (a, b) if isinstance(a, Jet) else (b, a)
    return jet.like(jet.stack * _constant(factor, jet))


@rule(torch.div, torch.Tensor.div, torch.Tensor.__truediv__)
def _div(a: Any, b: Any) -> Jet:
    if not isinstance(a, Jet) or isinstance(b, Jet):
        raise UserError("exact Taylor terms know division by constants only; use derivatives nested_jvp")
    return a.like(a.stack / _constant(b, a))


def _constant(value: Any, jet: Jet) -> Any:
    """Return a factor that is the same for every row of the stack, or raise."""
    if isinstance(value, Tensor):
        if jet.directions.of(value) is not None:
            raise UserError("exact Taylor terms know noise in layers, not in weights that multiply a feature map")
        if value.ndim == jet.ndim and value.shape[0] != 1:
            return value.repeat(jet.terms, *(1 for _ in value.shape[1:]))
    return value


def _add_to_value(stack: Tensor, value: Any, batch: int) -> Tensor:
    """Add a constant to a stack: to the rows of x_0 alone."""
    if stack.shape[0] == batch:
        return stack + value
    return torch.cat([stack[:batch] + value, stack[batch:]])


def _pair(value: Any) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)
