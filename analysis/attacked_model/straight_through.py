"""A model whose steps that cut gradients pass them on, backward: rounding, comparisons, choices of the largest entry, detaching.

Forward nothing changes but one thing: an answer that only names the largest of some scores (a one-hot vector) becomes these scores, whose
largest entry is the same. Operations are recognized by name while the model runs, so no source has to be changed. What is not
recognized (a detour through numpy, a table that is looked up) cuts the gradient as before.

Reference: Bengio, Leonard, Courville, Estimating or Propagating Gradients Through Stochastic Neurons, 2013 (straight-through);
Athalye, Carlini, Wagner, Obfuscated Gradients Give a False Sense of Security, ICML 2018, section 4.1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from analysis.attacked_model.backward import values_with_gradient_of
from analysis.attacked_model.plain_model import logits_of

_ROUNDING = {"round", "floor", "ceil", "trunc", "fix", "sign", "sgn"}
_ABOVE = {"gt", "ge", "greater", "greater_equal", "__gt__", "__ge__"}
_BELOW = {"lt", "le", "less", "less_equal", "__lt__", "__le__"}
_RESHAPING = {"unsqueeze", "squeeze", "view", "reshape", "flatten", "__getitem__", "permute", "transpose", "long", "int", "contiguous"}
_SLOPE = 10.0  # of a comparison's sigmoid: pixels and activations are of order one


class StraightThroughModel(nn.Module):
    """`network` as described above; its draws are the network's."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.train(network.training)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return logits_of(self.network(x))
        with _StraightThrough() as steps:
            logits_BK = logits_of(self.network(x))
        return steps.scores(logits_BK).to(x)


class _StraightThrough(TorchFunctionMode):
    """Keeps, for tensors without a gradient, differentiable ones that say the same: of truth values or numbers a soft version of their
    shape, of indices the scores (class dimension last) whose largest entry they name."""

    def __init__(self) -> None:
        super().__init__()
        self._soft: dict[int, tuple[Tensor, Tensor]] = {}
        self._named: dict[int, tuple[Tensor, Tensor]] = {}  # of indices and of one-hot vectors

    def scores(self, output: Tensor) -> Tensor:
        """Return the model's answer with a gradient: scores for a one-hot vector, else its values."""
        if id(output) in self._named and self._named[id(output)][1].shape == output.shape:
            return self._named[id(output)][1]
        return self._with_gradient(output)

    def _with_gradient(self, value: Any) -> Any:
        if isinstance(value, Tensor) and id(value) in self._soft:
            return values_with_gradient_of(value, self._soft[id(value)][1])
        return value

    def _keep(self, result: Tensor, soft: Tensor) -> Tensor:
        self._soft[id(result)] = (result, soft)  # the tensor itself is kept, so that its identity is not reused
        return result

    def _name(self, result: Tensor, scores: Tensor) -> Tensor:
        self._named[id(result)] = (result, scores)
        return result

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        del types
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "_set_grad_enabled":
            return func(*args, **kwargs)
        with torch.enable_grad():
            return self._step(func, name, args, kwargs)

    def _step(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        first: Any = args[0] if args else kwargs.get("input")
        if name == "detach" or func == torch.Tensor.data.__get__:  # type: ignore[attr-defined] # a property written in C
            return first
        if name.rstrip("_") in _ROUNDING and isinstance(first, Tensor) and first.is_floating_point():
            return values_with_gradient_of(func(first.detach().clone(), *args[1:], **kwargs), first)
        if name in _ABOVE | _BELOW | {"eq", "__eq__"} and len(args) == 2:
            return self._comparison(func, name, *(self._with_gradient(arg) for arg in args))
        if name in ("argmax", "max", "topk") and isinstance(first, Tensor) and first.is_floating_point():
            return self._largest(func, name, first, args, kwargs)
        if name == "one_hot" and id(first) in self._named:
            result = func(*args, **kwargs)
            return self._one_hot(result, self._named[id(first)][1])
        if name in ("scatter", "scatter_") and len(args) >= 3 and id(args[2]) in self._named:
            result = func(*args, **kwargs)
            return self._one_hot(result, self._named[id(args[2])][1])
        if name == "__getitem__" and isinstance(args[1], Tensor) and id(args[1]) in self._named:
            return self._looked_up(func(*args, **kwargs), args[0], self._named[id(args[1])][1])
        if name in _RESHAPING and id(first) in self._soft and not first.is_floating_point():
            soft = self._soft[id(first)][1]
            return self._keep(func(*args, **kwargs), soft if name in ("long", "int") else func(soft, *args[1:], **kwargs))
        if name in _RESHAPING and id(first) in self._named and not first.is_floating_point():
            return self._name(func(*args, **kwargs), self._named[id(first)][1])
        if name == "where" and len(args) == 3 and id(first) in self._soft:
            soft = self._soft[id(first)][1]
            chosen = func(*args)
            return values_with_gradient_of(chosen, (soft * args[1] + (1 - soft) * args[2]).expand_as(chosen))
        result = func(*tree_map(self._with_gradient, args), **tree_map(self._with_gradient, kwargs))
        scaled = name in ("float", "double", "to", "type", "mul", "__mul__", "__rmul__", "clone")
        if scaled and id(first) in self._named and isinstance(result, Tensor) and not any(isinstance(arg, Tensor) for arg in args[1:]):
            self._name(result, self._named[id(first)][1])
        casts = name in ("float", "double", "to", "type", "half") and isinstance(first, Tensor) and id(first) in self._soft
        if casts and result.is_floating_point():
            return values_with_gradient_of(result, self._soft[id(first)][1].to(result.dtype))
        return result

    def _comparison(self, func: Any, name: str, first: Any, second: Any) -> Any:
        result = func(first, second)
        difference = first - second if name not in _BELOW else second - first
        if not isinstance(result, Tensor) or not isinstance(difference, Tensor) or not difference.is_floating_point():
            return result
        soft = 1 - difference.abs() if name in ("eq", "__eq__") else torch.sigmoid(_SLOPE * difference)
        return self._keep(result, soft.expand_as(result))

    def _largest(self, func: Any, name: str, first: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = func(*args, **kwargs)
        dim = kwargs.get("dim", args[1] if len(args) > 1 and name != "topk" else -1)
        whole = name != "topk" and "dim" not in kwargs and len(args) < 2  # of all entries at once
        if whole or not isinstance(dim, int):
            return result
        indices = result if isinstance(result, Tensor) else result.indices
        self._name(indices, first.movedim(dim, -1))
        return result

    def _one_hot(self, result: Tensor, scores: Tensor) -> Tensor:
        if result.shape != scores.shape:
            return result
        return self._name(self._keep(result, scores), scores)

    def _looked_up(self, result: Tensor, table: Tensor, scores: Tensor) -> Tensor:
        if not table.is_floating_point() or table.dim() != 2 or table.shape[0] != scores.shape[-1]:
            return result
        if result.shape == scores.shape and torch.equal(table, torch.eye(len(table)).to(table)):
            return self._one_hot(result, scores)
        soft = scores.softmax(-1) @ table
        return values_with_gradient_of(result, soft) if soft.shape == result.shape else result


__all__ = ["StraightThroughModel"]
