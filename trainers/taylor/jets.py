"""Taylor-mode forward differentiation of a network along a direction u in weight space.

A `Jet` holds the Taylor coefficients x_0, x_1, ..., x_n of a batch as a function of t where the weights are w + t u:
x(t) = x_0 + t x_1 + t^2 x_2 + ..., that is, x_k is 1/k! times the k-th derivative. Passing a jet through an unchanged `nn.Module` yields
the jet of the logits; ordinary reverse mode through that computation gives the exact weight gradients of every coefficient.

Each operation has its own rule (`trainers.taylor.rules`); one without a rule raises. No derivative formula of the framework's fused batch
normalization is ever used: in forward mode those are wrong as soon as they are differentiated again. And where nested forward mode
costs 2^n forward passes for order n, the rules cost about n^2 / 2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from models.errors import UserError

Rule = Callable[..., Any]
RULES: dict[Any, Rule] = {}


def rule(*functions: Any) -> Callable[[Rule], Rule]:
    """Register the decorated function as the rule of the given PyTorch functions."""

    def register(implementation: Rule) -> Rule:
        for function in functions:
            RULES[function] = implementation
        return implementation

    return register


def no_rule(what: str) -> UserError:
    """Return the error for something that exact Taylor terms cannot pass through."""
    return UserError(f"exact Taylor terms have no rule for {what}; use derivatives nested_jvp or antithetic")


class Directions:
    """The direction u in weight space: `of(weight)` is the part of u that belongs to a weight, or None where u is zero.

    Args:
        model: the network.
        noise: u by parameter name; parameters that are left out have u = 0.
    """

    def __init__(self, model: nn.Module, noise: Mapping[str, Tensor]) -> None:
        self._by_parameter = {id(model.get_parameter(name)): value.detach() for name, value in noise.items()}

    def of(self, weight: Tensor | None) -> Tensor | None:
        """Return u for `weight`."""
        return None if weight is None else self._by_parameter.get(id(weight))


class Jet:
    """Taylor coefficients of a batch; stands for one tensor in the forward of a network.

    Attributes:
        coefficients: x_0, ..., each of the tensor's shape; trailing zero coefficients are left out, so an input has one.
        order: n, the highest coefficient that is computed.
        directions: u.
    """

    __slots__ = ("coefficients", "directions", "order")

    def __init__(self, coefficients: Sequence[Tensor], order: int, directions: Directions) -> None:
        self.coefficients, self.order, self.directions = tuple(coefficients), order, directions

    @property
    def value(self) -> Tensor:
        """x_0."""
        return self.coefficients[0]

    @property
    def terms(self) -> int:
        """Number of coefficients that are not known to be zero."""
        return len(self.coefficients)

    def derivative(self, index: int) -> Tensor:
        """Return the derivative of the given order at t = 0."""
        if index >= self.terms:
            return torch.zeros_like(self.value)
        factor = 1
        for k in range(2, index + 1):
            factor *= k
        return self.coefficients[index] if factor == 1 else factor * self.coefficients[index]

    def like(self, coefficients: Sequence[Tensor]) -> Jet:
        """Return a jet with other coefficients, of the same order and direction."""
        return Jet(coefficients, self.order, self.directions)

    def map(self, function: Callable[[Tensor], Tensor]) -> Jet:
        """Apply a linear function that does not depend on the weights."""
        return self.like([function(coefficient) for coefficient in self.coefficients])

    @classmethod
    def __torch_function__(
        cls, func: Any, types: tuple[type, ...], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        implementation = RULES.get(func)
        if implementation is None:
            raise no_rule(f"the operation {getattr(func, '__name__', str(func))!r} of this network")
        return implementation(*args, **(kwargs or {}))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise no_rule(f"the operation Tensor.{name} of this network")

    shape = property(lambda self: self.value.shape)
    dtype = property(lambda self: self.value.dtype)
    device = property(lambda self: self.value.device)
    ndim = property(lambda self: self.value.ndim)

    def dim(self) -> int:
        """Return the number of axes."""
        return self.value.ndim

    def size(self, axis: int | None = None) -> Any:
        """Return the shape, or its entry at `axis`."""
        return self.shape if axis is None else self.shape[axis]

    def is_floating_point(self) -> bool:
        """Return whether coefficients are floating-point numbers."""
        return self.value.is_floating_point()

    def contiguous(self, **kwargs: Any) -> Jet:
        """Return the jet with contiguous coefficients."""
        return self.map(lambda x: x.contiguous(**kwargs))

    def mean(self, *args: Any, **kwargs: Any) -> Jet:
        """Return the mean over axes."""
        return self.map(lambda x: x.mean(*args, **kwargs))

    def flatten(self, *args: Any, **kwargs: Any) -> Jet:
        """Flatten axes."""
        return self.map(lambda x: x.flatten(*args, **kwargs))

    def reshape(self, *shape: Any) -> Jet:
        """Reshape."""
        return self.map(lambda x: x.reshape(*shape))

    view = reshape

    def __add__(self, other: Any) -> Jet:
        return RULES[torch.add](self, other)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Jet:
        return RULES[torch.sub](self, other)

    def __rsub__(self, other: Any) -> Jet:
        return RULES[torch.sub](other, self)

    def __mul__(self, other: Any) -> Jet:
        return RULES[torch.mul](self, other)

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Jet:
        return RULES[torch.div](self, other)

    def __neg__(self) -> Jet:
        return self.map(torch.neg)

    def __len__(self) -> int:
        return len(self.value)


def _without_rule(name: str) -> Callable[..., Any]:
    def refuse(self: Jet, *args: Any, **kwargs: Any) -> Any:
        raise no_rule(f"the operation Tensor.{name} of this network")

    return refuse


_OPERATORS = (
    "getitem setitem iter contains float int index complex bool eq ne lt le gt ge abs pos invert pow rpow matmul rmatmul mod rmod floordiv "
    "rfloordiv rtruediv and or xor rand ror rxor"
)
for _name in _OPERATORS.split():
    # Python looks for them on the class, not through `__getattr__`: without an entry a TypeError follows, or objects are compared.
    setattr(Jet, f"__{_name}__", _without_rule(f"__{_name}__"))
