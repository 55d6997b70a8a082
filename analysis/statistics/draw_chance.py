"""Chance of the draws: what R of them say of the law that they were taken from.

Draws are units of `probit_normal`, counted over images. The noise of those counts is taken out of the distribution again: it belongs to the
chance of the images.

Shapes: U draws, T values of tau, M values of m, X grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import special

from analysis.statistics.image_chance import LEVEL_WEIGHTS, LEVELS, ImageChance, image_chance
from analysis.statistics.probit_normal import Posterior, posterior, weighted_quantiles

LARGEST_SPREAD = 3.0
"""Largest spread of draws, on the probit scale in units of everything else, that intervals allow for."""

_LARGEST_SHARE = 0.8  # the same for the case without any success: share of the draws in the variance of an outcome
_MANY_DRAWS = 30
_WIDER = 1.06  # no law of draws is exactly the modelled one
_STRICTER = 0.85  # part of the error asked for: what the approximations cost in coverage at worst, about half a point

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class DrawChance:
    """The mean over all draws, as if the images were the whole population, on the probit scale at `LEVELS`.

    Two distributions: the one behind the lower end of an interval, and the one behind the upper end.
    """

    low: FloatArray
    high: FloatArray

    def interval(self, tail: float) -> tuple[float, float]:
        """Return the interval (low, high) with `tail` beyond each end."""
        ends = np.interp(tail, LEVELS, self.low), np.interp(1 - tail, LEVELS, self.high)
        return float(special.ndtr(ends[0])), float(special.ndtr(ends[1]))

    def shifted(self, shift: float) -> DrawChance:
        """Return the same around another centre."""
        return DrawChance(self.low + shift, self.high + shift)


def draw_chance(successes_U: FloatArray, trials_U: FloatArray, mean: float, *, noise_share: float = 0.0, tail: float = 0.025) -> DrawChance:
    """Return the distribution of the mean over all draws.

    Args:
        successes_U, trials_U: of each draw; not all successes 0, not all equal to the trials.
        mean: the measured mean, in (0,1). tail: probability beyond each end of the interval that will be asked for.
        noise_share: how much of the variance between draws is noise of their counts, 0 to 1.
    """
    found = posterior(successes_U, trials_U, LARGEST_SPREAD)
    modelled = weighted_quantiles(found.mean_probit(_without_noise(found, mean)), found.weight_TM, LEVELS)
    middle = float(np.interp(0.5, LEVELS, modelled))
    modelled = middle + _WIDER * (modelled - middle)
    if successes_U.size < _MANY_DRAWS:
        return DrawChance(modelled, modelled)
    # So many draws show their law themselves, also where it is not the modelled one: the wider end counts.
    centre, kept = float(special.ndtri(mean)), np.sqrt(1 - noise_share)
    shown = image_chance(successes_U / trials_U, tail, trials=float(trials_U.mean()))
    low, high = (centre + kept * (shown.probits(upper=upper) - centre) for upper in (False, True))
    return DrawChance(np.minimum(modelled, low), np.maximum(modelled, high))


def _without_noise(found: Posterior, mean: float) -> FloatArray:
    """Return the values of m (T, M) drawn together to the spread that draws, without the noise of their counts, give them."""
    weight_T = found.weight_TM.sum(1)
    seen_T = weight_T > 1e-12
    middle_T = found.centre_TM.mean(1)
    mean_T = np.where(seen_T, (found.weight_TM * found.centre_TM).sum(1) / np.maximum(weight_T, 1e-300), middle_T)
    variance_T = (found.weight_TM * (found.centre_TM - mean_T[:, None]) ** 2).sum(1) / np.maximum(weight_T, 1e-300)
    noise_variance = variance_T[0] if seen_T[0] else found.noise**2
    kept_T = np.clip(1 - noise_variance / np.maximum(variance_T, 1e-300), 0, 1)
    kept_T = np.sqrt(np.maximum(kept_T, found.spread_T**2 / (found.spread_T**2 + found.num_units * found.noise**2)))
    mean_T[0], kept_T[0] = special.ndtri(mean), 0.0
    return mean_T[:, None] + kept_T[:, None] * (found.centre_TM - mean_T[:, None])


@lru_cache(maxsize=1024)
def highest_without_success(num_samples: int, num_draws: int, tail: float, num_batches: int = 1) -> float:
    """Return the largest accuracy at which no success on any image and draw has at least this probability.

    The worst case over how the variance of an outcome is shared between images and draws, up to `_LARGEST_SHARE` for the draws.

    Args:
        num_samples, num_draws: of all batches together. tail: the probability.
        num_batches: batches, of equal size, of which each has draws of its own: an image meets only those of its batch.
    """
    of_batch, draws_of_batch = num_samples / num_batches, num_draws / num_batches
    value_X = np.linspace(-9, 9, 1201)
    middle_X = (value_X[1:] + value_X[:-1]) / 2
    highest = 1 - tail ** (1 / num_samples)
    for share in np.linspace(0.05, _LARGEST_SHARE, 12):
        largest_X = np.diff(special.ndtr(value_X / np.sqrt(share)) ** draws_of_batch)
        low, high = -5.0, 3.0
        for _ in range(32):
            middle = (low + high) / 2
            of_one = float((largest_X * special.ndtr((-middle - middle_X) / np.sqrt(1 - share)) ** of_batch).sum())
            none = of_one**num_batches
            low, high = (middle, high) if none > tail else (low, middle)
        highest = max(highest, float(special.ndtr(low)))
    return highest


def combined_interval(draws: DrawChance, images: ImageChance, tail: float) -> tuple[float, float]:
    """Return the interval (low, high) of the mean over all draws and images: the two chances, independent, add on the probit scale."""
    centre, tail = float(special.ndtri(images.mean)), _STRICTER * tail
    weights = LEVEL_WEIGHTS[:, None] * LEVEL_WEIGHTS
    low, high = draws.low[:, None] + images.probits(upper=False) - centre, draws.high[:, None] + images.probits(upper=True) - centre
    ends = [weighted_quantiles(sums, weights, np.array([level]))[0] for sums, level in ((low, tail), (high, 1 - tail))]
    return float(special.ndtr(ends[0])), float(special.ndtr(ends[1]))
