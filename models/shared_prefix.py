"""What lies before the first random layer, computed once for several draws, forward and backward.

Draws differ from the first random layer on. Layers before it see the same images under every draw, so that their outputs are kept from
the first draw and given to the others; each draw's gradient is taken by those outputs, and their sum goes back to the images once. Numbers
are those of separate passes up to the order of a sum.

A layer is shared only if its output is known to be a function of its input alone: plain layers of PyTorch and blocks of our backbones that
hold nothing else, no batch statistics, no hooks. Where a plug-in or another library brings a random layer, all is computed for each draw:
its draws may be written into the weights of others.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from models.randomness import random_sites

_PLAIN_LAYERS = (nn.Conv2d, nn.Linear, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.SiLU, nn.GELU, nn.MaxPool2d, nn.AvgPool2d, nn.Sequential)
_CONTAINERS = (nn.ModuleDict, nn.ModuleList)
_OURS = "models."
_OUR_BLOCKS = ("models.backbones.", "models.classifier")


@runtime_checkable
class StandsForNetwork(Protocol):
    """A module that computes with a network which is no submodule of it."""

    @property
    def network(self) -> nn.Module:
        """The network behind it."""


class SharedPrefix:
    """A context in which calls of a model with the same images share what lies before its first random layer.

    Args:
        model: maps images (B, ...) to logits; or what stands for such a network.
        x: the images, the very tensor that every call gets.
        num_calls: calls that follow; a single one shares nothing.
    """

    def __init__(self, model: Any, x: Tensor, num_calls: int) -> None:
        network = model.network if isinstance(model, StandsForNetwork) else model
        useful = num_calls > 1 and isinstance(network, nn.Module) and "forward" not in network.__dict__ and _holds_its_own_draws(network)
        self._layers = list(_shareable(network)) if useful else []
        self._x = x
        # By the identity of what a layer is given: what it stands for in the graph of the prefix, and itself, to keep the identity taken.
        self._known: dict[int, tuple[Tensor, Tensor]] = {id(x): (x, x)}
        self._outputs: dict[tuple[int, int], Tensor] = {}
        self._ends: list[Tensor] = []
        self._gradients: dict[int, Tensor] = {}

    def __enter__(self) -> SharedPrefix:
        for layer in self._layers:
            # An attribute of the instance hides the method of its class, and leaves no trace when it is taken away.
            layer.__dict__["forward"] = functools.partial(self._call, layer, layer.forward)
        return self

    def __exit__(self, *_: object) -> None:
        for layer in self._layers:
            del layer.__dict__["forward"]

    def _call(self, layer: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if id(x) not in self._known:
            return forward(x)
        key = (id(layer), id(x))
        if key not in self._outputs:
            output = forward(self._known[id(x)][0])
            end = output.detach().requires_grad_() if output.requires_grad else output
            self._outputs[key] = end
            self._known[id(end)] = (output, end)
            if end.requires_grad:
                self._ends.append(end)
        return self._outputs[key]

    def add_gradient_of(self, value: Tensor) -> None:
        """Add the gradient of a number that was computed from an answer inside this context."""
        wanted = [self._x, *self._ends]
        if len(wanted) == 1:
            found: tuple[Tensor | None, ...] = torch.autograd.grad(value, self._x)  # an answer without a path to the images is an error
        else:
            found = torch.autograd.grad(value, wanted, allow_unused=True)
            if all(gradient is None for gradient in found):
                raise RuntimeError("no gradient leads from the answer to the images")
        for tensor, gradient in zip(wanted, found, strict=True):
            if gradient is not None:
                gradient = gradient.float() if gradient.dtype.itemsize < 4 else gradient
                # Not in place: autograd may return views.
                self._gradients[id(tensor)] = self._gradients[id(tensor)] + gradient if id(tensor) in self._gradients else gradient

    def input_gradient(self) -> Tensor:
        """Return the sum of the gradients by the images, shaped as they are."""
        total = self._gradients.get(id(self._x))
        ends = [end for end in self._ends if id(end) in self._gradients]
        if ends:
            outputs = [self._known[id(end)][0] for end in ends]
            gradients = [self._gradients[id(end)].to(end.dtype) for end in ends]
            (through_prefix,) = torch.autograd.grad(outputs, self._x, gradients)
            total = through_prefix if total is None else total + through_prefix
        assert total is not None, "a gradient was added before"
        return total.to(self._x.dtype)


def _holds_its_own_draws(network: nn.Module) -> bool:
    sites = [site for _, site in random_sites(network)]
    return bool(sites) and all(type(site).__module__.startswith(_OURS) for site in sites)


def _shareable(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the largest parts of a network whose output is a function of their input alone."""
    if type(module) is nn.Identity:
        return
    if type(module) not in _CONTAINERS and _is_function_of_input(module):
        yield module
    else:
        for child in module.children():
            yield from _shareable(child)


def _is_function_of_input(module: nn.Module) -> bool:
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or "forward" in module.__dict__:
        return False
    if hasattr(module, "forward_features"):  # a whole network: answers stay those of a draw
        return False
    if getattr(module, "inplace", False) or getattr(module, "parametrizations", None):
        return False
    if type(module) is nn.BatchNorm2d:
        return not module.training and module.track_running_stats
    if type(module) not in (*_PLAIN_LAYERS, *_CONTAINERS, nn.Identity) and not type(module).__module__.startswith(_OUR_BLOCKS):
        return False
    return all(_is_function_of_input(child) for child in module.children())
