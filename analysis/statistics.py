"""Intervals and tests for accuracies, with samples and draws as two sources of chance.

Shapes: S samples, R draws, A attacks, B bootstrap replicates. A correctness matrix correct_SR holds 1 where draw r classifies sample s
correctly. All functions take NumPy arrays, are deterministic for a given seed, and touch no global generator.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

NUM_REPLICATES = 2000
SEED = 20_240_101
_CHUNK_CELLS = 4_000_000  # bound on the size of one chunk of bootstrap weights: 32 MB in float64


@dataclass(frozen=True)
class Estimate:
    """A number with its interval.

    Attributes:
        value, low, high: shares in [0,1] (differences in [-1,1]).
        standard_error: of the value; that of the bootstrap, or the binomial one.
        num_samples, num_draws: what it was measured on. exact: the draws are the whole space of draws, so they add no chance.
        method: how the interval was made, in words.
        marked: it comes from an evaluation with a failed check and must not be shown without its mark.
    """

    value: float
    low: float
    high: float
    standard_error: float
    num_samples: int
    num_draws: int
    exact: bool
    method: str
    marked: bool = False

    def with_mark(self, marked: bool) -> Estimate:
        """Return the estimate, marked or not."""
        return replace(self, marked=marked)


def wilson_interval(num_successes: int, num_trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return Wilson's score interval of a share.

    Raises:
        ValueError: not 0 <= num_successes <= num_trials, or no trials.
    """
    if num_trials < 1 or not 0 <= num_successes <= num_trials:
        raise ValueError(f"{num_successes} successes of {num_trials} trials is impossible")
    z = float(stats.norm.ppf((1 + confidence) / 2))
    share = num_successes / num_trials
    denominator = 1 + z**2 / num_trials
    centre = (share + z**2 / (2 * num_trials)) / denominator
    half = z * math.sqrt(share * (1 - share) / num_trials + z**2 / (4 * num_trials**2)) / denominator
    # At the ends the formula is exact up to rounding; an interval that misses its own estimate would look like a bug.
    return min(max(0.0, centre - half), share), max(min(1.0, centre + half), share)


def wilson(correct_S: ArrayLike, confidence: float = 0.95) -> Estimate:
    """Return the share of ones with Wilson's interval: for deterministic models, one pass over the samples."""
    values = np.asarray(correct_S, dtype=bool).reshape(-1)
    count, total = int(values.sum()), values.size
    low, high = wilson_interval(count, total, confidence)
    share = count / total
    return Estimate(share, low, high, math.sqrt(share * (1 - share) / total), total, 1, True, "Wilson")


def two_way_bootstrap(
    values_SR: ArrayLike,
    *,
    batches_S: ArrayLike | None = None,
    exact: bool = False,
    num_replicates: int = NUM_REPLICATES,
    seed: int = SEED,
    confidence: float = 0.95,
) -> Estimate:
    """Return the mean of a samples x draws matrix with a percentile interval that resamples samples and draws independently.

    Args:
        values_SR: correctness, or any values. A draw shared by all samples is one column.
        batches_S: batch of each sample, where each batch had draws of its own: whole batches are resampled instead of samples.
        exact: the columns are the whole space of draws: only samples are resampled.
    """
    values = _matrix(values_SR)
    replicates = _replicate_means(values, batches_S, exact, num_replicates, np.random.default_rng(seed))
    low, high = _percentiles(replicates, confidence)
    unit = "samples" if batches_S is None else "batches"
    method = f"bootstrap over {unit}" if exact or values.shape[1] == 1 else f"two-way bootstrap over {unit} and draws"
    deviation = float(replicates.std(ddof=1))
    return Estimate(float(values.mean()), low, high, deviation, values.shape[0], values.shape[1], exact, method)


