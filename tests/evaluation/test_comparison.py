"""Comparing evaluations: who is better, what is not separable, and what may not be compared."""

import dataclasses

import numpy as np
import pytest

from analysis.checks.verdicts import Status, Verdict
from analysis.reporting.comparison import compare
from analysis.reporting.tables import to_markdown
from analysis.result import EvaluationResult, WorstAttack
from analysis.statistics import accuracy_interval, majority_of_n
from models.errors import UserError

HEADER = {"suite": "standard", "seed": 0, "threat_model": {"norm": "linf", "epsilon": "8/255"}, "scoring": {}}


def result(correct, *, ids=None, failed=False, finished=True, header=HEADER, exact=None):
    correct = np.asarray(correct, dtype=float)
    correct = correct[:, None] if correct.ndim == 1 else correct
    ids = np.arange(len(correct)) if ids is None else np.asarray(ids)
    worst = WorstAttack(ids, ("data",), ("pgd",) * len(ids), correct, correct.shape[1] == 1 if exact is None else exact)
    verdicts = (Verdict("C12", "gradient", Status.FAIL if failed else Status.PASS, ""),)
    return EvaluationResult((), accuracy_interval(correct > 0.5, correct.shape[1]), {}, None, None, verdicts, header, finished, worst=worst)


def outcomes(probability, count=600, seed=0):
    return np.random.default_rng(seed).random(count) < probability


def test_two_deterministic_models_are_compared_by_mcnemar_on_the_same_samples():
    first = outcomes(0.5)
    second = first.copy()
    second[np.flatnonzero(first)[:25]] = False
    (pair,) = compare({"a": result(first), "b": result(second)})
    assert pair.answer == "first is better"
    assert pair.mcnemar_p_value == pytest.approx(2 * 0.5**25)
    assert pair.adjusted_p_value == pair.p_value == pair.mcnemar_p_value
    assert pair.difference.value == pytest.approx(25 / 600)
    assert "nothing is known" in pair.reason  # one checkpoint each
    (reverse,) = compare({"b": result(second), "a": result(first)})
    assert reverse.answer == "second is better"


def test_not_separable_is_an_answer():
    (pair,) = compare({"a": result(outcomes(0.5, seed=1)), "b": result(outcomes(0.52, seed=2))})
    assert pair.answer == "not separable"
    assert "holds 0" in pair.reason
    assert "not separable" in to_markdown([pair.row()])


def test_holm_takes_all_pairs_of_a_table_into_account():
    base = outcomes(0.5, 300)
    better = base.copy()
    better[np.flatnonzero(~base)[:9]] = True
    better[np.flatnonzero(base)[:1]] = False
    alone = compare({"a": result(base), "b": result(better)})[0]
    assert alone.answer == "second is better"
    others = {f"other {seed}": result(outcomes(0.5, 300, seed=seed)) for seed in range(4, 9)}
    among = compare({"a": result(base), "b": result(better), **others})[0]
    assert among.adjusted_p_value > alone.adjusted_p_value
    assert among.answer == "not separable"
    assert "Holm" in among.reason


def test_methods_are_ranked_only_if_the_gap_exceeds_the_training_seeds():
    def group(levels):
        return [result(outcomes(level, 800, seed=index)) for index, level in enumerate(levels)]

    clear = compare({"a": group([0.60, 0.61, 0.60]), "b": group([0.50, 0.51, 0.49])})[0]
    assert clear.answer == "first is better"
    assert clear.num_seeds == (3, 3)
    assert "training seeds differ by less" in clear.reason
    unstable = compare({"a": group([0.75, 0.60, 0.48]), "b": group([0.50, 0.51, 0.49])})[0]
    assert unstable.answer == "not separable"
    assert "training seeds differ" in unstable.reason


def test_draws_are_a_source_of_chance():
    rng = np.random.default_rng(0)
    shared = rng.normal(0, 1.5, (1, 12))

    def noisy(shift, seed):
        return (np.random.default_rng(seed).normal(shift, 0.3, (300, 12)) + rng.permutation(shared, axis=1)) > 0

    (pair,) = compare({"a": result(noisy(0.15, 1)), "b": result(noisy(0.0, 2))})
    assert pair.answer == "not separable"
    assert pair.mcnemar_p_value is None


def test_marked_and_unfinished_evaluations_are_not_compared():
    good = result(outcomes(0.9))
    (marked,) = compare({"a": good, "b": result(outcomes(0.1), failed=True)})
    assert marked.answer == "not comparable"
    assert str(marked.row()["difference"]).endswith("(!)")
    assert compare({"a": good, "b": result(outcomes(0.1), finished=False)})[0].answer == "not comparable"
    assert compare({"a": good, "b": dataclasses.replace(good, worst=None)})[0].answer == "not comparable"


def test_samples_are_matched_by_id():
    values = outcomes(0.5, 100)
    order = np.random.default_rng(3).permutation(100)[:60]
    (pair,) = compare({"a": result(values), "b": result(values[order], ids=order)})
    assert pair.difference.value == 0
    assert pair.difference.num_samples == 60


def test_mistakes_are_explained():
    one = result(outcomes(0.5))
    with pytest.raises(UserError, match="at least two"):
        compare({"a": one})
    with pytest.raises(UserError, match="suite of 'b' is quick"):
        compare({"a": one, "b": result(outcomes(0.5), header={**HEADER, "suite": "quick"})})
    with pytest.raises(UserError, match="no image in common"):
        compare({"a": one, "b": result(outcomes(0.5, 10), ids=range(1000, 1010))})
    other = dataclasses.replace(one, worst=dataclasses.replace(one.worst, data=("other",)))
    with pytest.raises(UserError, match="different images"):
        compare({"a": one, "b": other})


@pytest.mark.parametrize("n", [1, 3, 4])
def test_majority_equals_the_mean_over_all_subsets(n):
    import itertools

    correct = np.random.default_rng(8).random((5, 7)) < 0.6
    brute = [np.mean([row[list(subset)].sum() > n / 2 for subset in itertools.combinations(range(7), n)]) for row in correct]
    assert majority_of_n(correct.sum(1), 7, n) == pytest.approx(brute)
    with pytest.raises(ValueError, match="n=9"):
        majority_of_n(np.array([3]), 4, 9)
