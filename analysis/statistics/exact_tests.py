"""Shares of independent yes/no observations, and tests of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats


def wilson_interval(num_successes: int, num_trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return Wilson's score interval of a share.

    Raises:
        ValueError: not 0 <= num_successes <= num_trials, or no trials.
    """
    if num_trials < 1 or not 0 <= num_successes <= num_trials:
        raise ValueError(f"{num_successes} successes of {num_trials} trials is impossible")
    interval = stats.binomtest(num_successes, num_trials).proportion_ci(confidence, method="wilson")
    share = num_successes / num_trials
    # At the ends the formula is exact up to rounding; an interval that misses its own estimate would look like a bug.
    return min(float(interval.low), share), max(float(interval.high), share)


def mcnemar_exact(first_S: ArrayLike, second_S: ArrayLike) -> float:
    """Return the two-sided exact p-value that two deterministic classifiers are right equally often on the same samples.

    Raises:
        ValueError: the two have different lengths.
    """
    first, second = np.asarray(first_S, dtype=bool).reshape(-1), np.asarray(second_S, dtype=bool).reshape(-1)
    if first.shape != second.shape:
        raise ValueError(f"McNemar's test needs the same samples: {first.size} and {second.size}")
    only_first, only_second = int((first & ~second).sum()), int((~first & second).sum())
    discordant = only_first + only_second
    return float(stats.binomtest(only_first, discordant).pvalue) if discordant else 1.0


def holm(p_values: Sequence[float]) -> NDArray[np.float64]:
    """Return Holm's adjusted p-values, in the order given: reject those at most alpha to keep the family-wise error at alpha."""
    values = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(values, kind="stable")
    factors = np.arange(values.size, 0, -1)
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(values[order] * factors))
    return adjusted
