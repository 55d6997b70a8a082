"""Networks that draw in their forward, by torch.randn, dropout or an augmentation, brought to the contract of `models.randomness`.

`as_random_model(network)` is such a network as one random site. Its draw is a seed: under one draw every forward meets the same random
values, and another draw others, so that a draw can be fixed, attacked, repeated and drawn anew.

What it is not: its draws cannot be enumerated (there is a seed for each), so expectations are estimated; their law is not known, so that
nothing is derived from it. What is recomputed in the backward (activation checkpointing) is outside its reach.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from models.randomness import RandomModule, derive_seed

Reseed = Callable[[int], None]

_ROWS = 64  # of a batch that are drawn at once, so that a row does not depend on the batch size
_SEED_BITS = 63
_RESEED_LIMIT = 2**32  # NumPy takes no larger seed


class ForwardRandomness(RandomModule):
    """A network that draws in its forward, as a random site whose draw is a seed.

    Each image of a batch has random values of its own, those of its place in the batch, whatever the size of the batch: where the first
    dimension of what a random operation of PyTorch gives is the batch, rows are drawn in blocks of 64.

    Args:
        network: maps pixels (B, C, H, W) to logits.
        reseed: called with a seed in [0, 2^32) before every forward; for randomness from elsewhere than PyTorch's global generators: a
            generator of its own, `numpy.random.seed`, `random.seed`. None: there is none.
    """

    seed: Tensor

    def __init__(self, network: nn.Module, reseed: Reseed | None = None) -> None:
        super().__init__("per_example")
        self.network = network
        self.reseed = reseed
        self.register_draw("seed", torch.zeros((), dtype=torch.int64))
        self.take_first_draw()
        self.train(network.training)

    @property
    def num_configurations(self) -> float:
        """A continuum."""
        return math.inf

    def draw(self, generator: torch.Generator) -> None:
        """Take the next seed."""
        self.set_draw("seed", torch.randint(2**_SEED_BITS - 1, (), generator=generator))

    def forward(self, x_BCHW: Tensor) -> Any:
        seed = int(self.seed)
        with _forked(x_BCHW.device), _SeededOperations(seed, len(x_BCHW), x_BCHW.device):
            if self.reseed is not None:
                self.reseed(seed % _RESEED_LIMIT)
            return self.network(x_BCHW)


def as_random_model(network: nn.Module, reseed: Reseed | None = None) -> ForwardRandomness:
    """Return a network that draws in its forward as a model whose draws are fixed and taken by `models.randomness`.

    Args:
        network, reseed: as of `ForwardRandomness`.

    Example:
        model = as_random_model(network)  # its noise comes from torch.randn
        with frozen(model): ...           # one draw: equal images, equal logits
        resample(model)                   # another one
    """
    return ForwardRandomness(network, reseed)


@contextlib.contextmanager
def _forked(device: torch.device) -> Iterator[None]:
    """Leave the global generators of Python, NumPy and PyTorch (of the CPU and of one device) as they are."""
    states = random.getstate(), np.random.get_state()  # noqa: NPY002 - networks draw from the global generator
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002 - as above


class _SeededOperations(TorchDispatchMode):
    """Seeds PyTorch's global generators before each random operation, by the number of the operation and of its block of rows.

    Without that the second operation of a forward would begin where the first one, of a larger or smaller batch, ended.

    Args:
        seed: of the draw. num_rows: B. device: of the images.
    """

    def __init__(self, seed: int, num_rows: int, device: torch.device) -> None:
        super().__init__()
        self.seed, self.num_rows, self.device = seed, num_rows, device
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags or _has_generator(args, kwargs):
            return func(*args, **kwargs)
        number, self.count = self.count, self.count + 1
        if not self._is_by_rows(args, kwargs):
            self._seed(number, 0)
            return func(*args, **kwargs)
        written = args[0] if func._schema.is_mutable else None
        parts = []
        for block, start in enumerate(range(0, self.num_rows, _ROWS)):
            self._seed(number, block)
            parts.append(func(*self._rows(args, start), **self._rows(kwargs, start)))
        if written is not None:
            return written.copy_(torch.cat(parts)[: self.num_rows])
        return _joined(parts, self.num_rows)

    def _seed(self, number: int, block: int) -> None:
        value = derive_seed(self.seed, number, block)
        torch.default_generator.manual_seed(value)
        if self.device.type == "cuda":
            torch.cuda.default_generators[self.device.index or 0].manual_seed(value)

    def _is_by_rows(self, args: Any, kwargs: Any) -> bool:
        leaves = tree_flatten((args, kwargs))[0]
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()]
        if tensors:
            return all(len(tensor) == self.num_rows for tensor in tensors)
        return bool(args) and isinstance(args[0], list | tuple) and bool(args[0]) and args[0][0] == self.num_rows

    def _rows(self, arguments: Any, start: int) -> Any:
        """Return the arguments of an operation for one block of rows, filled up to 64."""
        leaves, shape = tree_flatten(arguments)
        if any(isinstance(leaf, Tensor) and leaf.dim() for leaf in leaves) or not isinstance(arguments, tuple):
            return tree_unflatten([self._block(leaf, start) for leaf in leaves], shape)
        if arguments and isinstance(arguments[0], list | tuple):
            return ([_ROWS, *arguments[0][1:]], *arguments[1:])
        return arguments

    @staticmethod
    def _block(leaf: Any, start: int) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.dim():
            return leaf
        rows = leaf[start : start + _ROWS]
        if len(rows) == _ROWS:
            return rows.clone()
        return torch.cat([rows, rows[-1:].expand(_ROWS - len(rows), *rows.shape[1:])])


def _has_generator(args: Any, kwargs: Any) -> bool:
    return any(isinstance(leaf, torch.Generator) for leaf in tree_flatten((args, kwargs))[0])


def _joined(parts: list[Any], num_rows: int) -> Any:
    """Return the results of blocks, tensors or tuples of tensors, as those of one call."""
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)[:num_rows]
    return tuple(torch.cat(each)[:num_rows] for each in zip(*parts, strict=True))
