"""Chance of the draws: what R of them say of the law that they were taken from.

On the probit scale the accuracy of a draw is modelled as normal, N(m, tau^2); the mean over all draws is Phi(m / sqrt(1 + tau^2)). A draw is
seen through a binomial count of images, so that draws without a single success count as what they are, censored. m and tau are integrated
on a grid: a flat prior for m, and one that falls as 1 / (tau + 0.1) for tau up to 2.2, because few draws cannot exclude a larger spread.
The noise of the counts is then taken out of m's distribution again: it belongs to the chance of the images.

Shapes: U draws, T values of tau, M values of m, X grid of a draw's accuracy.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import special

from analysis.statistics.image_chance import LEVEL_WEIGHTS, ImageChance

LARGEST_SPREAD = 2.2
"""Largest spread of draws, on the probit scale in units of everything else, that intervals allow for."""

_LARGEST_SHARE = 0.8  # the same for the case without any success: share of the draws in the variance of an outcome
_SMALL_SPREAD = 0.1
_NUM_SPREADS = 12
_NUM_CENTRES = 37
_NUM_POINTS = 73
_NUM_BINS = 80

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class DrawChance:
    """Distribution of the mean over all draws, as if the images were the whole population: points on the probit scale and weights."""

    probits: FloatArray
    weights: FloatArray

    def quantile(self, level: float, shifts: FloatArray | None = None) -> float:
        """Return a quantile, on the probit scale, of the distribution or, with shifts at `LEVELS`, of its sum with an independent one."""
        if shifts is None:
            values, weights = self.probits, self.weights
        else:
            values = (self.probits[:, None] + shifts).ravel()
            weights = (self.weights[:, None] * LEVEL_WEIGHTS).ravel()
        order = np.argsort(values)
        cumulated = np.cumsum(weights[order])
        return float(values[order[min(int(np.searchsorted(cumulated, level)), order.size - 1)]])


def draw_chance(successes_U: FloatArray, trials_U: FloatArray, mean: float) -> DrawChance:
    """Return the distribution of the mean over all draws.

    Args:
        successes_U, trials_U: of each draw; not all successes 0, not all equal to the trials.
        mean: the measured mean, in (0,1).
    """
    units, count_U = np.unique(np.stack([successes_U, trials_U]), axis=1, return_counts=True)
    successes_U, trials_U = units
    num_draws = int(count_U.sum())
    probit_U, noise_U = _observed(successes_U, trials_U)
    span = float(np.ptp(probit_U))
    finest = span / 30  # finer than the grid can show, and far below the spread of the draws
    if noise_U.min() < finest:
        factor = max((noise_U.min() / finest) ** 2, min(1.0, 8 / trials_U.min()))
        successes_U, trials_U = successes_U * factor, trials_U * factor
        probit_U, noise_U = _observed(successes_U, trials_U)
    none, all_ = successes_U <= 0, successes_U >= trials_U
    grid_X = _grid(probit_U, noise_U, trials_U, bool(none.any()), bool(all_.any()))
    log_likelihood_UX = successes_U[:, None] * special.log_ndtr(grid_X) + (trials_U - successes_U)[:, None] * special.log_ndtr(-grid_X)
    likelihood_UX = np.exp(log_likelihood_UX - log_likelihood_UX.max(1, keepdims=True))

    noise = float(np.sqrt(1 / (count_U / noise_U**2).sum()))
    smallest = min(0.3 * noise * np.sqrt(num_draws), 1.0)
    spread_T = np.concatenate([[0.0], np.geomspace(smallest, LARGEST_SPREAD, _NUM_SPREADS)])
    precision_TU = count_U / (spread_T[:, None] ** 2 + noise_U**2)
    centre_T = (precision_TU * probit_U).sum(1) / precision_TU.sum(1)
    deviation_T = np.sqrt(spread_T**2 / num_draws + noise**2)
    low_T = centre_T - 5 * deviation_T - 2.5 * (count_U[none].sum() / num_draws) * spread_T
    high_T = centre_T + 5 * deviation_T + 2.5 * (count_U[all_].sum() / num_draws) * spread_T
    centre_TM = low_T[:, None] + (high_T - low_T)[:, None] * np.linspace(0, 1, _NUM_CENTRES)

    edges = np.concatenate([[-np.inf], (grid_X[1:] + grid_X[:-1]) / 2, [np.inf]])
    width_T = np.maximum(spread_T, (grid_X[1] - grid_X[0]) / 2)
    kernel_TMX = np.diff(special.ndtr((edges - centre_TM[:, :, None]) / width_T[:, None, None]), axis=2)
    marginal_U = likelihood_UX @ kernel_TMX.reshape(-1, grid_X.size).T
    log_weight_TM = (count_U[:, None] * np.log(marginal_U + 1e-300)).sum(0).reshape(centre_TM.shape)
    weight_TM = np.exp(log_weight_TM - log_weight_TM.max()) * (high_T - low_T)[:, None] * _prior(spread_T, num_draws)[:, None]
    weight_TM /= weight_TM.sum()

    weight_T = weight_TM.sum(1)
    seen_T = weight_T > 1e-12
    mean_T = np.where(seen_T, (weight_TM * centre_TM).sum(1) / np.maximum(weight_T, 1e-300), centre_T)
    variance_T = (weight_TM * (centre_TM - mean_T[:, None]) ** 2).sum(1) / np.maximum(weight_T, 1e-300)
    noise_variance = variance_T[0] if seen_T[0] else noise**2
    kept_T = np.clip(1 - noise_variance / np.maximum(variance_T, 1e-300), 0, 1)
    kept_T = np.sqrt(np.maximum(kept_T, spread_T**2 / (spread_T**2 + num_draws * noise**2)))
    mean_T[0], kept_T[0] = special.ndtri(mean), 0.0
    probit_TM = (mean_T[:, None] + kept_T[:, None] * (centre_TM - mean_T[:, None])) / np.sqrt(1 + spread_T[:, None] ** 2)
    return _binned(probit_TM.ravel(), weight_TM.ravel())


def _observed(successes_U: FloatArray, trials_U: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return the accuracy of each draw on the probit scale and the standard deviation of its noise."""
    share_U = (successes_U + 0.3) / (trials_U + 0.6)
    probit_U = special.ndtri(share_U)
    return probit_U, np.sqrt(share_U * (1 - share_U) / trials_U) * np.sqrt(2 * np.pi) * np.exp(probit_U**2 / 2)


def _grid(probit_U: FloatArray, noise_U: FloatArray, trials_U: FloatArray, has_none: bool, has_all: bool) -> FloatArray:
    low, high = float((probit_U - 4.5 * noise_U).min()), float((probit_U + 4.5 * noise_U).max())
    beyond = float(special.ndtri(0.02 / trials_U.max()))  # below it, a draw without a success is as likely as it can be
    low = max(low, beyond if has_none else -6.5)
    high = min(high, -beyond if has_all else 6.5)
    return np.linspace(low, high, _NUM_POINTS)


def _prior(spread_T: FloatArray, num_draws: int) -> FloatArray:
    """Return prior weights of the spreads; one draw says nothing of the spread, so that all are equally likely then."""
    density_T = np.ones_like(spread_T) if num_draws == 1 else 1 / (spread_T + _SMALL_SPREAD)
    weight_T = np.gradient(spread_T) * density_T
    weight_T[0] = spread_T[1] / 2 * density_T[0]
    return weight_T


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
