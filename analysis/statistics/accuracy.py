"""The interval of an accuracy that was measured on images and draws: two sources of chance.

The target is the mean over the population of images and the law of draws. `image_chance` and `draw_chance` say what is known of each; they
are added on the probit scale. Where every configuration was scored, draws add no chance and the images' interval is the whole. Coverage:
`benchmarks/coverage.py`, docs/evaluation.md.

Shapes: S images, R draws, U draws of all batches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from analysis.statistics.draw_chance import DrawChance, combined_interval, draw_chance, highest_without_success
from analysis.statistics.estimate import Estimate
from analysis.statistics.image_chance import ImageChance, image_chance
from analysis.statistics.shortage import Shortage, find_shortage, says_nothing

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class TwoChances:
    """What was measured, with the chance of the images and that of the draws.

    Attributes:
        images: chance of the images. draws: chance of the draws; None where every configuration was scored, or nothing varied.
        num_samples: S. num_draws: draws that add chance, those of all batches together; 0 where every configuration was scored.
        standard_error: of the mean, from the components of variance.
        num_batches: groups of images of which each had draws of its own.
    """

    images: ImageChance
    draws: DrawChance | None
    num_samples: int
    num_draws: int
    standard_error: float
    num_batches: int = 1

    def interval(self, tail: float) -> tuple[float, float]:
        """Return the interval (low, high) with `tail` beyond each end."""
        if self.num_draws == 0:
            return self.images.interval(tail)
        if self.draws is not None:
            return combined_interval(self.draws, self.images, tail)
        # Nothing but errors, or none: only one side can miss, and the worst case over the unknown spread of draws is taken already.
        none = highest_without_success(self.num_samples, self.num_draws, 2 * tail, self.num_batches)
        highest = max(none, self.images.interval(tail)[1] if self.images.mean < 0.5 else 1 - self.images.interval(tail)[0])
        return (0.0, highest) if self.images.mean < 0.5 else (1 - highest, 1.0)

    def image_interval(self, tail: float) -> tuple[float, float]:
        """Return the interval for these draws alone: over the population of images."""
        return self.images.interval(tail)

    def draw_interval(self, tail: float) -> tuple[float, float]:
        """Return the interval for these images alone: over the law of the draws."""
        if self.num_draws == 0:
            return self.images.mean, self.images.mean
        if self.draws is None:
            return self.interval(tail)
        return self.draws.interval(tail)

    def shortage(self, width: float, tail: float) -> Shortage | None:
        """Return what there is too little of for a claim with an interval of this width, or None."""
        if not says_nothing(width, self.num_draws):
            return None
        image_width, draw_width = (high - low for low, high in (self.image_interval(tail), self.draw_interval(tail)))
        return find_shortage(width, image_width, draw_width, num_samples=self.num_samples, num_draws=self.num_draws)


def accuracy_interval(
    correct_SR: ArrayLike,
    num_configurations: float | None = None,
    *,
    weights_R: ArrayLike | None = None,
    batches_S: ArrayLike | None = None,
    level: float = 0.95,
) -> Estimate:
    """Return the accuracy with an interval that takes the chance of the images and that of the draws into account.

    Args:
        correct_SR: S images by R draws (or (S,) for one draw): 1 or True where right. Values between 0 and 1 are means, e.g. over training
            seeds. Column r is one draw, shared by all images (of a batch).
        num_configurations: size of the space of draws. If it is R, the columns are the whole space: draws add no chance and the target is
            the mean over the population of images for these configurations. A deterministic model has 1. None or inf: draws are samples.
        weights_R: probability of each configuration, where all were scored; default: equal. They are scaled to sum to 1.
        batches_S: batch of each image where every batch had draws of its own: column r of two batches is then not the same draw.
        level: probability with which the interval holds the target.

    Returns:
        The estimate. `shortage` says where draws or images are too few for any claim; `low` and `high` are then conservative.

    Raises:
        ValueError: an empty matrix, values outside [0,1], shapes that do not match, weights without the whole space, a level outside (0,1).
    """
    correct = as_matrix(correct_SR)
    if not 0 < level < 1:
        raise ValueError(f"level is a probability between 0 and 1, got {level}")
    tail = (1 - level) / 2
    chances, value = _chances(correct, num_configurations, weights_R, batches_S, tail)
    low, high = chances.interval(tail)
    shortage = chances.shortage(high - low, tail)
    exact = chances.num_draws == 0
    if exact:
        method = "Clopper-Pearson" if correct.shape[1] == 1 else "images: effective Clopper-Pearson; draws: all"
    else:
        method = "images: effective Clopper-Pearson; draws: probit-normal"
        method += "" if batches_S is None else ", own draws per batch"
    return Estimate(
        value,
        # At the ends the formulas are exact up to rounding; an interval that misses its own estimate would look like a bug.
        min(low, value),
        max(high, value),
        chances.standard_error,
        correct.shape[0],
        correct.shape[1],
        exact,
        method,
        **(shortage.fields() if shortage is not None else {}),
    )


def as_matrix(values: ArrayLike) -> FloatArray:
    """Return values in [0,1] as a float matrix, images by draws.

    Raises:
        ValueError: empty, not one or two dimensions, or values outside [0,1].
    """
    matrix = np.asarray(values, dtype=np.float64)
    if matrix.ndim == 1:
        matrix = matrix[:, None]
    if matrix.ndim != 2 or matrix.size == 0:
        raise ValueError(f"expected a non-empty samples x draws matrix, got shape {matrix.shape}")
    if not (matrix.min() >= 0 and matrix.max() <= 1):
        raise ValueError("correctness is 0 or 1 (or a mean of them), got values outside [0,1]")
    return matrix


def _chances(
    correct: FloatArray, num_configurations: float | None, weights_R: ArrayLike | None, batches_S: ArrayLike | None, tail: float
) -> tuple[TwoChances, float]:
    num_draws = correct.shape[1]
    if weights_R is not None:
        if num_configurations != num_draws:
            raise ValueError(f"weights are probabilities of all configurations: {num_draws} columns, {num_configurations} configurations")
        weights = _probabilities(weights_R, num_draws)
        return whole_space(correct @ weights, tail, trials=num_draws), float((correct @ weights).mean())
    if num_configurations == num_draws:
        return whole_space(correct.mean(1), tail, trials=num_draws), float(correct.mean())
    if batches_S is not None:
        batches = np.asarray(batches_S).reshape(-1)
        if batches.size != correct.shape[0]:
            raise ValueError(f"one batch per image: {batches.size} batches, {correct.shape[0]} images")
        if np.unique(batches).size > 1:
            return own_draws(correct, batches, tail), float(correct.mean())
    return shared_draws(correct, tail), float(correct.mean())


def _probabilities(weights_R: ArrayLike, num_draws: int) -> FloatArray:
    weights = np.asarray(weights_R, dtype=np.float64).reshape(-1)
    if weights.size != num_draws or not np.isfinite(weights).all() or weights.min() < 0 or weights.sum() <= 0:
        raise ValueError(f"expected {num_draws} probabilities, one per configuration, got {weights.tolist()}")
    return weights / weights.sum()


def whole_space(shares_S: FloatArray, tail: float, *, trials: float) -> TwoChances:
    """Return the chances where each image's share is known: only images are left to chance."""
    deviation = float(shares_S.std(ddof=1)) if shares_S.size > 1 else 0.0
    images = image_chance(np.clip(shares_S, 0, 1), tail, trials=trials)
    return TwoChances(images, None, shares_S.size, 0, deviation / math.sqrt(shares_S.size))


