"""What remains of a gain: differences with intervals, and words that never say more than was measured."""

from __future__ import annotations

import dataclasses

import pytest

from analysis.reproduction.companion import accounts, difference, gains_of, sentences, signed
from analysis.reproduction.outcome import ItemOutcome, Reading
from analysis.reproduction.papers import get_item, get_paper, papers
from analysis.reproduction.papers.model import Gain
from analysis.reproduction.report import render_paper
from analysis.statistics import wilson_interval
from tests.reproduction.synthetic import synthetic_outcome


def reading(correct: int, count: int = 1000, **changes) -> Reading:
    """Return an accuracy with Wilson's interval, in percent."""
    low, high = wilson_interval(correct, count)
    return Reading(100 * correct / count, 100 * low, 100 * high, num_samples=count, **changes)


def with_readings(outcome: ItemOutcome, column: str, defence: dict, baseline: dict) -> ItemOutcome:
    """Return an outcome of `ctrw.table1` with the readings of ResNet-18 under one attack changed."""
    changes = {("resnet18/ctrw", column): defence, ("resnet18/baseline", column): baseline}
    cells = tuple(dataclasses.replace(cell, **changes.get((cell.row, cell.column), {})) for cell in outcome.cells)
    return dataclasses.replace(outcome, cells=cells)


def first_account(outcome: ItemOutcome):
    """Return the account of CTRW on ResNet-18."""
    return accounts("ctrw", [outcome])[0]


def test_every_paper_says_what_it_claims():
    for name in ("ctrw", "dcs", "rat", "red", "rna", "common"):
        assert gains_of(name)
    for paper in papers().values():
        for gain in paper.gains:
            item = get_item(gain.item)
            assert item.row(gain.row).run or item.row(gain.row).runs
            assert not item.row(gain.baseline).quoted
            assert gain.claimed_by in ("", *papers())
    assert [gain.item for gain in gains_of("rna")][-2:] == ["common.table1", "common.table2"]


def test_a_gain_over_nothing_is_a_mistake():
    with pytest.raises(ValueError, match="does not exist"):
        dataclasses.replace(get_paper("ctrw"), gains=(Gain("ctrw.table1", "resnet18/ctrw", "resnet18/none"),))
    with pytest.raises(ValueError, match="does not exist"):
        dataclasses.replace(get_paper("ctrw"), gains=(Gain("rna.table1", "resnet18/rna", "resnet18/bn"),))


def test_newcombes_interval_of_a_difference():
    """56/70 against 48/80: 0.2 with [0.0524, 0.3339], the worked example of Newcombe (1998), method 10."""
    found = difference(reading(56, 70), reading(48, 80))
    assert found.value == pytest.approx(20.0)
    assert (found.low, found.high) == pytest.approx((5.24, 33.39), abs=0.01)
    assert not found.paired
    assert found.num_samples == 70
    assert found.separated == 1


def test_the_same_images_are_paired():
    ids = list(range(400))
    better = [1.0] * 300 + [0.0] * 100
    worse = [1.0] * 280 + [0.0] * 120
    first = reading(300, 400, series={"ids": ids, "correct": better})
    second = reading(280, 400, series={"ids": ids, "correct": worse})
    paired, independent = difference(first, second), difference(reading(300, 400), reading(280, 400))
    assert paired.paired
    assert paired.value == independent.value == 5.0
    assert (paired.separated, independent.separated) == (1, 0)
    assert paired.high - paired.low < (independent.high - independent.low) / 2
    others = reading(280, 400, series={"ids": [*ids[1:], 9999], "correct": worse})
    assert not difference(first, others).paired, "other images"


def test_without_numbers_there_is_no_difference():
    assert difference(Reading(None), reading(5, 10)) is None
    bare = difference(Reading(50.0), reading(500))
    assert (bare.value, bare.low, bare.separated) == (0.0, None, 0)


def test_at_paper_scale_the_share_of_the_printed_gain_is_said():
    outcome = with_readings(
        synthetic_outcome("ctrw.table1", "paper"),
        "pgd20",
        {"paper": reading(6900, 10000), "honest": reading(5400, 10000)},
        {"paper": reading(5200, 10000), "honest": reading(5200, 10000)},
    )
    found = first_account(outcome)
    (strand,) = [strand for strand in found.strands if strand.label == "PGD20"]
    assert strand.printed == pytest.approx(69.48 - 52.16)
    assert {name: gain.value for name, gain in strand.ours.items()} == pytest.approx({"T0": 17.0, "T1": 2.0})
    (sentence,) = [sentence for sentence in sentences(found) if sentence.startswith("PGD20")]
    assert "+17.0 [+15.7, +18.3] under the paper's protocol" in sentence
    assert "unknown draw (T1) +2.0 [+0.6, +3.4] (12 % of the printed +17.3), above 0" in sentence
    assert any("One training each" in sentence for sentence in sentences(found))
    assert any("as if independent" in sentence for sentence in sentences(found))


