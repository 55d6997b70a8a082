"""Several draws at once: the worst of k, and the majority of n.

Shapes: S samples, R draws.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special, stats

from analysis.statistics.accuracy import TwoChances, as_matrix, shared_draws, whole_space
from analysis.statistics.estimate import Estimate
from analysis.statistics.image_chance import image_chance


def worst_of_k(num_correct_S: ArrayLike, num_draws: int, k: int, *, exact: bool = False) -> NDArray[np.float64]:
    """Return, per sample, the probability that k draws are all correct: C(s, k) / C(R, k), which is unbiased.

    Args:
        num_correct_S: s, how many of the R draws were correct.
        num_draws: R.
        k: draws that the attacker may wait for.
        exact: the R draws are the whole space and k draws are taken from it with replacement: (s / R)^k.

    Raises:
        ValueError: k is not in [1, R] (or below 1, if exact).
    """
    correct = np.asarray(num_correct_S, dtype=np.float64)
    if k < 1 or (not exact and k > num_draws):
        raise ValueError(f"the worst of k={k} draws cannot be estimated from {num_draws} draws")
    if exact:
        return (correct / num_draws) ** k
    result = np.ones_like(correct)
    for j in range(k):
        result = result * np.maximum(correct - j, 0) / (num_draws - j)
    return result


def majority_of_n(num_correct_S: ArrayLike, num_draws: int, n: int, *, exact: bool = False) -> NDArray[np.float64]:
    """Return, per sample, the probability that more than half of n draws are correct, which is unbiased.

    A vote for the most frequent class is right at least as often: wrong votes may scatter over classes.

    Args:
        num_correct_S: s, how many of the R draws were correct.
        num_draws: R.
        n: draws that vote.
        exact: the R draws are the whole space and the n are taken from it with replacement.

    Raises:
        ValueError: n is not in [1, R] (or below 1, if exact).
    """
    correct = np.asarray(num_correct_S, dtype=np.int64)
    if n < 1 or (not exact and n > num_draws):
        raise ValueError(f"a vote of n={n} draws cannot be estimated from {num_draws} draws")
    if exact:
        return stats.binom.sf(n // 2, n, correct / num_draws)
    return stats.hypergeom.sf(n // 2, num_draws, correct, n)


def worst_of_k_accuracy(correct_SR: ArrayLike, k: int, *, exact: bool = False, level: float = 0.95) -> Estimate:
    """Return the mean over samples of `worst_of_k` with its interval.

    The images' chance is that of the per-sample probabilities. The draws' chance is seen on disjoint groups of k draws, each of which is
    one observation of "all right"; R draws give R // k of them, so that the worst of 5 of 20 draws has four.

    Raises:
        ValueError: k is not in [1, R] (or below 1, if exact), or the matrix is not one of correctness.
    """
    correct = as_matrix(correct_SR)
    num_samples, num_draws = correct.shape
    share_S = worst_of_k(correct.sum(1), num_draws, k, exact=exact)
    value, tail = float(share_S.mean()), (1 - level) / 2
    if exact:
        chances = whole_space(share_S, tail, trials=num_draws)
    else:
        num_groups = num_draws // k
        groups_SG = correct[:, : num_groups * k].reshape(num_samples, num_groups, k).min(2)
        chances = _shifted(shared_draws(groups_SG, tail), share_S, float(groups_SG.mean()), tail)
    low, high = chances.interval(tail)
    shortage = chances.shortage(high - low, tail)
    return Estimate(
        value,
        min(low, value),
        max(high, value),
        chances.standard_error,
        num_samples,
        num_draws,
        exact,
        "images: effective Clopper-Pearson; draws: all"
        if exact
        else "images: effective Clopper-Pearson; draws: groups of k, probit-normal",
        **(shortage.fields() if shortage is not None else {}),
    )


def _shifted(groups: TwoChances, share_S: NDArray[np.float64], group_mean: float, tail: float) -> TwoChances:
    """Return the chances around the mean over all groups of k draws, which varies less than that of the disjoint ones."""
    mean = float(share_S.mean())
    images = image_chance(share_S, tail, trials=groups.num_draws)
    draws = groups.draws
    if draws is not None:
        draws = draws.shifted(float(special.ndtri(mean) - special.ndtri(group_mean)))
    elif 0 < mean < 1:
        # No disjoint group is right throughout, but a mixed one is: far from any draw that was seen to matter.
        return TwoChances(image_chance(np.full_like(share_S, group_mean), tail, trials=1), None, groups.num_samples, groups.num_draws, 0.0)
    return TwoChances(images, draws, groups.num_samples, groups.num_draws, groups.standard_error)
