"""Adding images and draws until an interval is narrow: looks at fixed places, with intervals that hold at all looks at once.

Whoever looks at an interval again and again and stops where it pleases him has chosen it: it holds less often than it says. Here the places
of the looks are fixed beforehand, and each interval is made at a level at which all of them hold together (repeated confidence intervals):
whatever the rule that stops, the last one holds with the probability that is promised.

Reference: Jennison and Turnbull, "Interim analyses: the repeated confidence interval approach", JRSS B 51 (1989); Pocock, "Group sequential
methods in the design and analysis of clinical trials", Biometrika 64 (1977); Armitage, McPherson and Rowe, JRSS A 132 (1969), recursion.

Shapes: S images, R draws.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize, special

from analysis.statistics.accuracy import as_matrix, shared_draws, whole_space

MOST_DOUBLINGS = 4
"""Draws are doubled at most so often: to 16 times as many."""

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(80)


@dataclass(frozen=True)
class Looks:
    """Where an evaluation may look at its interval.

    Attributes:
        images: numbers of images, rising. doublings: how often draws may be doubled in between; each is a look more.
        level: with which all intervals hold at once.
    """

    images: tuple[int, ...]
    doublings: int
    level: float = 0.95

    @property
    def count(self) -> int:
        """The most looks there can be."""
        return len(self.images) + self.doublings

    @property
    def level_of_each(self) -> float:
        """The level of each interval."""
        # A doubling of the draws adds at most as much information as one of the images: the least that two looks have in common.
        ratios = [0.5] * self.doublings + [first / second for first, second in zip(self.images, self.images[1:], strict=False)]
        return level_of_each_look(tuple(ratios), self.level)


def planned_looks(num_images: int, block_size: int, width: float, *, doublings: int = 0, level: float = 0.95) -> Looks:
    """Return the looks after 1, 2, 3, 4, 6, 8, 12, 16, ... blocks of images and after the last image.

    A look at so few images that no outcome could give an interval of the wanted width is left out.

    Args:
        num_images: that there are. block_size: of all blocks but the last. width: that is wanted, a share in (0,1).
        doublings: how often draws may be doubled.

    Raises:
        ValueError: a width outside (0,1), or no images.
    """
    if not 0 < width < 1:
        raise ValueError(f"the width of an interval of accuracy is between 0 and 1, got {width}")
    if num_images < 1 or block_size < 1:
        raise ValueError(f"there must be images and blocks, got {num_images} and {block_size}")
    # All right: Clopper-Pearson reaches from tail^(1/n) to 1.
    fewest = math.log((1 - level) / 2) / math.log1p(-width)
    blocks = sorted({count for power in range(40) for count in (2**power, 3 * 2**power)})
    places = [count * block_size for count in blocks if fewest <= count * block_size < num_images]
    return Looks((*places, num_images), doublings, level)


@functools.lru_cache(maxsize=64)
def level_of_each_look(ratios: tuple[float, ...], level: float = 0.95) -> float:
    """Return the level of each of K normal intervals that all hold at once with probability `level`.

    Args:
        ratios: K - 1 shares of the information that look k had at look k + 1; none: a single look.

    Raises:
        ValueError: a ratio outside (0, 1].
    """
    if any(not 0 < ratio <= 1 for ratio in ratios):
        raise ValueError(f"information grows from look to look: ratios are in (0, 1], got {ratios}")
    lowest = float(-special.ndtri((1 - level) / 2))
    highest = float(-special.ndtri((1 - level) / 2 / (len(ratios) + 1)))  # Bonferroni
    if not ratios or lowest == highest:
        return level
    steps = tuple(min(ratio, 1 - 1e-6) for ratio in ratios)
    boundary = optimize.brentq(lambda c: _all_within(c, steps) - level, lowest - 1e-9, highest + 1e-9, xtol=1e-9)
    return float(1 - 2 * special.ndtr(-boundary))


def _all_within(boundary: float, ratios: Sequence[float]) -> float:
    """Return the probability that all of a chain of standard normal values, each correlated sqrt(ratio) with the last, are within."""
    nodes, weights = boundary * _NODES, boundary * _WEIGHTS
    density = np.exp(-(nodes**2) / 2) / math.sqrt(2 * math.pi)
    for ratio in ratios:
        rest = 1 - ratio
        distance = nodes[:, None] - math.sqrt(ratio) * nodes[None, :]
        density = (np.exp(-(distance**2) / (2 * rest)) / math.sqrt(2 * math.pi * rest)) @ (weights * density)
    return float(weights @ density)


@dataclass(frozen=True)
class Widths:
    """Of an interval, and what images and draws alone leave; all in shares. images, draws: numbers S and R; 0 draws: they add no chance."""

    total: float
    of_images: float
    of_draws: float
    images: int
    draws: int

    def at(self, images: int, draws: int) -> Widths:
        """Return what is to be expected of other numbers of images and draws: each part shrinks with the root of its number."""
        of_images = self.of_images * math.sqrt(self.images / images)
        of_draws = self.of_draws * math.sqrt(self.draws / draws) if draws else 0.0
        parts = math.hypot(self.of_images, self.of_draws)
        total = self.total * math.hypot(of_images, of_draws) / parts if parts else self.total
        return Widths(total, of_images, of_draws, images, draws)


def widths_of(correct_SR: ArrayLike, *, exact: bool, level: float) -> Widths:
    """Return the widths of the interval that `accuracy_interval` makes of the same outcomes.

    Args:
        exact: the draws are the whole space of draws.
    """
    correct, tail = as_matrix(correct_SR), (1 - level) / 2
    chances = whole_space(correct.mean(1), tail, trials=correct.shape[1]) if exact else shared_draws(correct, tail)
    total, images, draws = (high - low for low, high in (chances.interval(tail), chances.image_interval(tail), chances.draw_interval(tail)))
    return Widths(total, images, draws, images=correct.shape[0], draws=chances.num_draws)


@dataclass(frozen=True)
class Prices:
    """What is paid, in any unit: attack: of an image. score: of an image on one draw, all attacks together."""

    attack: float
    score: float


@dataclass(frozen=True)
class Position:
    """Where an evaluation stands: images: its number of them. draws: R. doublings: of the draws that are left."""

    images: int
    draws: int
    doublings: int


def next_position(position: Position, widths: Widths, looks: Looks, prices: Prices) -> Position | None:
    """Return where to look next: more images or more draws, whichever narrows the interval more for what it costs; None: no more data."""
    more_images = next((count for count in looks.images if count > position.images), None)
    choices: list[tuple[float, Position]] = []
    if more_images is not None:
        gain = widths.of_images**2 * (1 - position.images / more_images)
        price = (more_images - position.images) * (prices.attack + position.draws * prices.score)
        choices.append((gain / price, replace(position, images=more_images)))
    if position.doublings and widths.draws:
        gain = widths.of_draws**2 / 2
        price = position.images * position.draws * prices.score
        choices.append((gain / price, replace(position, draws=2 * position.draws, doublings=position.doublings - 1)))
    return max(choices, key=lambda choice: choice[0])[1] if choices else None


def expected_end(position: Position, widths: Widths, looks: Looks, prices: Prices, width: float) -> tuple[Position, bool]:
    """Return where the rule is expected to stop, and whether the interval is then as narrow as wanted.

    Args:
        widths: seen at `position`. width: that is wanted.
    """
    seen = widths
    while widths.total > width:
        further = next_position(position, widths, looks, prices)
        if further is None:
            return position, False
        position = further
        widths = seen.at(position.images, position.draws if seen.draws else 0)
    return position, True
