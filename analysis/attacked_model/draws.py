"""Which draws an attack or a score uses: named by seeds, so that any worker can take the same ones.

A draw is named either by a 63-bit seed or, in a finite space of draws, by the index of its configuration.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import nn

from models.randomness import derive_seed, num_configurations, random_sites, resample, set_configuration


class Draw(NamedTuple):
    """The name of one draw of a model."""

    kind: Literal["seed", "configuration"]
    value: int


ONLY_DRAW = Draw("seed", 0)
"""The draw of a deterministic model, which has no choice."""


def set_draw(model: nn.Module, draw: Draw) -> None:
    """Put a named draw in place at every random site of `model`. Must not be called inside `frozen(model)`."""
    if draw.kind == "configuration":
        set_configuration(model, draw.value)
    else:
        resample(model, torch.Generator().manual_seed(draw.value))


def seeded_draws(count: int, *parts: int | str) -> tuple[Draw, ...]:
    """Return `count` independent draws whose seeds derive from `parts`."""
    return tuple(Draw("seed", derive_seed(*parts, index)) for index in range(count))


def all_configurations(model: nn.Module, at_most: int) -> tuple[Draw, ...] | None:
    """Return every draw of a model with a finite space of at most `at_most` draws that are known to be equally likely, else None.

    A deterministic model has one.
    """
    total = num_configurations(model)
    if total == 1:
        return (ONLY_DRAW,)
    if total == math.inf or total > at_most or not _equally_likely(model):
        return None
    return tuple(Draw("configuration", index) for index in range(int(total)))


def _equally_likely(model: nn.Module) -> bool:
    """Return whether it is known that an unweighted mean over all configurations is the expectation."""
    for _, site in random_sites(model):
        size = int(site.num_configurations)
        if size == 1:
            continue
        for index in range(size):
            probability = site.configuration_probability(index)
            if probability is None or not math.isclose(probability, 1 / size):
                return False
    return True


class FixedDraws:
    """The same draws over and over: a frozen model, a known draw, or a whole finite space."""

    is_fixed = True

    def __init__(self, draws: tuple[Draw, ...]) -> None:
        if not draws:
            raise ValueError("at least one draw is needed")
        self.draws = draws
        self._position = 0

    @property
    def count(self) -> int:
        """Number of draws averaged in one gradient."""
        return len(self.draws)

    def take(self) -> Draw:
        """Return the next draw; `count` calls in a row return each draw once."""
        draw = self.draws[self._position % len(self.draws)]
        self._position += 1
        return draw

    def comparison(self, generation: int) -> tuple[Draw, ...]:
        """Return the draws on which points are compared: here these draws themselves, in every generation."""
        del generation
        return self.draws


class FreshDraws:
    """New draws at each gradient, and a fixed set of others on which points are compared.

    Args:
        count: E, number of draws averaged in one gradient.
        *parts: what the seeds derive from.
    """

    is_fixed = False

    def __init__(self, count: int, *parts: int | str) -> None:
        if count < 1:
            raise ValueError(f"at least one draw per gradient is needed, got {count}")
        self.count = count
        self._parts = parts
        self._position = 0

    def take(self) -> Draw:
        """Return a draw that was never returned before."""
        draw = Draw("seed", derive_seed(*self._parts, "gradient", self._position))
        self._position += 1
        return draw

    def comparison(self, generation: int) -> tuple[Draw, ...]:
        """Return `count` draws on which points are compared; another generation has others."""
        return seeded_draws(self.count, *self._parts, "comparison", generation)


DrawSource = FixedDraws | FreshDraws
