"""Other intervals for an accuracy measured on images and draws, to hold Rayndom's against.

Each takes the counts of N experiments and returns their ends (N,), (N,). Shapes: N experiments, S images, R draws.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import special

FloatArray = NDArray[np.float64]
Ends = tuple[FloatArray, FloatArray]

_TAIL = 0.025
_Z = float(special.ndtri(1 - _TAIL))


@dataclass(frozen=True)
class Counts:
    """Successes of each image (N, S) and of each draw (N, R) in N experiments."""

    image_NS: FloatArray
    draw_NR: FloatArray

    @property
    def num_images(self) -> int:
        """S."""
        return self.image_NS.shape[1]

    @property
    def num_draws(self) -> int:
        """R."""
        return self.draw_NR.shape[1]

    @property
    def mean(self) -> FloatArray:
        """Accuracy of each experiment (N,)."""
        return self.image_NS.sum(1) / (self.num_images * self.num_draws)

    def mean_squares(self) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Return the mean squares between images, between draws and of the rest, each (N,)."""
        size, draws, mean = self.num_images, self.num_draws, self.mean[:, None]
        images = draws * ((self.image_NS / draws - mean) ** 2).sum(1)
        columns = size * ((self.draw_NR / size - mean) ** 2).sum(1)
        total = size * draws * self.mean * (1 - self.mean)
        rest = np.maximum(total - images - columns, 0) / ((size - 1) * (draws - 1))
        return images / (size - 1), columns / (draws - 1), rest

    def variance(self) -> tuple[FloatArray, FloatArray]:
        """Return the variance of the mean by the two-way random-effects model and its Satterthwaite degrees of freedom."""
        images, columns, rest = self.mean_squares()
        cells = self.num_images * self.num_draws
        squares = np.maximum(images + columns - rest, np.maximum(images, columns))
        spread = images**2 / (self.num_images - 1) + columns**2 / (self.num_draws - 1)
        spread = spread + rest**2 / ((self.num_images - 1) * (self.num_draws - 1))
        with np.errstate(divide="ignore", invalid="ignore"):
            degrees = np.where(spread > 0, squares**2 / spread, min(self.num_images, self.num_draws) - 1)
        return squares / cells, np.maximum(degrees, 1)


def wilson_all(counts: Counts) -> Ends:
    """All outcomes as if independent: Wilson."""
    return _wilson(counts.mean, float(counts.num_images * counts.num_draws))


def wilson_images(counts: Counts) -> Ends:
    """Each image as one yes/no observation: Wilson."""
    return _wilson(counts.mean, float(counts.num_images))


def clopper_pearson_images(counts: Counts) -> Ends:
    """Each image as one yes/no observation: Clopper-Pearson."""
    return _beta(counts.mean, np.full_like(counts.mean, counts.num_images))


def normal_two_way(counts: Counts) -> Ends:
    """Two-way random effects, normal quantile (the central limit theorem)."""
    half = _Z * np.sqrt(counts.variance()[0])
    return np.clip(counts.mean - half, 0, 1), np.clip(counts.mean + half, 0, 1)


def satterthwaite_logit(counts: Counts) -> Ends:
    """Two-way random effects on the logit scale, Student's t with Satterthwaite's degrees of freedom."""
    variance, degrees = counts.variance()
    cells = counts.num_images * counts.num_draws
    mean = (counts.mean * cells + 0.5) / (cells + 1)
    half = special.stdtrit(degrees, 1 - _TAIL) * np.sqrt(np.maximum(variance, mean * (1 - mean) / cells)) / (mean * (1 - mean))
    return special.expit(special.logit(mean) - half), special.expit(special.logit(mean) + half)


def draws_t(counts: Counts) -> Ends:
    """The draws' accuracies as the observations: Student's t."""
    draw_NR = counts.draw_NR / counts.num_images
    half = special.stdtrit(counts.num_draws - 1, 1 - _TAIL) * draw_NR.std(1, ddof=1) / np.sqrt(counts.num_draws)
    return np.clip(counts.mean - half, 0, 1), np.clip(counts.mean + half, 0, 1)


def korn_graubard(counts: Counts) -> Ends:
    """Clopper-Pearson with the effective number of observations of the two-way variance, Satterthwaite's degrees of freedom."""
    variance, degrees = counts.variance()
    cells = float(counts.num_images * counts.num_draws)
    product = counts.mean * (1 - counts.mean)
    with np.errstate(divide="ignore", invalid="ignore"):
        effective = np.where(variance > 0, np.minimum(product / variance, cells), counts.num_images)
    reduced = effective * (_Z / special.stdtrit(degrees, 1 - _TAIL)) ** 2
    return _beta(counts.mean, np.where(variance > 0, reduced, counts.num_images))


def union_worst(counts: Counts) -> Ends:
    """Conservative union: Clopper-Pearson over images and Student's t over draws, half the error each, the deviations added."""
    low_images, high_images = _beta(counts.mean, np.full_like(counts.mean, counts.num_images), _TAIL / 2)
    probit_NR = special.ndtri((counts.draw_NR + 0.5) / (counts.num_images + 1))
    half = special.stdtrit(counts.num_draws - 1, 1 - _TAIL / 2) * probit_NR.std(1, ddof=1) / np.sqrt(counts.num_draws)
    low = special.ndtr(special.ndtri(np.clip(low_images, 1e-12, 1)) - half)
    return np.where(low_images > 0, low, 0.0), special.ndtr(special.ndtri(np.minimum(high_images, 1 - 1e-12)) + half)


CANDIDATES: dict[str, Callable[[Counts], Ends]] = {
    "Wilson, all outcomes": wilson_all,
    "Wilson, images": wilson_images,
    "Clopper-Pearson, images": clopper_pearson_images,
    "two-way, normal": normal_two_way,
    "two-way, Satterthwaite, logit": satterthwaite_logit,
    "Student, draws": draws_t,
    "Korn-Graubard, two-way": korn_graubard,
    "union of images and draws": union_worst,
}
"""By name; the percentile bootstrap, which needs the outcomes themselves, is `percentile_bootstrap`."""


def percentile_bootstrap(correct_SR: NDArray[np.bool_], rng: np.random.Generator, num_replicates: int = 250) -> tuple[float, float]:
    """Return the percentile interval that resamples images and draws independently (Rayndom's own until version 0.2)."""
    size, draws = correct_SR.shape
    image_BS = rng.multinomial(size, np.full(size, 1 / size), num_replicates) / size
    draw_BR = rng.multinomial(draws, np.full(draws, 1 / draws), num_replicates) / draws
    means = ((image_BS @ correct_SR) * draw_BR).sum(1)
    low, high = np.quantile(means, [_TAIL, 1 - _TAIL])
    return float(low), float(high)


def _wilson(mean: FloatArray, trials: float) -> Ends:
    centre = (mean + _Z**2 / (2 * trials)) / (1 + _Z**2 / trials)
    half = _Z * np.sqrt(mean * (1 - mean) / trials + _Z**2 / (4 * trials**2)) / (1 + _Z**2 / trials)
    return centre - half, centre + half


def _beta(mean: FloatArray, trials: FloatArray, tail: float = _TAIL) -> Ends:
    successes = mean * trials
    with np.errstate(invalid="ignore"):
        low = np.where(mean > 0, special.betaincinv(np.maximum(successes, 1e-12), trials - successes + 1, tail), 0.0)
        high = np.where(mean < 1, special.betaincinv(successes + 1, np.maximum(trials - successes, 1e-12), 1 - tail), 1.0)
    return low, high
