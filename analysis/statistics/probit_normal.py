"""Units whose accuracies scatter: a normal law on the probit scale, seen through binomial counts.

The accuracy of a unit (a draw, or an image) is Phi(x) with x from N(m, tau^2); it is seen as a count of successes, so that a unit without
a single success counts as what it is, censored. The mean over all units is Phi(m / sqrt(1 + tau^2)). m and tau are integrated on a grid,
with a flat prior for m and one for tau that falls as 1 / (tau + 0.1): few units cannot exclude a larger spread than the one they show.

Shapes: U distinct units, T values of tau, M values of m, X grid of a unit's x.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import special

FloatArray = NDArray[np.float64]

_SMALL_SPREAD = 0.1
_NUM_SPREADS = 11
_NUM_CENTRES = 27
_NUM_POINTS = 57


@dataclass(frozen=True)
class Posterior:
    """What counts say of m and tau.

    Attributes:
        centre_TM, weight_TM: values of m for each tau, and their weights, which sum to 1. spread_T: values of tau, the first 0.
        num_units: how many units. noise: standard deviation of m that the counts alone would leave.
    """

    centre_TM: FloatArray
    weight_TM: FloatArray
    spread_T: FloatArray
    num_units: int
    noise: float

    def mean_probit(self, centre_TM: FloatArray | None = None) -> FloatArray:
        """Return the mean over all units, on the probit scale (T, M)."""
        return (self.centre_TM if centre_TM is None else centre_TM) / np.sqrt(1 + self.spread_T[:, None] ** 2)


def posterior(successes_U: FloatArray, trials_U: FloatArray, largest_spread: float) -> Posterior:
    """Return what the counts of units say of m and tau.

    Args:
        successes_U, trials_U: of each unit, not necessarily whole numbers; not all successes 0, not all equal to the trials.
        largest_spread: of tau.
    """
    units, count_U = np.unique(np.stack([successes_U, trials_U]), axis=1, return_counts=True)
    successes_U, trials_U = units
    num_units = int(count_U.sum())
    probit_U, noise_U = _observed(successes_U, trials_U)
    finest = float(np.ptp(probit_U)) / 25  # about what the grid can show; far below the spread of the units
    if noise_U.min() < finest:
        factor = max((noise_U.min() / finest) ** 2, min(1.0, 8 / trials_U.min()))
        successes_U, trials_U = successes_U * factor, trials_U * factor
        probit_U, noise_U = _observed(successes_U, trials_U)
    none, every = successes_U <= 0, successes_U >= trials_U
    grid_X = _grid(probit_U, noise_U, trials_U, bool(none.any()), bool(every.any()))
    log_likelihood_UX = successes_U[:, None] * special.log_ndtr(grid_X) + (trials_U - successes_U)[:, None] * special.log_ndtr(-grid_X)
    likelihood_UX = np.exp(log_likelihood_UX - log_likelihood_UX.max(1, keepdims=True))

    noise = float(np.sqrt(1 / (count_U / noise_U**2).sum()))
    spread_T = np.concatenate([[0.0], np.geomspace(min(0.3 * noise * np.sqrt(num_units), 1.0), largest_spread, _NUM_SPREADS)])
    precision_TU = count_U / (spread_T[:, None] ** 2 + noise_U**2)
    middle_T = (precision_TU * probit_U).sum(1) / precision_TU.sum(1)
    deviation_T = np.sqrt(spread_T**2 / num_units + noise**2)
    # Units without (or with nothing but) successes may lie anywhere beyond what is seen of them.
    low_T = middle_T - 5 * deviation_T - 2.5 * (count_U[none].sum() / num_units) * spread_T
    high_T = middle_T + 5 * deviation_T + 2.5 * (count_U[every].sum() / num_units) * spread_T
    centre_TM = low_T[:, None] + (high_T - low_T)[:, None] * np.linspace(0, 1, _NUM_CENTRES)

    edges = np.concatenate([[-np.inf], (grid_X[1:] + grid_X[:-1]) / 2, [np.inf]])
    width_T = np.maximum(spread_T, (grid_X[1] - grid_X[0]) / 2)
    kernel_TMX = np.diff(special.ndtr((edges - centre_TM[:, :, None]) / width_T[:, None, None]), axis=2)
    marginal_U = likelihood_UX @ kernel_TMX.reshape(-1, grid_X.size).T
    log_weight_TM = (count_U @ np.log(marginal_U + 1e-300)).reshape(centre_TM.shape)
    weight_TM = np.exp(log_weight_TM - log_weight_TM.max()) * (high_T - low_T)[:, None] * _prior(spread_T, num_units)[:, None]
    return Posterior(centre_TM, weight_TM / weight_TM.sum(), spread_T, num_units, noise)


def _observed(successes_U: FloatArray, trials_U: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return the accuracy of each unit on the probit scale and the standard deviation of its noise."""
    share_U = (successes_U + 0.3) / (trials_U + 0.6)
    probit_U = special.ndtri(share_U)
    return probit_U, np.sqrt(share_U * (1 - share_U) / trials_U) * np.sqrt(2 * np.pi) * np.exp(probit_U**2 / 2)


def _grid(probit_U: FloatArray, noise_U: FloatArray, trials_U: FloatArray, has_none: bool, has_every: bool) -> FloatArray:
    low, high = float((probit_U - 4.5 * noise_U).min()), float((probit_U + 4.5 * noise_U).max())
    beyond = float(special.ndtri(0.02 / max(trials_U.max(), 1)))  # below it, a unit without a success is as likely as it can be
    low = max(low, beyond if has_none else -6.5)
    high = min(high, -beyond if has_every else 6.5)
    return np.linspace(low, high, _NUM_POINTS)


def _prior(spread_T: FloatArray, num_units: int) -> FloatArray:
    """Return prior weights of the spreads; one unit says nothing of the spread, so that all are equally likely then."""
    density_T = np.ones_like(spread_T) if num_units == 1 else 1 / (spread_T + _SMALL_SPREAD)
    weight_T = np.gradient(spread_T) * density_T
    weight_T[0] = spread_T[1] / 2 * density_T[0]
    return weight_T


def weighted_quantiles(values: FloatArray, weights: FloatArray, levels: FloatArray) -> FloatArray:
    """Return quantiles of a discrete distribution given by points and weights."""
    order = np.argsort(values, axis=None)
    cumulated = np.cumsum(weights.ravel()[order])
    index = np.searchsorted(cumulated, np.asarray(levels) * cumulated[-1])
    return values.ravel()[order[np.minimum(index, order.size - 1)]]
