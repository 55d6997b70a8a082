"""Derivatives of the logits along a direction u in weight space: d1 = g'(w) u and d2 = u' g''(w) u, both (B, K).

Four ways, all differentiable with respect to the weights by one backward pass:

`exact`: Taylor-mode forward differentiation with one rule per operation (`trainers.taylor.jets`). The default: exact, and the cheapest.
`nested_jvp`: `torch.func.jvp`, nested for d2, through `ExplicitBatchNorm2d`. Exact for any architecture whose normalizations are
    explicit; meeting a fused normalization in it raises, because the weight gradients would be wrong without a word.
`antithetic`: d1 = (g(w+u) - g(w-u)) / 2, d2 = g(w+u) + g(w-u) - 2 g(w). For smooth networks the error is of the third and fourth power
    of u. With ReLU it is no approximation of the derivatives: at usual sizes of u it measures the crossing of kinks, a
    finite-size effect that derivatives do not see (and that Eq. 5 of the paper may be said to want).
`double_backward`: reverse mode, nested; slow. The independent reference of the tests.

Reference: Jin, Yi, Wu, Mu, Huang, "Randomized Adversarial Training via Taylor Expansion", CVPR 2023, Eq. 6 and Algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn import functional
from torch.overrides import TorchFunctionMode

import trainers.taylor.rules  # noqa: F401  (registers the rules)
from models.errors import UserError
from models.layers.channel_statistics import is_synchronized
from models.modes import mode
from trainers.taylor.jets import Directions, Jet

Derivatives = Literal["exact", "nested_jvp", "antithetic", "double_backward"]
Noise = Mapping[str, Tensor]


@dataclass(frozen=True)
class TaylorTerms:
    """Logits and their derivatives along u, each (B, K); `second_BK` is None at first order."""

    value_BK: Tensor
    first_BK: Tensor
    second_BK: Tensor | None


def taylor_terms(
    model: nn.Module,
    x: Tensor,
    noise: Noise,
    *,
    order: Literal[1, 2],
    derivatives: Derivatives = "exact",
    update_statistics: bool = True,
) -> TaylorTerms:
    """Return the logits of `model` at `x` and their derivatives along `noise`, with graph to the weights.

    Args:
        model: in train or eval mode; batch statistics are differentiated in train mode.
        x: (B, C, H, W), pixels in [0,1].
        noise: u by parameter name; parameters left out have u = 0.
        order: 1, or 2 for the second derivative as well.
        derivatives: the way to compute them.
        update_statistics: whether, in train mode, running statistics take in this batch: once, from the unperturbed pass.

    Raises:
        UserError: the network holds an operation that this way cannot differentiate correctly.
    """
    compute = _WAYS[derivatives]
    if derivatives != "antithetic" and is_synchronized(model):
        raise UserError("derivatives through synchronized batch statistics are not supported; use training.batch_norm: local")
    with torch.autocast(x.device.type, enabled=False):
        if update_statistics or not model.training:
            return compute(model, x, noise, order, update_statistics)
        with mode(model, "train_without_update"):
            return compute(model, x, noise, order, False)


def _exact(model: nn.Module, x: Tensor, noise: Noise, order: int, update: bool) -> TaylorTerms:
    logits = model(Jet([x], order, Directions(model, noise)))
    assert isinstance(logits, Jet), "the network returned something else than a jet for a jet"
    return TaylorTerms(logits.value, logits.derivative(1), logits.derivative(2) if order == 2 else None)


def _nested_jvp(model: nn.Module, x: Tensor, noise: Noise, order: int, update: bool) -> TaylorTerms:
    parameters = dict(model.named_parameters())
    zero = torch.zeros((), dtype=x.dtype, device=x.device)
    one = torch.ones_like(zero)

    def logits(t: Tensor) -> Tensor:
        moved = {name: parameters[name] + t * value for name, value in noise.items()}
        return functional_call(model, moved, (x,))

    value = model(x) if update else None
    with _without_update(model), _NoFusedNormalization():
        if order == 1:
            primal, first, *_ = jvp(logits, (zero,), (one,))
            return TaylorTerms(primal if value is None else value, first, None)
        (primal, first), (_, second), *_ = jvp(lambda t: jvp(logits, (t,), (one,)), (zero,), (one,))
        return TaylorTerms(primal if value is None else value, first, second)


def _antithetic(model: nn.Module, x: Tensor, noise: Noise, order: int, update: bool) -> TaylorTerms:
    parameters = dict(model.named_parameters())

    def logits(sign: float) -> Tensor:
        moved = {name: parameters[name] + sign * value for name, value in noise.items()}
        return functional_call(model, moved, (x,))

    value = model(x)
    with _without_update(model):
        plus, minus = logits(1.0), logits(-1.0)
    second = plus + minus - 2 * value if order == 2 else None
    return TaylorTerms(value, (plus - minus) / 2, second)


def _double_backward(model: nn.Module, x: Tensor, noise: Noise, order: int, update: bool) -> TaylorTerms:
    parameters = dict(model.named_parameters())
    t = torch.zeros((), dtype=x.dtype, device=x.device, requires_grad=True)
    with _without_update(model), _NoFusedNormalization():
        moved = {name: parameters[name] + t * value for name, value in noise.items()}
        logits = functional_call(model, moved, (x,))
        first = _derivative(logits, t)
        second = _derivative(first, t) if order == 2 else None
    return TaylorTerms(model(x) if update else logits, first, second)


def _derivative(output: Tensor, t: Tensor) -> Tensor:
    """Return d output / d t for a scalar t, with graph: the gradient of t's gradient with respect to its own cotangent."""
    cotangent = torch.zeros_like(output, requires_grad=True)
    (pulled,) = torch.autograd.grad(output, t, cotangent, create_graph=True)
    (pushed,) = torch.autograd.grad(pulled, cotangent, create_graph=True)
    return pushed


def _without_update(model: nn.Module) -> Any:
    return mode(model, "train_without_update" if model.training else "eval")


class _NoFusedNormalization(TorchFunctionMode):
    """Raise when a fused normalization whose derivatives are wrong is called inside."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        uses_batch = func in _BATCH_NORMS and (args[5] if len(args) > 5 else kwargs.get("training", False))
        if uses_batch or func in _FUSED_ALWAYS:
            raise UserError(
                f"{getattr(func, '__name__', func)}: derivatives through this fused normalization are wrong without a word. Use "
                "derivatives exact, or replace the layer by ExplicitBatchNorm2d "
                "(models.layers.explicit_batch_norm.make_batch_norm_explicit)."
            )
        return func(*args, **kwargs)


# Wrong in train mode only; `training` is the sixth argument of both.
_BATCH_NORMS = frozenset({functional.batch_norm, torch.batch_norm})

_FUSED_ALWAYS = frozenset(
    {
        torch.native_batch_norm,
        torch.layer_norm,
        torch.native_layer_norm,
        torch.group_norm,
        torch.native_group_norm,
        torch.instance_norm,
        functional.layer_norm,
        functional.group_norm,
        functional.instance_norm,
    }
)

_WAYS: dict[str, Callable[[nn.Module, Tensor, Noise, int, bool], TaylorTerms]] = {
    "exact": _exact,
    "nested_jvp": _nested_jvp,
    "antithetic": _antithetic,
    "double_backward": _double_backward,
}
