"""Chance of the images: what a mean over S images says of the population that they were taken from.

A Clopper-Pearson (beta) interval with the effective number of observations of Korn and Graubard (1998): as many independent yes/no
observations as have the variance that the images' means show. That variance is itself estimated; its degrees of freedom are computed from
the fourth moment and the effective number is reduced by Student's t. It never falls below the number of images: no distribution on [0,1]
varies more than a yes/no one. Where few images carry the variance and are not yes/no, it is too small as often as not (the images that
matter may be missing): there, images are also modelled as units of `probit_normal`, and the wider end counts.

Reference: Korn and Graubard, "Confidence intervals for proportions with small expected number of positive counts estimated from survey
data", Survey Methodology 24 (1998).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import special

from analysis.statistics.probit_normal import posterior, weighted_quantiles

# Levels at which a distribution is represented: dense in the tails, where the ends of intervals lie.
_TAIL = np.array([0.0005, 0.002, 0.0045, 0.0075, 0.0105, 0.0140, 0.0175, 0.021, 0.025, 0.032, 0.045])
LEVELS = np.concatenate([_TAIL, np.linspace(0.065, 0.935, 30), 1 - _TAIL[::-1]])
LEVEL_WEIGHTS = np.diff(np.concatenate([[0.0], (LEVELS[1:] + LEVELS[:-1]) / 2, [1.0]]))

_FEW_DEGREES = 15
_YES_OR_NO = 1.3  # effective observations per image up to which images are as good as yes/no
_ENOUGH_TRIALS = 10  # per image, for a spread of images to show beside their noise
_LARGEST_SPREAD = 4.0  # of images that are not yes/no, on the probit scale

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class ImageChance:
    """The mean of S shares, one per image, and what it says of the population's.

    Attributes:
        mean: of the shares. num_effective: observations behind it.
        modelled_low, modelled_high: the population's mean on the probit scale at `LEVELS` where few images carry the variance (the
            distributions behind the lower and the upper end); else None.
    """

    mean: float
    num_effective: float
    modelled_low: FloatArray | None = None
    modelled_high: FloatArray | None = None

    def interval(self, tail: float) -> tuple[float, float]:
        """Return the interval (low, high) with at most `tail` beyond each end."""
        successes = self.mean * self.num_effective
        failures = self.num_effective - successes
        low = float(special.betaincinv(successes, failures + 1, tail)) if successes > 0 else 0.0
        high = float(special.betaincinv(successes + 1, failures, 1 - tail)) if failures > 0 else 1.0
        if self.modelled_low is not None and self.modelled_high is not None:
            low = min(low, float(special.ndtr(np.interp(tail, LEVELS, self.modelled_low))))
            high = max(high, float(special.ndtr(np.interp(1 - tail, LEVELS, self.modelled_high))))
        return low, high

    def probits(self, *, upper: bool) -> FloatArray:
        """Return the population's mean at `LEVELS`, on the probit scale: from the distribution behind the upper or the lower end."""
        successes = max(self.mean * self.num_effective, 1e-9)
        failures = max(self.num_effective - successes, 1e-9)
        shape = (successes + 1, failures) if upper else (successes, failures + 1)
        found = special.ndtri(np.clip(special.betaincinv(*shape, LEVELS), 1e-15, 1 - 1e-15))
        if self.modelled_low is not None and self.modelled_high is not None:
            return np.maximum(found, self.modelled_high) if upper else np.minimum(found, self.modelled_low)
        return found


def image_chance(shares_S: FloatArray, tail: float, *, trials: float, least_variance: float = 0.0) -> ImageChance:
    """Return what the shares of S images say of their population's mean.

    Args:
        shares_S: values in [0,1].
        tail: probability beyond each end of the interval that will be asked for.
        trials: independent observations behind each share.
        least_variance: of the mean, e.g. that of the noise within images.
    """
    size = shares_S.size
    mean = float(shares_S.mean())
    squares = (shares_S - mean) ** 2
    variance = float(squares.mean())
    if size < 2 or variance <= 1e-15:
        return ImageChance(mean, float(size))
    fourth = float((squares**2).mean())
    degrees = float(np.clip(2 * variance**2 * size / max(fourth - variance**2, 1e-300), 1, size - 1))
    of_mean = max(variance / (size - 1), least_variance)
    effective = min(mean * (1 - mean) / of_mean, trials * size)
    reduced = effective * float(special.ndtri(1 - tail) / special.stdtrit(degrees, 1 - tail)) ** 2
    num_effective = max(reduced, float(size))
    if degrees >= _FEW_DEGREES or effective <= _YES_OR_NO * size or trials < _ENOUGH_TRIALS:
        return ImageChance(mean, num_effective)
    found = posterior(shares_S * trials, np.full(size, float(trials)), _LARGEST_SPREAD)
    probit_TM = found.mean_probit()
    # One more success (or failure) than seen, as in the two ends of Clopper and Pearson's interval.
    low, high = (weighted_quantiles(probit_TM, found.weight_TM * special.ndtr(sign * probit_TM), LEVELS) for sign in (-1, 1))
    return ImageChance(mean, num_effective, low, high)