def paired_bootstrap(
    first_SR: ArrayLike,
    second_ST: ArrayLike,
    *,
    shared_draws: bool = False,
    exact: bool = False,
    num_replicates: int = NUM_REPLICATES,
    seed: int = SEED,
    confidence: float = 0.95,
) -> Estimate:
    """Return mean(first) - mean(second) on the same samples, with a percentile interval.

    Args:
        first_SR, second_ST: matrices with one row per sample, the same samples in the same order.
        shared_draws: column r of both is the same draw (R = T); draws are then resampled together.
        exact: neither matrix's draws add chance.

    Raises:
        ValueError: the rows (or, with shared draws, the columns) do not match.
    """
    first, second = _matrix(first_SR), _matrix(second_ST)
    if first.shape[0] != second.shape[0]:
        raise ValueError(f"a paired comparison needs the same samples: {first.shape[0]} and {second.shape[0]} rows")
    if shared_draws and first.shape[1] != second.shape[1]:
        raise ValueError(f"shared draws need as many columns: {first.shape[1]} and {second.shape[1]}")
    rng = np.random.default_rng(seed)
    num_samples = first.shape[0]
    parts = []
    for count in _chunks(num_replicates, num_samples):
        weights_BS = _bootstrap_weights(rng, count, num_samples)
        first_BR, second_BT = weights_BS @ first, weights_BS @ second
        if exact:
            parts.append(first_BR.mean(1) - second_BT.mean(1))
            continue
        first_weights = _bootstrap_weights(rng, count, first.shape[1])
        second_weights = first_weights if shared_draws else _bootstrap_weights(rng, count, second.shape[1])
        parts.append((first_BR * first_weights).sum(1) - (second_BT * second_weights).sum(1))
    replicates = np.concatenate(parts)
    low, high = _percentiles(replicates, confidence)
    return Estimate(
        float(first.mean() - second.mean()),
        low,
        high,
        float(replicates.std(ddof=1)),
        num_samples,
        min(first.shape[1], second.shape[1]),
        exact,
        "paired bootstrap over samples" if exact else "paired bootstrap over samples and draws",
    )


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
    if discordant == 0:
        return 1.0
    return float(min(1.0, 2 * stats.binom.cdf(min(only_first, only_second), discordant, 0.5)))


def holm(p_values: Sequence[float]) -> NDArray[np.float64]:
    """Return Holm's adjusted p-values, in the order given: reject those at most alpha to keep the family-wise error at alpha."""
    values = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(values, kind="stable")
    factors = np.arange(values.size, 0, -1)
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(values[order] * factors))
    return adjusted


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


def worst_of_k_accuracy(
    correct_SR: ArrayLike,
    k: int,
    *,
    exact: bool = False,
    num_replicates: int = NUM_REPLICATES,
    seed: int = SEED,
    confidence: float = 0.95,
) -> Estimate:
    """Return the mean over samples of `worst_of_k` with a two-way bootstrap interval.

    A replicate's draws repeat, which makes "all of k correct" likelier; the replicates are shifted by that known bias.
    """
    correct = _matrix(correct_SR)
    num_samples, num_draws = correct.shape
    value = float(worst_of_k(correct.sum(1), num_draws, k, exact=exact).mean())
    rng = np.random.default_rng(seed)
    replicates = np.empty(num_replicates)
    position = 0
    for count in _chunks(num_replicates, num_samples):
        weights_BS = _bootstrap_weights(rng, count, num_samples)
        if exact:
            shares_BS = worst_of_k(correct.sum(1), num_draws, k, exact=True)[None]
        else:
            counts_BR = _bootstrap_weights(rng, count, num_draws) * num_draws
            shares_BS = worst_of_k(np.rint(counts_BR @ correct.T), num_draws, k)
        replicates[position : position + count] = (weights_BS * shares_BS).sum(1)
        position += count
    replicates += value - replicates.mean()
    low, high = (float(np.clip(bound, 0, 1)) for bound in _percentiles(replicates, confidence))
    method = "bootstrap over samples" if exact else "two-way bootstrap over samples and draws, bias-corrected"
    return Estimate(value, low, high, float(replicates.std(ddof=1)), num_samples, num_draws, exact, method)


