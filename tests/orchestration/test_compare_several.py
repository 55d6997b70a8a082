"""Comparing more than two runs: one row per run, and what may be said of each against the first."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from analysis.statistics import Estimate
from orchestration.evaluating.run_comparison import StoredRun, standing_rows


def evaluated(label: str, worst: float, *, marked: bool = False, suites: tuple[str, ...] = ("quick",)) -> StoredRun:
    def row(attack: str, accuracy: float) -> dict:
        bounds = {"low": accuracy - 0.05, "high": accuracy + 0.05, "num_samples": 100, "num_draws": 1}
        return {"attack": attack, "protocol": "T1", "in_threat_model": True, "accuracy": accuracy} | bounds

    summary = {"rows": [row("clean", 0.8), row("pgd_20", worst)], "headline": row("worst", worst), "marked": marked}
    return StoredRun(label, SimpleNamespace(experiment=None), dict.fromkeys(suites, summary), Path())


def pair(first: str, second: str, answer: str, reason: str) -> dict:
    return {"suite": "quick", "first": first, "second": second, "difference": "1.0 %", "p (Holm)": 0.5, "answer": answer, "reason": reason}


def test_each_run_is_held_against_the_first():
    runs = [evaluated("a", 0.5), evaluated("b", 0.4), evaluated("c", 0.6), evaluated("d", 0.5, marked=True)]
    pairs = [
        pair("a", "b", "first is better", "for these checkpoints"),
        pair("a", "c", "second is better", "for these checkpoints"),
        pair("a", "d", "not comparable", "a check failed"),
        pair("b", "c", "second is better", "for these checkpoints"),
    ]
    rows, reasons = standing_rows(runs, pairs)
    assert [row["run"] for row in rows] == ["a", "b", "c", "d"]
    assert [row["answer"] for row in rows] == ["the reference", "below a", "above a", "not comparable"]
    assert [row["a minus it"] for row in rows] == [None, "1.0 %", "1.0 %", "1.0 %"]
    worst = [row["worst attack per sample T1"] for row in rows]
    assert all(isinstance(value, Estimate) for value in worst)
    assert [value.value for value in worst] == [0.5, 0.4, 0.6, 0.5]
    assert [value.marked for value in worst] == [False, False, False, True]
    assert reasons == ["b: below a: for these checkpoints", "c: above a: for these checkpoints", "d: not comparable: a check failed"]


def test_training_seeds_of_one_method_share_the_answer():
    runs = [evaluated("a", 0.5), evaluated("b 1", 0.4), evaluated("b 2", 0.4)]
    rows, reasons = standing_rows(runs, [pair("a", "b 1 + b 2", "not separable", "the 95 % interval of the difference holds 0")])
    assert [row["answer"] for row in rows] == ["the reference", "not separable", "not separable"]
    assert reasons == ["b 1, b 2: not separable: the 95 % interval of the difference holds 0"]


@pytest.mark.parametrize("suites", [(), ("standard",)])
def test_a_run_without_the_suite_has_empty_cells_and_no_answer(suites):
    rows, reasons = standing_rows([evaluated("a", 0.5), evaluated("b", 0.4, suites=suites)], [])
    last = rows[1]
    assert (last["run"], last["suite"], last["clean"], last["answer"]) == ("b", "quick", None, None)
    assert not reasons