def test_at_a_reduced_scale_ours_is_compared_with_ours_alone():
    changed = [{"paper": reading(690), "honest": reading(530)}, {"paper": reading(520), "honest": reading(520)}]
    short = sentences(first_account(with_readings(synthetic_outcome("ctrw.table1", "short"), "pgd20", *changed)))
    (sentence,) = [sentence for sentence in short if sentence.startswith("PGD20")]
    assert "6 % of ours under the paper's protocol, short scale" in sentence
    assert "not separable from 0" in sentence
    assert not any("of the printed" in sentence for sentence in short)
    smoke = sentences(first_account(with_readings(synthetic_outcome("ctrw.table1", "smoke"), "pgd20", *changed)))
    assert smoke == ["Smoke scale: the numbers show that everything runs. They allow no conclusion about the defence."]


def test_failed_checks_make_a_gain_unbelievable():
    suspicious = reading(6900, 10000, failed_checks=("C9",))
    outcome = with_readings(synthetic_outcome("ctrw.table1", "paper"), "pgd20", {"honest": suspicious}, {})
    found = first_account(outcome)
    (strand,) = [strand for strand in found.strands if strand.label == "PGD20"]
    assert signed(strand.ours["T1"]).endswith("(!)")
    said = sentences(found)
    assert any(sentence.startswith("PGD20") and "not to be believed" in sentence for sentence in said)
    assert any("Failed checks: C9" in sentence for sentence in said)


def test_a_worse_defence_is_said_to_be_worse():
    outcome = with_readings(
        synthetic_outcome("ctrw.table1", "paper"), "pgd20", {"honest": reading(4000, 10000)}, {"honest": reading(5000, 10000)}
    )
    assert any("below 0: the baseline is better" in sentence for sentence in sentences(first_account(outcome)))


def test_what_was_not_measured_is_said():
    found = first_account(dataclasses.replace(synthetic_outcome("ctrw.table2"), cells=()))
    assert not found.measured
    assert sentences(found) == ["Nothing was measured: not run at this scale."]
    outcome = synthetic_outcome("ctrw.table1")
    failed = with_readings(
        outcome, "pgd20", {"paper": None, "honest": None, "reason": "training failed: disk full"}, {"paper": None, "honest": None}
    )
    (strand,) = [strand for strand in first_account(failed).strands if strand.label == "PGD20"]
    assert strand.missing == {"T0": "training failed: disk full", "T1": "training failed: disk full"}
    page = render_paper("ctrw", [])
    assert "Nothing was measured: not run at this scale." in page
    assert "PGD20 +17.3" in page, "the printed gain stands there alone"


def test_the_common_table_answers_for_known_draws():
    found = [each for each in accounts("rna", [synthetic_outcome("common.table1", "short")]) if each.measured]
    (account,) = found
    assert account.gain.row == "rna"
    (strand,) = [strand for strand in account.strands if strand.label == "pgd 20"]
    assert set(strand.ours) == {"T0", "T1", "T2"}
    assert account.protocols == ("T0", "T1", "T2", "T3", "T4", "ARC", "worst")
    assert any("known draw (T2)" in sentence for sentence in sentences(account))


def test_arc_is_held_against_the_worst_attack_of_a_baseline_without_draws():
    outcome = synthetic_outcome("common.table1", "short")
    values = {("rna", "arc"): 40.0, ("rna", "worst"): 42.0, ("at", "worst"): 37.5}
    cells = []
    for cell in outcome.cells:
        key = (cell.row, cell.column)
        if key in values:
            cell = dataclasses.replace(cell, paper=Reading(values[key], values[key] - 2, values[key] + 2, num_samples=200), honest=None)
        elif key == ("at", "arc"):
            cell = dataclasses.replace(cell, paper=None, honest=None, reason="not for deterministic networks", expected=False)
        cells.append(cell)
    account = next(each for each in accounts("rna", [dataclasses.replace(outcome, cells=tuple(cells))]) if each.measured)
    (strand,) = [strand for strand in account.strands if "ARC" in strand.ours]
    assert strand.ours["ARC"].value == pytest.approx(2.5)
    assert strand.ours["worst"].value == pytest.approx(4.5)
    assert any("ARC, held against the baseline's worst attack +2.5" in sentence for sentence in sentences(account))