def shared_draws(correct: FloatArray, tail: float) -> TwoChances:
    """Return the chances where all images share the draws: two crossed sources."""
    num_samples, num_draws = correct.shape
    mean, image_S, draw_R = float(correct.mean()), correct.mean(1), correct.mean(0)
    between_images, between_draws, rest = mean_squares(correct, mean, image_S, draw_R)
    images = image_chance(image_S, tail, trials=num_draws, least_variance=rest / 2 / correct.size)
    variance = max(between_images + between_draws - rest, between_images, between_draws) / correct.size
    draws = None
    if mean not in (0.0, 1.0):
        noise_share = min(rest / between_draws, 1.0) if between_draws > 0 else 1.0
        trials_R = np.full(num_draws, float(num_samples))
        draws = draw_chance(draw_R * num_samples, trials_R, mean, noise_share=noise_share, tail=tail)
    return TwoChances(images, draws, num_samples, num_draws, math.sqrt(variance))


def own_draws(correct: FloatArray, batches_S: NDArray[np.generic], tail: float) -> TwoChances:
    """Return the chances where every batch has draws of its own: draws are nested in batches."""
    labels, batch_of_S = np.unique(batches_S, return_inverse=True)
    size_B = np.bincount(batch_of_S).astype(np.float64)
    successes_BR = np.zeros((labels.size, correct.shape[1]))
    np.add.at(successes_BR, batch_of_S, correct)
    mean = float(correct.mean())
    images = image_chance(correct.mean(1), tail, trials=correct.shape[1])
    trials_BR = np.broadcast_to(size_B[:, None], successes_BR.shape)
    draws = None if mean in (0.0, 1.0) else draw_chance(successes_BR.ravel(), trials_BR.ravel(), mean)
    residual_B = (successes_BR.mean(1) - mean * size_B) / correct.shape[0]
    between = float((residual_B**2).sum()) * labels.size / (labels.size - 1)
    within = mean * (1 - mean) / images.num_effective
    return TwoChances(images, draws, correct.shape[0], successes_BR.size, math.sqrt(max(between, within)), labels.size)


def mean_squares(correct: FloatArray, mean: float, image_S: FloatArray, draw_R: FloatArray) -> tuple[float, float, float]:
    """Return the mean squares between images, between draws and of the rest (two-way analysis of variance); 0 without freedom."""
    num_samples, num_draws = correct.shape
    images = num_draws * float(((image_S - mean) ** 2).sum())
    draws = num_samples * float(((draw_R - mean) ** 2).sum())
    rest = max(float(((correct - mean) ** 2).sum()) - images - draws, 0.0)
    freedom = (num_samples - 1, num_draws - 1, (num_samples - 1) * (num_draws - 1))
    found = [squares / degrees if degrees else 0.0 for squares, degrees in zip((images, draws, rest), freedom, strict=True)]
    return found[0], found[1], found[2] if found[2] > 1e-12 else 0.0
