"""How often the interval holds the truth where images and draws are added until it is narrow: part `until` of `benchmarks.coverage`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from analysis.statistics import accuracy_interval
from analysis.statistics.stopping import MOST_DOUBLINGS, Looks, Position, Prices, next_position, widths_of

BLOCK = 64
PRICES = Prices(attack=400.0, score=1.0)
"""One attack of 400 passes an image: as the cheap ones of the suites."""


@dataclass(frozen=True)
class Stopped:
    """Where the rule stopped, with the interval it had there."""

    low: float
    high: float
    position: Position
    reached: bool


def most_draws(num_draws: int) -> int:
    """Return how many draws the rule may come to."""
    return num_draws * 2**MOST_DOUBLINGS


def stop(correct_SR: NDArray[np.bool_], num_draws: int, looks: Looks, width: float, *, corrected: bool = True) -> Stopped:
    """Follow the rule through outcomes that are all known.

    Args:
        correct_SR: all images by all draws the rule may come to. num_draws: it begins with.
        width: that is wanted. corrected: intervals that hold at all looks at once, instead of each at 95 %.
    """
    level = looks.level_of_each if corrected else looks.level
    position = Position(looks.images[0], num_draws, looks.doublings)
    while True:
        correct = correct_SR[: position.images, : position.draws]
        estimate = accuracy_interval(correct, level=level)
        if estimate.width <= width:
            return Stopped(estimate.low, estimate.high, position, True)
        further = next_position(position, widths_of(correct, exact=False, level=level), looks, PRICES)
        if further is None:
            return Stopped(estimate.low, estimate.high, position, False)
        position = further
