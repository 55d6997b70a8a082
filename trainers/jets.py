"""Taylor-mode forward differentiation of a network along a direction u in weight space.

A `Jet` holds the Taylor coefficients x_0, x_1, ..., x_n of a batch as a function of t where the weights are w + t u:
x(t) = x_0 + t x_1 + t^2 x_2 + ..., that is, x_k is 1/k! times the k-th derivative. The coefficients are stacked along the batch
axis, so a convolution handles all of them in one call. Passing a jet through an unchanged `nn.Module` yields the jet of the
logits; ordinary reverse mode through that computation gives the exact weight gradients of every coefficient.

Each operation has its own rule (`trainers.jet_rules`); one without a rule raises. No derivative formula of the framework's fused batch
normalization is ever used: in forward mode those are wrong as soon as they are differentiated again. And where nested forward mode pays
2^n times for order n, the rules pay about n^2/2.

Shapes: B batch, T stored coefficients (trailing zero coefficients are not stored), stack (T B, ...).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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


class Directions:
    """The direction u in weight space: `directions.of(weight)` is the part of u that belongs to a weight, or None where u is zero.

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
    """Taylor coefficients of a batch; stands for a tensor of shape (B, ...) in the forward of a network.

    Attributes:
        stack: (T B, ...), coefficient k in rows k B to (k + 1) B.
        batch: B.
        order: n, the highest coefficient that is computed.
        directions: u.
    """

    __slots__ = ("batch", "directions", "order", "stack")

    def __init__(self, stack: Tensor, batch: int, order: int, directions: Directions) -> None:
        self.stack, self.batch, self.order, self.directions = stack, batch, order, directions

    @classmethod
    def constant(cls, x: Tensor, order: int, directions: Directions) -> Jet:
        """Return the jet of an input that does not depend on the weights."""
        return cls(x, x.shape[0], order, directions)

    @property
    def terms(self) -> int:
        """T, the number of stored coefficients."""
        return self.stack.shape[0] // self.batch

    def coefficient(self, index: int) -> Tensor:
        """Return x_index, of shape (B, ...); zeros where it is not stored."""
        if index >= self.terms:
            return torch.zeros_like(self.stack[: self.batch])
        return self.stack[index * self.batch : (index + 1) * self.batch]

    def like(self, stack: Tensor) -> Jet:
        """Return a jet with another stack."""
        return Jet(stack, self.batch, self.order, self.directions)

    def padded(self, terms: int) -> Tensor:
        """Return the stack with zero coefficients appended up to `terms`."""
        missing = terms - self.terms
        if missing <= 0:
            return self.stack
        return torch.cat([self.stack, self.stack.new_zeros((missing * self.batch, *self.stack.shape[1:]))])

    @classmethod
    def __torch_function__(
        cls, func: Any, types: tuple[type, ...], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        implementation = RULES.get(func)
        if implementation is None:
            name = getattr(func, "__name__", str(func))
            raise UserError(
                f"exact Taylor terms have no rule for the operation {name!r} of this network; use derivatives nested_jvp or antithetic"
            )
        return implementation(*args, **(kwargs or {}))

    def __getattr__(self, name: str) -> Any:
        raise UserError(
            f"exact Taylor terms have no rule for the operation Tensor.{name} of this network; use derivatives nested_jvp or antithetic"
        )

    @property
    def shape(self) -> torch.Size:
        """(B, ...), the shape of the batch that the jet stands for."""
        return torch.Size((self.batch, *self.stack.shape[1:]))

    @property
    def dtype(self) -> torch.dtype:
        """Type of the coefficients."""
        return self.stack.dtype

    @property
    def device(self) -> torch.device:
        """Where the coefficients are."""
        return self.stack.device

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return self.stack.ndim

    def dim(self) -> int:
        """Return the number of axes."""
        return self.stack.ndim

    def size(self, axis: int | None = None) -> Any:
        """Return the shape, or its entry at `axis`."""
        return self.shape if axis is None else self.shape[axis]

    def is_floating_point(self) -> bool:
        """Return True."""
        return True

    def contiguous(self, **kwargs: Any) -> Jet:
        """Return the jet with a contiguous stack."""
        return self.like(self.stack.contiguous(**kwargs))

    def mean(self, *args: Any, **kwargs: Any) -> Jet:
        """Return the mean over axes other than the batch."""
        return RULES[torch.mean](self, *args, **kwargs)

    def flatten(self, *args: Any, **kwargs: Any) -> Jet:
        """Flatten axes other than the batch."""
        return RULES[torch.flatten](self, *args, **kwargs)

    def reshape(self, *shape: Any) -> Jet:
        """Reshape, the batch axis staying in front."""
        return RULES[torch.reshape](self, shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape)

    view = reshape

    def __add__(self, other: Any) -> Jet:
        return RULES[torch.add](self, other)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Jet:
        return RULES[torch.sub](self, other)

    def __mul__(self, other: Any) -> Jet:
        return RULES[torch.mul](self, other)

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Jet:
        return RULES[torch.div](self, other)

    def __neg__(self) -> Jet:
        return self.like(-self.stack)
