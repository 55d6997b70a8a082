"""Hypernetworks: small networks that generate the convolution weights of a larger one from learned embeddings.

Shapes: U units, E embedding dimension, D hidden dimension, u channels of a unit (in and out alike), k kernel size of a unit.

A *unit* is a kernel (u, u, k, k), generated from one embedding (E,). A convolution of more channels is a grid of units, row by row over
output channels and then input channels; a 1x1 convolution reduces each unit's window to one number.

References: Ha et al., "HyperNetworks", section 4.1; PS-RED, Eq. 14 to 16.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.optim.optimizer import register_optimizer_step_post_hook

from models.backbones.base import GivesFeatures
from models.errors import UserError
from models.layer_replacement import replace_named

WindowReduction = Literal["mean", "max", "sum"]


class HaHypernetwork(nn.Module):
    """Two linear maps; the second is shared by all input channels of a unit: K[:, c] = W_out (W_in[c] z + b_in[c]) + b_out.

    With E = D = 128, u = 64, k = 3 it has 1,131,072 parameters. All slices K[:, c] lie in one affine subspace of dimension D.
    Weights start so that generated weights have the standard deviation sqrt(2 / (k k u)) under standard normal embeddings.

    Args:
        embedding_dim: E. hidden_dim: D. unit_channels: u. kernel_size: k.
        generator: source of the initial weights.
    """

    def __init__(self, embedding_dim: int, hidden_dim: int, unit_channels: int, kernel_size: int, generator: torch.Generator) -> None:
        super().__init__()
        self.unit_channels, self.kernel_size = unit_channels, kernel_size
        slice_size = unit_channels * kernel_size**2
        self.inner_weight = _normal((unit_channels, hidden_dim, embedding_dim), embedding_dim**-0.5, generator)
        self.inner_bias = nn.Parameter(torch.zeros(unit_channels, hidden_dim))
        self.outer_weight = _normal((slice_size, hidden_dim), math.sqrt(2 / slice_size / hidden_dim), generator)
        self.outer_bias = nn.Parameter(torch.zeros(slice_size))

    def forward(self, embeddings_UE: Tensor) -> Tensor:
        """Return the kernels (U, u, u, k, k): unit, output channel, input channel, window."""
        hidden_UcD = torch.einsum("ue,cde->ucd", embeddings_UE, self.inner_weight) + self.inner_bias
        slices = functional.linear(hidden_UcD, self.outer_weight, self.outer_bias)
        u, k = self.unit_channels, self.kernel_size
        return slices.view(-1, u, u, k, k).transpose(1, 2)


class FlatHypernetwork(nn.Module):
    """Two linear maps from an embedding to a whole unit: K = W_out (W_in z + b_in) + b_out. The literal reading of PS-RED's Eq. 14.

    Args as for `HaHypernetwork`. With E = D = 128, u = 64, k = 3 it has 4,771,968 parameters.
    """

    def __init__(self, embedding_dim: int, hidden_dim: int, unit_channels: int, kernel_size: int, generator: torch.Generator) -> None:
        super().__init__()
        self.unit_channels, self.kernel_size = unit_channels, kernel_size
        fan_in = unit_channels * kernel_size**2
        self.inner_weight = _normal((hidden_dim, embedding_dim), embedding_dim**-0.5, generator)
        self.inner_bias = nn.Parameter(torch.zeros(hidden_dim))
        self.outer_weight = _normal((unit_channels * fan_in, hidden_dim), math.sqrt(2 / fan_in / hidden_dim), generator)
        self.outer_bias = nn.Parameter(torch.zeros(unit_channels * fan_in))

    def forward(self, embeddings_UE: Tensor) -> Tensor:
        """Return the kernels (U, u, u, k, k)."""
        hidden_UD = functional.linear(embeddings_UE, self.inner_weight, self.inner_bias)
        kernels = functional.linear(hidden_UD, self.outer_weight, self.outer_bias)
        u, k = self.unit_channels, self.kernel_size
        return kernels.view(-1, u, u, k, k)


class GeneratedConv2d(nn.Module):
    """A convolution without weights of its own; `GeneratedNetwork` puts them in place for the time of a forward pass."""

    weight: Tensor | None

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.kernel_size = conv.in_channels, conv.out_channels, conv.kernel_size
        self.stride, self.padding, self.dilation = conv.stride, conv.padding, conv.dilation
        self.bias = conv.bias
        self.weight = None

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if self.weight is None:
            raise RuntimeError("a generated convolution runs only inside its GeneratedNetwork")
        return functional.conv2d(x_BCHW, self.weight, self.bias, self.stride, self.padding, self.dilation)

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"


@dataclass(frozen=True)
class UnitGrid:
    """Where the weight of one convolution comes from: units [first, first + rows * columns) of a generator."""

    name: str
    rows: int
    columns: int
    kernel_size: int
    first: int

    @property
    def num_units(self) -> int:
        """Number of generated blocks."""
        return self.rows * self.columns


def lay_out(convolutions: Mapping[str, nn.Conv2d], unit_channels: int, unit_kernel_size: int) -> tuple[UnitGrid, ...]:
    """Return the grid of units of each convolution, in the given order.

    Raises:
        UserError: a convolution cannot be made of such units.
    """
    grids: list[UnitGrid] = []
    first = 0
    for name, conv in convolutions.items():
        kernel_size = conv.kernel_size[0]
        if conv.groups != 1 or conv.kernel_size != (kernel_size, kernel_size):
            raise UserError(f"convolution {name!r} is grouped or not square; a hypernetwork generates neither")
        if kernel_size not in (1, unit_kernel_size):
            raise UserError(f"convolution {name!r} has kernel size {kernel_size}; units have {unit_kernel_size}, or 1")
        if conv.out_channels % unit_channels or conv.in_channels % unit_channels:
            raise UserError(
                f"convolution {name!r} maps {conv.in_channels} to {conv.out_channels} channels, no multiples of unit_channels "
                f"{unit_channels}"
            )
        grid = UnitGrid(name, conv.out_channels // unit_channels, conv.in_channels // unit_channels, kernel_size, first)
        grids.append(grid)
        first += grid.num_units
    return tuple(grids)


# Fused optimizer kernels change parameters without raising their version counters, so steps are counted as well.
_optimizer_steps = 0


def _count_optimizer_step(*_: Any) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


register_optimizer_step_post_hook(_count_optimizer_step)


@dataclass(frozen=True)
class _Cached:
    """Generated weights and what they were generated from; aliases keep the storages from being reused by other tensors."""

    values: tuple[Tensor, ...]
    sources: tuple[Tensor, ...]
    aliases: tuple[Tensor, ...]
    versions: tuple[int, ...]
    optimizer_steps: int

    def is_of(self, sources: tuple[Tensor, ...]) -> bool:
        return self.optimizer_steps == _optimizer_steps and all(
            now is then and now._version == version and now.data_ptr() == alias.data_ptr() and now.dtype == alias.dtype
            for now, then, alias, version in zip(sources, self.sources, self.aliases, self.versions, strict=True)
        )


class WeightGenerator(nn.Module):
    """The embeddings of one network's units and the hypernetwork that turns them into weights.

    Args:
        grids: from `lay_out`.
        embeddings_UE: start values of the embeddings.
        hypernetwork: owned by this generator, unless `owned` is False: then it belongs to somebody else (a hypernetwork that all
            members of an ensemble share) and is not in this module's parameters.
        reduction: how a unit's window becomes a 1x1 kernel.
        equalize: multiply each convolution's weight by sqrt(u / input channels), the ratio of He standard deviations.

    Weights are generated anew at each use in training mode, once inside `generated_weights`, and once until the parameters change in
    eval mode and where gradients are off. A parameter counts as changed by an in-place operation, an optimizer step, a move to another
    device or dtype, and by `.train()` or `.eval()`; not by an in-place operation on its `.data` alone.
    """

    def __init__(
        self,
        grids: tuple[UnitGrid, ...],
        embeddings_UE: Tensor,
        hypernetwork: HaHypernetwork | FlatHypernetwork,
        *,
        owned: bool = True,
        reduction: WindowReduction = "mean",
        equalize: bool = False,
    ) -> None:
        super().__init__()
        self.grids = grids
        self.reduction: WindowReduction = reduction
        self.equalize = equalize
        self.embeddings = nn.Parameter(embeddings_UE)
        if owned:
            self.hypernetwork = hypernetwork
        self._borrowed = None if owned else [hypernetwork]  # a list hides it from nn.Module's registration
        self._cache: _Cached | None = None
        self._scope: _Scope | None = None

    @property
    def used_hypernetwork(self) -> HaHypernetwork | FlatHypernetwork:
        """The hypernetwork, owned or shared."""
        return self.hypernetwork if self._borrowed is None else self._borrowed[0]

    def forward(self) -> tuple[Tensor, ...]:
        """Return the weights of all generated convolutions, in the order of `grids`."""
        sources = self._sources()
        tracked = torch.is_grad_enabled() and any(source.requires_grad for source in sources)
        scope = self._scope
        if scope is None and self.training and tracked:
            return self.generate(sources)
        if not tracked or (scope is not None and scope.detach):
            return self._cached(sources)
        if scope is None:
            return _GeneratedOnce.apply(self, self._cached(sources), *sources)
        if scope.attached is None or scope.attached[0] is not self._cache or not self._is_current(sources):
            values = self._cached(sources)
            scope.attached = (self._cache, _GeneratedOnce.apply(self, values, *sources))
        return scope.attached[1]

    def generate_now(self) -> tuple[Tensor, ...]:
        """Return the weights of the present parameters, computed whatever the cache holds."""
        return self.generate(self._sources())

    def _sources(self) -> tuple[Tensor, ...]:
        return (self.embeddings, *self.used_hypernetwork.parameters())

    def generate(self, sources: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the weights as a function of (embeddings, *parameters of the hypernetwork)."""
        embeddings_UE, *parameters = sources
        hypernetwork = self.used_hypernetwork
        names = [name for name, _ in hypernetwork.named_parameters()]
        # In the parameters' precision also under autocast: the weights may outlive it in the cache.
        with torch.autocast(embeddings_UE.device.type, enabled=False):
            units = functional_call(hypernetwork, dict(zip(names, parameters, strict=True)), (embeddings_UE,))
            return tuple(self._assemble(units, grid) for grid in self.grids)

    def _assemble(self, units: Tensor, grid: UnitGrid) -> Tensor:
        own = units[grid.first : grid.first + grid.num_units]
        _, out_channels, in_channels, height, width = own.shape
        if grid.kernel_size == 1 and (height, width) != (1, 1):
            own = _REDUCTIONS[self.reduction](own)
            height = width = 1
        tiles = own.reshape(grid.rows, grid.columns, out_channels, in_channels, height, width)
        weight = tiles.transpose(1, 2).reshape(grid.rows * out_channels, grid.columns * in_channels, height, width)
        return weight / math.sqrt(grid.columns) if self.equalize else weight

    def _is_current(self, sources: tuple[Tensor, ...]) -> bool:
        return self._cache is not None and self._cache.is_of(sources)

    def _cached(self, sources: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if not self._is_current(sources):
            with torch.inference_mode(False), torch.no_grad():
                values = self.generate(sources)
                aliases = tuple(source.detach() for source in sources)
            versions = tuple(source._version for source in sources)
            self._cache = _Cached(values, sources, aliases, versions, _optimizer_steps)
        assert self._cache is not None
        return self._cache.values

    def train(self, mode: bool = True) -> WeightGenerator:
        """Set the mode and forget generated weights."""
        self._cache = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles generate their own.
        return self.__dict__ | {"_cache": None, "_scope": None}


@dataclass
class _Scope:
    detach: bool
    attached: tuple[_Cached | None, tuple[Tensor, ...]] | None = None


class _GeneratedOnce(torch.autograd.Function):
    """Weights that exist already, with a gradient: backward generates them once more, so nothing of the generation is kept alive and
    any number of backward passes, differentiable ones included, can go through."""

    @staticmethod
    def forward(ctx: Any, generator: WeightGenerator, values: tuple[Tensor, ...], *sources: Tensor) -> tuple[Tensor, ...]:
        # Not by save_for_backward, which would free them after the first of several backward passes.
        ctx.generator, ctx.sources = generator, sources
        ctx.versions = [source._version for source in sources]
        return tuple(value.detach() for value in values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        if ctx.versions != [source._version for source in ctx.sources]:
            raise RuntimeError("a parameter of a hypernetwork was changed in place between forward and backward")
        again = torch.is_grad_enabled()
        with torch.enable_grad():
            sources = tuple(source if again and source.requires_grad else source.detach().requires_grad_() for source in ctx.sources)
            weights = ctx.generator.generate(sources)
            return None, None, *torch.autograd.grad(weights, sources, gradients, create_graph=again)


class GeneratedNetwork(nn.Module):
    """A network some of whose convolutions get their weights from a `WeightGenerator`.

    Args:
        network: holds a `GeneratedConv2d` at each name of `generator.grids`; see `replace_by_generated`.
        generator: generates their weights.
    """

    def __init__(self, network: nn.Module, generator: WeightGenerator) -> None:
        super().__init__()
        self.network = network
        self.generator = generator

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return the logits (B, K)."""
        with self._weights_in_place():
            return self.network(x_BCHW)

    def forward_features(self, x_BCHW: Tensor) -> Tensor:
        """Return the pooled features (B, D) in front of the last linear layer."""
        with self._weights_in_place():
            return cast(GivesFeatures, self.network).forward_features(x_BCHW)

    @contextlib.contextmanager
    def _weights_in_place(self) -> Iterator[None]:
        convolutions: list[Any] = [self.network.get_submodule(grid.name) for grid in self.generator.grids]
        weights = self.generator()
        try:
            for conv, weight in zip(convolutions, weights, strict=True):
                conv.weight = weight
            yield
        finally:
            for conv in convolutions:
                conv.weight = None


def replace_by_generated(network: nn.Module, grids: tuple[UnitGrid, ...]) -> None:
    """Replace the convolutions that `grids` name by `GeneratedConv2d`, in place."""
    replace_named(network, [grid.name for grid in grids], lambda _name, conv: GeneratedConv2d(cast(nn.Conv2d, conv)))


@contextlib.contextmanager
def generated_weights(model: nn.Module, *, detach: bool = False) -> Iterator[None]:
    """Within, each generator in `model` generates at most once while its parameters stay as they are.

    Args:
        model: any module; without generators this does nothing.
        detach: give out weights without a gradient: for attacks, which need that of the image alone. Otherwise gradients reach
            embeddings and hypernetwork, through any number of backward passes.
    """
    generators = [module for module in model.modules() if isinstance(module, WeightGenerator)]
    before = [generator._scope for generator in generators]
    for generator in generators:
        generator._scope = _Scope(detach)
    try:
        yield
    finally:
        for generator, scope in zip(generators, before, strict=True):
            generator._scope = scope
            if generator.training and scope is None:
                generator._cache = None  # as large as the whole network: not kept between training steps


_REDUCTIONS = {
    "mean": lambda units: units.mean(dim=(-2, -1), keepdim=True),
    "max": lambda units: units.amax(dim=(-2, -1), keepdim=True),
    "sum": lambda units: units.sum(dim=(-2, -1), keepdim=True),
}


def _normal(shape: tuple[int, ...], std: float, generator: torch.Generator) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=generator) * std)
