"""Pairs of draws at chosen distances. A file of quantities lists what it knows about its own layers in a tuple `PAIRS_BY_DISTANCE`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from analysis.attacked_model.draws import all_configurations, set_draw
from analysis.quantities.quantity import Subject
from analysis.theory.transferability import (
    DrawPair,
    GradientCosines,
    current_draw,
    draw_distance,
    gradient_cosines,
    random_pairs,
    undisturbed,
)
from models.plugins import once_for_plugins
from models.randomness import RandomModule, random_sites
from models.registry_files import scan

FEW_CONFIGURATIONS = 8
MOST_DISTANCES = 6
CHUNK = 250
"""Images whose gradients are taken at once."""

Pairs = Iterator[tuple[float, list[DrawPair]]]
"""Distances, ascending, with pairs of draws that far apart."""


@dataclass(frozen=True)
class PairsByDistance:
    """How the distance of two draws is chosen, for models all of whose random sites are of one kind.

    Attributes:
        name: of the kind. layers: types of its sites.
        pairs: `(model, sites, pairs at each distance, seed) -> Pairs`; asked only where a draw is shared by the batch.
    """

    name: str
    layers: tuple[type[RandomModule], ...]
    pairs: Callable[[nn.Module, Sequence[Any], int, int], Pairs]

    def fits(self, sites: Sequence[RandomModule]) -> bool:
        """Return whether it can choose the distance of two draws of these sites."""
        return all(isinstance(site, self.layers) and site.draw_scope != "per_example" for site in sites)


@once_for_plugins
def _known() -> tuple[PairsByDistance, ...]:
    return tuple(scan("analysis.quantities", "PAIRS_BY_DISTANCE", PairsByDistance).values())


def pairs_by_distance(model: nn.Module, count: int, seed: int) -> Pairs:
    """Yield distances, ascending, with pairs of draws that far apart.

    Where all sites are of one kind whose distance can be chosen, it is; a small space of draws is enumerated; elsewhere pairs of
    independent draws are grouped by their distance.

    Args:
        count: pairs at each distance; for enumerated spaces all there are.
    """
    sites = [site for _, site in random_sites(model)]
    configurations = all_configurations(model, FEW_CONFIGURATIONS)
    if configurations is not None:
        draws = []
        with undisturbed(model):
            for configuration in configurations:
                set_draw(model, configuration)
                draws.append(current_draw(model))
        yield from _grouped([DrawPair(a, b, draw_distance(model, a, b)) for a, b in itertools.product(draws, draws)])
        return
    for known in _known():
        if known.fits(sites):
            yield from known.pairs(model, sites, count, seed)
            return
    yield from _grouped(random_pairs(model, MOST_DISTANCES * count, seed))


def evenly_spread(largest: int) -> list[int]:
    """Return at most `MOST_DISTANCES` whole numbers from 0 to `largest`, evenly spread."""
    steps = min(largest, MOST_DISTANCES - 1)
    return sorted({round(index * largest / max(1, steps)) for index in range(steps + 1)})


def _grouped(pairs: list[DrawPair]) -> Pairs:
    """Yield pairs by distance; where hardly two are alike, in equal groups at their mean distance."""
    ordered = sorted(pairs, key=lambda pair: pair.distance)
    groups = [list(group) for _, group in itertools.groupby(ordered, key=lambda pair: round(pair.distance, 6))]
    if len(groups) > MOST_DISTANCES:
        size = -(-len(ordered) // MOST_DISTANCES)
        groups = [ordered[start : start + size] for start in range(0, len(ordered), size)]
    for group in groups:
        yield sum(pair.distance for pair in group) / len(group), group


def cosines_of_pairs(subject: Subject, pairs: Sequence[DrawPair], num_images: int) -> GradientCosines:
    """Return the cosines of the input gradients under the two draws of each pair, images in chunks."""
    x_BCHW, y_B = subject.images(num_images)
    parts = [gradient_cosines(subject.model, x, y, pairs) for x, y in zip(x_BCHW.split(CHUNK), y_B.split(CHUNK), strict=True)]
    zeros = sum(part.num_zero_gradients for part in parts)
    return GradientCosines(torch.cat([part.cosine_PB for part in parts], dim=1), parts[0].distance_P, zeros)


def how_cosines(found: GradientCosines) -> str:
    """Return in a few words what cosines were measured on."""
    pairs, images = found.cosine_PB.shape
    how = f"{pairs} pairs of draws, {images} images"
    return how + (f", {found.num_zero_gradients} gradients vanish and count as 0" if found.num_zero_gradients else "")
