"""Differences of two accuracies on the same images.

Shapes: S samples, R and T draws.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special, stats

from analysis.statistics.accuracy import TwoChances, as_matrix, mean_squares, shared_draws, whole_space
from analysis.statistics.estimate import Estimate
from analysis.statistics.image_chance import image_chance
from analysis.statistics.shortage import find_shortage

FloatArray = NDArray[np.float64]

_STRICTER = 0.7
"""Part of the error asked for that the intervals of the draws get: joined by squares, the skew of few draws that differ much would cost two
points of coverage (92.6 % at 5 % accuracy and 20 draws with a standard deviation of 2 on the logit scale)."""


def paired_difference(
    first_SR: ArrayLike, second_ST: ArrayLike, *, common_draws: bool = False, exact: bool | tuple[bool, bool] = False, level: float = 0.95
) -> Estimate:
    """Return mean(first) - mean(second) on the same samples, with its interval.

    Where the first is better and where the second is are two shares of the images; their intervals are joined with their correlation
    (MOVER), and so are the intervals that the draws of each model leave.

    Args:
        first_SR, second_ST: matrices with one row per sample, the same samples in the same order.
        common_draws: column r of both is the same draw (R = T).
        exact: the columns are all configurations, of both or of each: draws add no chance.

    Raises:
        ValueError: the rows (or, with common draws, the columns) do not match.

    Reference: Zou and Donner, "Construction of confidence limits about effect measures: a general approach", Statistics in Medicine 27
    (2008).
    """
    first, second = as_matrix(first_SR), as_matrix(second_ST)
    if first.shape[0] != second.shape[0]:
        raise ValueError(f"a paired comparison needs the same samples: {first.shape[0]} and {second.shape[0]} rows")
    if common_draws and first.shape[1] != second.shape[1]:
        raise ValueError(f"common draws need as many columns: {first.shape[1]} and {second.shape[1]}")
    exact_first, exact_second = (exact, exact) if isinstance(exact, bool) else exact
    tail = (1 - level) / 2
    value = float(first.mean() - second.mean())
    image_down, image_up, image_variance = _image_part(first.mean(1) - second.mean(1), tail, min(first.shape[1], second.shape[1]))
    if common_draws and first.shape[1] > 1 and not (exact_first and exact_second):
        draw_down, draw_up, draw_variance = _common_part(first - second, tail)
    else:
        one, two = _chances(first, exact_first, tail), _chances(second, exact_second, tail)
        first_low, first_high = one.draw_interval(_STRICTER * tail)
        second_low, second_high = two.draw_interval(_STRICTER * tail)
        draw_down = math.hypot(first.mean() - first_low, second_high - second.mean())
        draw_up = math.hypot(first_high - first.mean(), second.mean() - second_low)
        draw_variance = _draw_variance(first, exact_first) + _draw_variance(second, exact_second)
    low = max(value - math.hypot(image_down, draw_down), -1.0)
    high = min(value + math.hypot(image_up, draw_up), 1.0)
    num_draws = [matrix.shape[1] for matrix, whole in ((first, exact_first), (second, exact_second)) if not whole]
    shortage = find_shortage(
        high - low, image_down + image_up, draw_down + draw_up, num_samples=first.shape[0], num_draws=min(num_draws, default=0)
    )
    return Estimate(
        value,
        low,
        high,
        math.sqrt(image_variance + draw_variance),
        first.shape[0],
        min(first.shape[1], second.shape[1]),
        exact_first and exact_second,
        "paired images" if exact_first and exact_second else "paired images, and draws",
        **(shortage.fields() if shortage is not None else {}),
    )


@dataclass(frozen=True)
class MeasuredShares:
    """What is kept of one accuracy: of each image (S,) the share of draws on which it is right, how many draws, and the interval."""

    shares_S: ArrayLike
    num_draws: int
    low: float
    high: float


def paired_difference_of_shares(first: MeasuredShares, second: MeasuredShares, *, level: float = 0.95) -> Estimate:
    """Return mean(first) - mean(second) on the same samples where their outcomes on single draws are not at hand.

    Images are paired as in `paired_difference`. What the draws of each model leave open is what its own interval, of the same level, is
    wider than the images alone would make it.

    Raises:
        ValueError: the samples do not match.
    """
    tail = (1 - level) / 2
    one, two = (as_matrix(each.shares_S)[:, 0] for each in (first, second))
    if one.size != two.size:
        raise ValueError(f"a paired comparison needs the same samples: {one.size} and {two.size}")
    trials = min(first.num_draws, second.num_draws)
    value = float(one.mean() - two.mean())
    down, up, variance = _image_part(one - two, tail, trials)
    first_down, first_up = _beyond_images(one, first, tail)
    second_down, second_up = _beyond_images(two, second, tail)
    low, high = value - math.hypot(down, first_down, second_up), value + math.hypot(up, first_up, second_down)
    return Estimate(
        value, max(low, -1.0), min(high, 1.0), math.sqrt(variance), one.size, trials, False, "paired images, draws from each interval"
    )


def two_sided_p_value(difference: Estimate) -> float:
    """Return the p-value that a difference is 0: of a normal approximation whose standard error is that of the 95 % interval's side
    towards 0."""
    side = difference.value - difference.low if difference.value > 0 else difference.high - difference.value
    return float(2 * stats.norm.sf(abs(difference.value) / side * stats.norm.isf(0.025))) if side > 0 else 1.0


def _beyond_images(share_S: FloatArray, measured: MeasuredShares, tail: float) -> tuple[float, float]:
    """Return how far below and above the mean the draws let it lie: widths of independent chances add as squares."""
    low, high = whole_space(share_S, tail, trials=measured.num_draws).interval(tail)
    mean = float(share_S.mean())
    down, up = ((mean - measured.low, mean - low), (measured.high - mean, high - mean))
    return math.sqrt(max(down[0] ** 2 - down[1] ** 2, 0.0)), math.sqrt(max(up[0] ** 2 - up[1] ** 2, 0.0))


def _chances(matrix: FloatArray, exact: bool, tail: float) -> TwoChances:
    return whole_space(matrix.mean(1), tail, trials=matrix.shape[1]) if exact else shared_draws(matrix, tail)


def _image_part(difference_S: FloatArray, tail: float, trials: int) -> tuple[float, float, float]:
    """Return how far the images let the difference lie below and above, and their variance of it."""
    size = difference_S.size
    gain_S, loss_S = np.clip(difference_S, 0, 1), np.clip(-difference_S, 0, 1)
    gain, loss = (image_chance(part_S, tail, trials=trials) for part_S in (gain_S, loss_S))
    (gain_low, gain_high), (loss_low, loss_high) = gain.interval(tail), loss.interval(tail)
    deviations = float(gain_S.std() * loss_S.std())
    correlation = -gain.mean * loss.mean / deviations if deviations > 1e-12 else 0.0
    down = _joined(gain.mean - gain_low, loss_high - loss.mean, correlation)
    up = _joined(gain_high - gain.mean, loss.mean - loss_low, correlation)
    return down, up, float(difference_S.var(ddof=1)) / size if size > 1 else 0.0


def _joined(one: float, other: float, correlation: float) -> float:
    return math.sqrt(max(one**2 + other**2 - 2 * correlation * one * other, 0.0))


def _common_part(difference_SR: FloatArray, tail: float) -> tuple[float, float, float]:
    num_draws = difference_SR.shape[1]
    draw_R = difference_SR.mean(0)
    half = float(special.stdtrit(num_draws - 1, 1 - tail) * draw_R.std(ddof=1) / math.sqrt(num_draws))
    _, between, rest = mean_squares(difference_SR, float(draw_R.mean()), difference_SR.mean(1), draw_R)
    return half, half, max(between - rest, 0.0) / difference_SR.size


def _draw_variance(matrix: FloatArray, exact: bool) -> float:
    if exact:
        return 0.0
    mean, draw_R = float(matrix.mean()), matrix.mean(0)
    _, between, rest = mean_squares(matrix, mean, matrix.mean(1), draw_R)
    return max(between - rest, 0.0) / matrix.size
