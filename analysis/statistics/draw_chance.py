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

from analysis.statistics.image_chance import LEVEL_WEIGHTS, ImageChance
from analysis.statistics.probit_normal import Posterior, posterior, weighted_quantiles

LARGEST_SPREAD = 3.0
"""Largest spread of draws, on the probit scale in units of everything else, that intervals allow for."""

_LARGEST_SHARE = 0.8  # the same for the case without any success: share of the draws in the variance of an outcome
_NUM_BINS = 64

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class DrawChance:
    """Distribution of the mean over all draws, as if the images were the whole population: points on the probit scale and weights."""

    probits: FloatArray
    weights: FloatArray

    def quantile(self, level: float, shifts: FloatArray | None = None) -> float:
        """Return a quantile, on the probit scale, of the distribution or, with shifts at `LEVELS`, of its sum with an independent one."""
        if shifts is None:
            return float(weighted_quantiles(self.probits, self.weights, np.array([level]))[0])
        sums = self.probits[:, None] + shifts
        return float(weighted_quantiles(sums, self.weights[:, None] * LEVEL_WEIGHTS, np.array([level]))[0])


def draw_chance(successes_U: FloatArray, trials_U: FloatArray, mean: float) -> DrawChance:
    """Return the distribution of the mean over all draws.

    Args:
        successes_U, trials_U: of each draw; not all successes 0, not all equal to the trials.
        mean: the measured mean, in (0,1).
    """
    found = posterior(successes_U, trials_U, LARGEST_SPREAD)
    return _binned(found.mean_probit(_without_noise(found, mean)).ravel(), found.weight_TM.ravel())


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


def _binned(values: FloatArray, weights: FloatArray) -> DrawChance:
    kept = weights > 1e-8
    values, weights = values[kept], weights[kept] / weights[kept].sum()
    low, span = float(values.min()), float(np.ptp(values))
    if span < 1e-9:
        return DrawChance(np.array([low]), np.array([1.0]))
    index = np.minimum((values - low) / span * _NUM_BINS, _NUM_BINS - 1).astype(np.int64)
    mass = np.bincount(index, weights=weights, minlength=_NUM_BINS)
    sums = np.bincount(index, weights=weights * values, minlength=_NUM_BINS)
    filled = mass > 0
    return DrawChance(sums[filled] / mass[filled], mass[filled])


@lru_cache(maxsize=1024)
def highest_without_success(num_samples: int, num_draws: int, tail: float) -> float:
    """Return the largest accuracy at which no success on any image and draw has at least this probability.

    The worst case over how the variance of an outcome is shared between images and draws, up to `_LARGEST_SHARE` for the draws.
    """
    value_X = np.linspace(-9, 9, 1201)
    middle_X = (value_X[1:] + value_X[:-1]) / 2
    highest = 1 - tail ** (1 / num_samples)
    for share in np.linspace(0.05, _LARGEST_SHARE, 12):
        largest_X = np.diff(special.ndtr(value_X / np.sqrt(share)) ** num_draws)
        low, high = -5.0, 3.0
        for _ in range(32):
            middle = (low + high) / 2
            none = float((largest_X * special.ndtr((-middle - middle_X) / np.sqrt(1 - share)) ** num_samples).sum())
            low, high = (middle, high) if none > tail else (low, middle)
        highest = max(highest, float(special.ndtr(low)))
    return highest


def combined_interval(draws: DrawChance, images: ImageChance, tail: float) -> tuple[float, float]:
    """Return the interval (low, high) of the mean over all draws and images: the two chances, independent, add on the probit scale."""
    centre = float(special.ndtri(images.mean))
    low = draws.quantile(tail, images.probits(upper=False) - centre)
    high = draws.quantile(1 - tail, images.probits(upper=True) - centre)
    return float(special.ndtr(low)), float(special.ndtr(high))
