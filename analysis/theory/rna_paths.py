"""Paths of an RNA network: how many there are, how far apart they lie, how attacks transfer between them.

A *path* is the tuple of choices of all random normalizations, in module order; the *difference* of two paths is the number of layers
in which they differ. L layers, n types per layer.
Reference: Dong, Chen, Wang, Xu, "Random Normalization Aggregation for Adversarial Defense", NeurIPS 2022, section 4, Fig. 3 and 5c.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from analysis.theory.transferability import (
    DrawPair,
    GradientCosines,
    current_draw,
    gradient_cosines,
    undisturbed,
)
from models.layers.random_normalization import RandomNormalization2d
from models.randomness import derive_seed, num_configurations, random_sites

Path = tuple[int, ...]


def random_normalizations(model: nn.Module) -> list[RandomNormalization2d]:
    """Return the random normalizations of `model`, in module order.

    Raises:
        ValueError: there is none.
    """
    sites = [site for _, site in random_sites(model) if isinstance(site, RandomNormalization2d)]
    if not sites:
        raise ValueError("the model has no random normalization")
    return sites


def set_path(model: nn.Module, path: Sequence[int]) -> None:
    """Set the choice of every random normalization; the path may be one that a layer-based model never draws.

    Raises:
        ValueError: the path has another number of layers.
    """
    sites = random_normalizations(model)
    if len(path) != len(sites):
        raise ValueError(f"the path has {len(path)} choices, the model {len(sites)} random normalizations")
    for site, choice in zip(sites, path, strict=True):
        site.set_configuration(choice)


@dataclass(frozen=True)
class PathStatistics:
    """The random space of an RNA network.

    Attributes:
        num_layers: L. num_types: n of each layer. num_paths: of the space that is drawn from, an exact integer.
        probability_D: P(difference = d) of two independent uniform paths, d = 0..L.
        mean, variance: of that difference; L (1 - 1/n) and L (1/n) (1 - 1/n) for equal n and choices per layer.
    """

    num_layers: int
    num_types: tuple[int, ...]
    num_paths: int
    probability_D: tuple[float, ...]
    mean: float
    variance: float

    @property
    def probability_of_same_path(self) -> float:
        """P(difference = 0) = 1 / num_paths."""
        return self.probability_D[0]


def path_statistics(model: nn.Module) -> PathStatistics:
    """Return the size of the space of paths and the distribution of the difference of two draws."""
    counted: dict[str, tuple[int, int]] = {}
    types = []
    for name, site in random_sites(model):
        if isinstance(site, RandomNormalization2d):
            types.append(site.num_configurations)
            group = site.stream_name or name
            layers = counted.get(group, (0, 0))[1]
            counted[group] = (site.num_configurations, layers + 1)
    if not types:
        raise ValueError("the model has no random normalization")
    distribution = [1.0] + [0.0] * len(types)
    for num_types, layers in counted.values():  # layers that choose together differ together
        same = 1 / num_types
        distribution = [
            same * probability + (1 - same) * (distribution[d - layers] if d >= layers else 0.0)
            for d, probability in enumerate(distribution)
        ]
    mean = sum(d * probability for d, probability in enumerate(distribution))
    variance = sum((d - mean) ** 2 * probability for d, probability in enumerate(distribution))
    total = num_configurations(model)
    assert isinstance(total, int)
    return PathStatistics(len(types), tuple(types), total, tuple(distribution), mean, variance)


def flip_layers(path: Path, num_types: Sequence[int], difference: int, generator: torch.Generator) -> Path:
    """Return a path that differs from `path` in exactly `difference` random layers, each moved to another type uniformly.

    Raises:
        ValueError: there are not that many layers with more than one type.
    """
    movable = [layer for layer, count in enumerate(num_types) if count > 1]
    if not 0 <= difference <= len(movable):
        raise ValueError(f"difference {difference} is outside [0, {len(movable)}]")
    chosen = [movable[index] for index in torch.randperm(len(movable), generator=generator)[:difference].tolist()]
    flipped = list(path)
    for layer in chosen:
        other = int(torch.randint(num_types[layer] - 1, (), generator=generator))
        flipped[layer] = other + (other >= path[layer])
    return tuple(flipped)


def pairs_at_difference(model: nn.Module, difference: int, num_pairs: int = 10, seed: int = 0) -> list[DrawPair]:
    """Return pairs of a uniform path and one that differs from it in exactly `difference` layers."""
    sites = random_normalizations(model)
    num_types = [site.num_configurations for site in sites]
    generator = torch.Generator().manual_seed(derive_seed(seed, "paths", difference))
    pairs = []
    with undisturbed(model):
        for _ in range(num_pairs):
            path = tuple(int(torch.randint(count, (), generator=generator)) for count in num_types)
            draws = []
            for choices in (path, flip_layers(path, num_types, difference, generator)):
                set_path(model, choices)
                draws.append(current_draw(model))
            pairs.append(DrawPair(draws[0], draws[1], float(difference)))
    return pairs


def cosines_between_types(model: nn.Module, x_BCHW: Tensor, y_B: Tensor) -> dict[tuple[str, str], GradientCosines]:
    """Return the gradient cosines between the paths that use one type everywhere, for each pair of types.

    The weights are shared, as Theorem 3.1 assumes; for separately trained networks use `gradient_cosines_between_models`.

    Raises:
        ValueError: the layers have different pools.
    """
    sites = random_normalizations(model)
    pool = sites[0].pool
    if any(site.pool != pool for site in sites):
        raise ValueError("the layers have different pools, so there is no path of one type")
    draws = []
    with undisturbed(model):
        for index in range(len(pool)):
            set_path(model, (index,) * len(sites))
            draws.append(current_draw(model))
    return {
        (pool[a], pool[b]): gradient_cosines(model, x_BCHW, y_B, [DrawPair(draws[a], draws[b], float(len(sites)))])
        for a in range(len(pool))
        for b in range(a + 1, len(pool))
    }
