"""Intervals and tests against scipy, brute force and simulation."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from analysis import statistics as st


@pytest.mark.parametrize(("successes", "trials"), [(0, 10), (10, 10), (3, 17), (500, 1000), (9_321, 10_000)])
def test_wilson_matches_scipy(successes, trials):
    expected = stats.binomtest(successes, trials).proportion_ci(0.95, method="wilson")
    low, high = st.wilson_interval(successes, trials)
    assert low == pytest.approx(expected.low, abs=1e-12)
    assert high == pytest.approx(expected.high, abs=1e-12)
    assert low <= successes / trials <= high


def test_wilson_rejects_impossible_counts():
    with pytest.raises(ValueError, match="5 successes of 4 trials"):
        st.wilson_interval(5, 4)


def test_bootstrap_of_samples_matches_a_naive_loop_in_distribution():
    values = np.random.default_rng(1).random((40, 1))
    estimate = st.two_way_bootstrap(values, exact=True, num_replicates=8000)
    rng = np.random.default_rng(2)
    naive = np.array([values[rng.integers(0, 40, 40)].mean() for _ in range(8000)])
    assert estimate.value == pytest.approx(values.mean())
    assert estimate.low == pytest.approx(np.quantile(naive, 0.025), abs=0.01)
    assert estimate.high == pytest.approx(np.quantile(naive, 0.975), abs=0.01)
    assert estimate.standard_error == pytest.approx(values.std() / math.sqrt(40), rel=0.05)


def test_two_way_bootstrap_covers_when_draws_are_shared_and_the_binomial_interval_does_not():
    rng = np.random.default_rng(0)
    two_way = naive = 0
    num_worlds = 150
    for world in range(num_worlds):
        sample_effect = rng.normal(0, 0.5, (80, 1))
        draw_effect = rng.normal(0, 0.8, (1, 25))
        correct = sample_effect + draw_effect + rng.normal(0, 1, (80, 25)) > 0  # expected accuracy 1/2 by symmetry
        estimate = st.two_way_bootstrap(correct, num_replicates=300, seed=world)
        two_way += estimate.low <= 0.5 <= estimate.high
        low, high = st.wilson_interval(int(correct.sum()), correct.size)
        naive += low <= 0.5 <= high
    assert two_way / num_worlds >= 0.88
    assert naive / num_worlds < 0.5


def test_two_way_bootstrap_is_reproducible_and_does_not_touch_the_global_generator():
    values = np.random.default_rng(3).random((30, 7))
    np.random.seed(5)  # noqa: NPY002 - the global generator is what is watched here
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    assert st.two_way_bootstrap(values) == st.two_way_bootstrap(values)
    assert (np.random.get_state()[1] == before).all()  # noqa: NPY002


def test_batches_widen_the_interval_when_each_batch_has_its_own_draw():
    rng = np.random.default_rng(4)
    batches = np.repeat(np.arange(20), 30)
    correct = (rng.random(600) < np.repeat(rng.uniform(0.1, 0.9, 20), 30)).astype(float)
    by_sample = st.two_way_bootstrap(correct, exact=True)
    by_batch = st.two_way_bootstrap(correct, batches_S=batches, exact=True)
    assert by_batch.high - by_batch.low > 2 * (by_sample.high - by_sample.low)
    assert by_batch.value == by_sample.value


def test_paired_bootstrap_uses_the_pairing():
    rng = np.random.default_rng(6)
    first = rng.random((200, 1)) < 0.5
    second = first.copy()
    second[:10] = True
    difference = st.paired_bootstrap(first, second, exact=True)
    assert difference.value == pytest.approx(first.mean() - second.mean())
    assert difference.high - difference.low < 0.06  # unpaired it would be about 0.2
    assert st.paired_bootstrap(first, first, exact=True).low == 0.0
    draws = rng.random((200, 9)) < 0.5
    assert st.paired_bootstrap(draws, draws, shared_draws=True).standard_error == pytest.approx(0, abs=1e-12)
    assert st.paired_bootstrap(draws, draws).standard_error > 0.001
    with pytest.raises(ValueError, match="same samples"):
        st.paired_bootstrap(first, second[:-1])


def test_mcnemar_matches_the_binomial_test():
    rng = np.random.default_rng(7)
    first, second = rng.random(60) < 0.7, rng.random(60) < 0.5
    only_first, only_second = int((first & ~second).sum()), int((~first & second).sum())
    expected = stats.binomtest(only_first, only_first + only_second, 0.5).pvalue
    assert st.mcnemar_exact(first, second) == pytest.approx(expected)
    assert st.mcnemar_exact(first, first) == 1.0


def test_holm_matches_its_definition():
    p_values = [0.01, 0.04, 0.03, 0.005, 0.2]
    adjusted = st.holm(p_values)
    assert adjusted == pytest.approx([0.04, 0.09, 0.09, 0.025, 0.2])
    # Step-down by hand at alpha = 0.05.
    order = np.argsort(p_values)
    rejected = []
    for rank, index in enumerate(order):
        if p_values[index] > 0.05 / (len(p_values) - rank):
            break
        rejected.append(index)
    assert set(np.flatnonzero(adjusted <= 0.05)) == set(rejected)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_worst_of_k_equals_the_mean_over_all_subsets(k):
    correct = np.random.default_rng(8).random((5, 7)) < 0.6
    brute = [np.mean([row[list(subset)].all() for subset in itertools.combinations(range(7), k)]) for row in correct]
    assert st.worst_of_k(correct.sum(1), 7, k) == pytest.approx(brute)
    assert st.worst_of_k_accuracy(correct, k, num_replicates=50).value == pytest.approx(np.mean(brute))


def test_worst_of_k_on_the_whole_space_draws_with_replacement():
    assert st.worst_of_k(np.array([3, 4, 0]), 4, 3, exact=True) == pytest.approx([0.75**3, 1, 0])
    with pytest.raises(ValueError, match="k=9"):
        st.worst_of_k(np.array([3]), 4, 9)


def test_worst_of_k_interval_covers_the_truth():
    rng = np.random.default_rng(9)
    probability = rng.uniform(0, 1, 4000)
    truth = (probability**3).mean()
    covered = 0
    for world in range(60):
        sample = rng.choice(probability, 100)
        correct = rng.random((100, 20)) < sample[:, None]
        estimate = st.worst_of_k_accuracy(correct, 3, num_replicates=200, seed=world)
        covered += estimate.low <= truth <= estimate.high
    assert covered >= 52


def test_choosing_the_worst_attack_on_the_scoring_draws_is_biased_and_on_others_is_not():
    rng = np.random.default_rng(10)
    correct = rng.random((6, 400, 20)) < 0.5  # six equally strong attacks: the truth is 0.5
    honest, chosen = st.worst_attack_accuracy(correct[:, :, :10], correct[:, :, 10:])
    cursed, _ = st.worst_attack_accuracy(correct[:, :, 10:], correct[:, :, 10:])
    assert honest.low <= 0.5 <= honest.high
    assert cursed.high < 0.4
    assert chosen.shape == (400,)


def test_worst_attack_finds_the_attack_that_is_worst_for_each_sample():
    selection = np.zeros((2, 4, 3))
    selection[0, 2:] = 1
    selection[1, :2] = 1
    estimate, chosen = st.worst_attack_accuracy(selection, selection, exact=True)
    assert chosen.tolist() == [0, 0, 1, 1]
    assert estimate.value == 0.0
