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

from models.accelerator import has_module_like_cuda
from models.randomness import RandomModule, derive_seed

Reseed = Callable[[int], None]

_ROWS = 16  # that are drawn at once, so that a row does not depend on how many there are
_SEED_BITS = 63
_RESEED_LIMIT = 2**32  # NumPy takes no larger seed


class ForwardRandomness(RandomModule):
    """A network that draws in its forward, as a random site whose draw is a seed.

    The rows of what a random operation of PyTorch gives (its first dimension) are drawn in blocks of 16. So an image of a batch has the
    values of its place in the batch, whatever the size of the batch, and a value that a batch shares stays what it is.

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
        seed = torch.randint(2**_SEED_BITS - 1, (), generator=generator)
        self.set_draw("seed", seed, on_host=int(seed))

    def forward(self, x_BCHW: Tensor) -> Any:
        seed = int(self.draw_on_host("seed"))
        with _forked(x_BCHW.device), _SeededOperations(seed, x_BCHW.device):
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
        with torch.random.fork_rng([device], device_type=device.type) if has_module_like_cuda(device) else torch.random.fork_rng([]):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002 - as above


class _SeededOperations(TorchDispatchMode):
    """Seeds PyTorch's global generators before each random operation, by its number in the forward and that of its block of rows.

    Without that the second operation of a forward would begin where the first one, of a larger or smaller batch, ended; and PyTorch's
    values of a row depend on how many rows there are, for small tensors and on GPUs.

    Args:
        seed: of the draw. device: of the images.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        super().__init__()
        self.seed, self.device = seed, device
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags or _has_generator(args, kwargs):
            return func(*args, **kwargs)
        number, self.count = self.count, self.count + 1
        size_at = next((place for place, each in enumerate(func._schema.arguments) if each.name == "size"), None)
        num_rows = _num_rows(args, kwargs, size_at)
        if num_rows is None:
            self._seed(number, 0)
            return func(*args, **kwargs)
        parts = []
        for block, start in enumerate(range(0, num_rows, _ROWS)):
            self._seed(number, block)
            block_args, block_kwargs = _block((args, kwargs), start, size_at)
            parts.append(func(*block_args, **block_kwargs))
        if func._schema.is_mutable:
            return args[0].copy_(torch.cat(parts)[:num_rows])
        return _joined(parts, num_rows)

    def _seed(self, number: int, block: int) -> None:
        value = derive_seed(self.seed, number, block)
        torch.default_generator.manual_seed(value)
        if has_module_like_cuda(self.device):
            module = torch.get_device_module(self.device)
            index = module.current_device() if self.device.index is None else self.device.index
            module.default_generators[index].manual_seed(value)


def _has_generator(args: Any, kwargs: Any) -> bool:
    return any(isinstance(leaf, torch.Generator) for leaf in tree_flatten((args, kwargs))[0])


def _num_rows(args: Any, kwargs: Any, size_at: int | None) -> int | None:
    """Return the length of the first dimension of what a random operation gives; None: it has none, tensors of different
    lengths, or a place where it is put."""
    if "out" in kwargs:
        return None
    lengths = {len(leaf) for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor) and leaf.dim()}
    if size_at is not None and size_at < len(args) and args[size_at]:
        lengths.add(args[size_at][0])
    return lengths.pop() if len(lengths) == 1 and min(lengths) > 0 else None


def _block(arguments: tuple[Any, Any], start: int, size_at: int | None) -> tuple[Any, Any]:
    """Return the arguments of a random operation for one block of rows, which the last row fills up."""
    args, kwargs = arguments
    if size_at is not None and size_at < len(args):
        args = (*args[:size_at], [_ROWS, *args[size_at][1:]], *args[size_at + 1 :])
    leaves, shape = tree_flatten((args, kwargs))
    made: tuple[Any, Any] = tree_unflatten([_rows(leaf, start) for leaf in leaves], shape)
    return made


def _rows(leaf: Any, start: int) -> Any:
    if not isinstance(leaf, Tensor) or not leaf.dim():
        return leaf
    rows = leaf[start : start + _ROWS]
    return torch.cat([rows, rows[-1:].expand(_ROWS - len(rows), *rows.shape[1:])])  # a copy: the operation may write to it


def _joined(parts: list[Any], num_rows: int) -> Any:
    """Return the results of blocks, tensors or tuples of tensors, as those of one call."""
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)[:num_rows]
    return tuple(torch.cat(each)[:num_rows] for each in zip(*parts, strict=True))