def choose_worst_attack(selection_ASR: ArrayLike) -> NDArray[np.int64]:
    """Return, per sample, the attack with the lowest accuracy on the selection draws; ties go to the lowest mean over samples."""
    shares_AS = np.asarray(selection_ASR, dtype=np.float64).mean(-1)
    # The overall stronger attack wins ties, so the choice does not depend on the order in which attacks are listed.
    order = np.argsort(shares_AS.mean(1), kind="stable")
    return order[np.argmin(shares_AS[order], axis=0)]


def worst_attack_accuracy(
    selection_ASR: ArrayLike,
    evaluation_AST: ArrayLike,
    *,
    exact: bool = False,
    num_replicates: int = NUM_REPLICATES,
    seed: int = SEED,
) -> tuple[Estimate, NDArray[np.int64]]:
    """Return the expected accuracy under the worst attack per sample, and which attack that was.

    The attack is chosen on the selection draws and scored on the evaluation draws: a minimum taken on the draws that score it is too
    low (winner's curse).
    """
    chosen_S = choose_worst_attack(selection_ASR)
    evaluation = np.asarray(evaluation_AST, dtype=np.float64)
    worst_ST = evaluation[chosen_S, np.arange(evaluation.shape[1])]
    if exact and worst_ST.shape[1] == 1:
        return wilson(worst_ST[:, 0]), chosen_S
    return two_way_bootstrap(worst_ST, exact=exact, num_replicates=num_replicates, seed=seed), chosen_S


def _matrix(values: ArrayLike) -> NDArray[np.float64]:
    matrix = np.asarray(values, dtype=np.float64)
    if matrix.ndim == 1:
        matrix = matrix[:, None]
    if matrix.ndim != 2 or matrix.size == 0:
        raise ValueError(f"expected a non-empty samples x draws matrix, got shape {matrix.shape}")
    return matrix


def _replicate_means(
    values_SR: NDArray[np.float64],
    batches_S: ArrayLike | None,
    exact: bool,
    num_replicates: int,
    rng: np.random.Generator,
) -> NDArray[np.float64]:
    if batches_S is None:
        unit_sums, unit_sizes = values_SR, np.ones(values_SR.shape[0])
    else:
        labels, unit_of_S = np.unique(np.asarray(batches_S), return_inverse=True)
        unit_sizes = np.bincount(unit_of_S).astype(np.float64)
        unit_sums = np.zeros((labels.size, values_SR.shape[1]))
        np.add.at(unit_sums, unit_of_S, values_SR)
    parts = []
    for count in _chunks(num_replicates, unit_sums.shape[0]):
        weights_BU = _bootstrap_weights(rng, count, unit_sums.shape[0])
        means_BR = (weights_BU @ unit_sums) / (weights_BU @ unit_sizes)[:, None]
        if exact:
            parts.append(means_BR.mean(1))
        else:
            parts.append((means_BR * _bootstrap_weights(rng, count, values_SR.shape[1])).sum(1))
    return np.concatenate(parts)


def _bootstrap_weights(rng: np.random.Generator, num_replicates: int, size: int) -> NDArray[np.float64]:
    """Return (B, size) weights that sum to 1: how often each of `size` units was taken, over `size`."""
    picks = rng.integers(0, size, (num_replicates, size))
    picks += np.arange(num_replicates)[:, None] * size
    return np.bincount(picks.reshape(-1), minlength=num_replicates * size).reshape(num_replicates, size) / size


def _chunks(num_replicates: int, size: int) -> list[int]:
    """Return sizes of chunks of replicates. They depend on `size` alone, so equal inputs give equal results."""
    step = max(1, min(num_replicates, _CHUNK_CELLS // max(size, 1)))
    return [min(step, num_replicates - start) for start in range(0, num_replicates, step)]


def _percentiles(replicates: NDArray[np.float64], confidence: float) -> tuple[float, float]:
    tail = (1 - confidence) / 2
    low, high = np.quantile(replicates, [tail, 1 - tail])
    return float(low), float(high)
