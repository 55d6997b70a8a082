"""Checks C1 to C21, each on records in which exactly its own defect was planted: it is seen, explained, and comes with advice."""

import copy
from pathlib import Path

import numpy as np
import pytest

from analysis.checks.evidence import Evidence
from analysis.checks.verdicts import CHECKS, run_checks
from analysis.evaluate import evaluate
from analysis.evaluation import calibration
from analysis.evaluation.measurements import measurements
from analysis.evaluation.records import correct_matrix, pack_rows
from analysis.evaluation.studies import StudySettings
from analysis.evaluation.suites import AttackItem, Suite
from analysis.reporting.conclusion import to_markdown
from analysis.result import collect
from models.threat_model import ThreatModel

SUITE = Suite(
    name="mine",
    scoring={"num_selection_draws": 6, "num_evaluation_draws": 10, "num_known_draws": 2},
    studies=StudySettings(
        names=("epsilon", "steps", "random_search", "gradient_resolution", "progress", "unit_test"),
        num_samples=24, steps=20, num_draws=4, max_steps=40, max_draws=8, num_searched=6, num_random_points=5, num_votes=4, num_tested=24,
    ),
    attacks=(
        AttackItem(attack="fgsm", num_draws=4),
        AttackItem(attack="apgd_ce", parameters={"steps": 20}, num_draws=4, protocols=("T1", "T2")),
        AttackItem(attack="square", parameters={"num_queries": 60}, num_draws=2),
        AttackItem(attack="transfer_frozen_draws", parameters={"steps": 10}, num_draws=2),
    ),
)  # fmt: skip


@pytest.fixture(scope="module")
def records():
    x, y = calibration.calibration_images()
    toy = calibration.calibration_toys()["noisy"]
    result = evaluate(toy, x[:24], y[:24], SUITE, threat_model=ThreatModel(epsilon=0.15))
    assert not result.marked, to_markdown(result)
    return result.records


def of(records, name, protocol="T1", kind="attack"):
    """Return the record of an attack, a study, or the clean images."""
    for record in records:
        header = record["header"]
        found = header["study"]["name"] if header["study"] else header["item"]["name"] if header["item"] else "clean"
        if (found, header["protocol"], header["kind"]) == (name, protocol, kind):
            return record
    raise LookupError(name)


def answer(record, value, draw_sets=("evaluation", "selection"), rows=slice(None)):
    """Let the model be right (1) or wrong (0) on these samples, under every draw."""
    for draw_set in draw_sets:
        if draw_set in record["samples"]["correct"]:
            matrix = correct_matrix(record, draw_set)
            matrix[rows] = value
            record["samples"]["correct"][draw_set] = pack_rows(matrix)
            record["samples"]["num_correct"][draw_set] = matrix.sum(1).tolist()


def facts(name, **values):
    return lambda records: of(records, name, kind="study")["block"]["study"].update(values)


def examination(**values):
    return lambda records: of(records, "clean", kind="clean")["block"]["examination"].update(values)


def outputs(**values):
    return lambda records: of(records, "clean", kind="clean")["block"]["examination"]["outputs"].update(values)


def block(name, **values):
    return lambda records: of(records, name)["block"].update(values)


def largest_radius(records):
    curve = [record for record in records if (record["header"]["study"] or {}).get("name") == "epsilon"]
    full = max(curve, key=lambda record: record["header"]["radius"])
    answer(full, 1)


def more_steps_help(records):
    record = of(records, "steps", kind="study")
    answer(record, 1, ("previous",))
    answer(record, 0, ("evaluation",))


def square_breaks_what_gradients_do_not(records):
    answer(of(records, "apgd_ce"), 1)
    answer(of(records, "square"), 0, rows=slice(0, 16))


def knowing_the_draw_hurts(records):
    answer(of(records, "apgd_ce"), 0)
    answer(of(records, "apgd_ce", "T2"), 1)


def another_set_of_draws_differs(records):
    answer(of(records, "apgd_ce"), 0, ("evaluation",))


def moved_too_far(records):
    of(records, "fgsm")["samples"]["linf"][0] = 0.2


def toys_differ(records):
    record = copy.deepcopy(of(records, "progress", kind="study"))
    record["header"]["study"]["name"] = record["header"]["item"]["name"] = "calibration"
    record["block"]["study"] = {"toys": [{"toy": "noisy", "what": "apgd T1", "expected": 0.5, "measured": 0.9, "met": False}]}
    records.append(record)


PLANTED = [
    ("C1", "FAIL", lambda records: of(records, "apgd_ce")["block"]["liveness"]["after"].update(differing=0.5)),
    ("C1", "FAIL", lambda records: of(records, "fgsm")["block"]["liveness"]["before"].update(unrepeatable=0.5)),
    ("C3", "FAIL", block("fgsm", highest=1.2)),
    ("C3", "FAIL", moved_too_far),
    ("C3", "WARN", block("fgsm", num_not_finite=1)),
    ("C3", "FAIL", block("fgsm", num_not_finite=20)),
    ("C4", "FAIL", lambda records: of(records, "apgd_ce")["samples"].update(num_unchanged=[1] * 24)),
    ("C5", "FAIL", lambda records: answer(of(records, "fgsm", kind="epsilon_zero"), 0)),
    ("C6", "FAIL", largest_radius),
    ("C7", "WARN", more_steps_help),
    ("C8", "FAIL", lambda records: answer(of(records, "fgsm"), 0, rows=slice(0, 20))),
    ("C8", "WARN", lambda records: answer(of(records, "fgsm"), 0)),  # nothing is left that could be too high
    ("C9", "FAIL", square_breaks_what_gradients_do_not),
    ("C10", "FAIL", lambda records: answer(of(records, "transfer_frozen_draws"), 0, rows=slice(0, 20))),
    ("C11", "FAIL", facts("random_search", num_searched=100, num_flipped=2)),
    ("C12", "WARN", examination(missing_gradients={"margin, image": 0.03})),
    ("C12", "FAIL", examination(missing_gradients={"margin, image": 0.06})),
    ("C13", "WARN", facts("gradient_resolution", cosines=[0.3])),
    ("C14", "WARN", facts("progress", late_share=0.06)),
    ("C14", "FAIL", facts("progress", num_silent=1)),
    ("C15", "FAIL", facts("unit_test", num_separated=20, num_found=2, num_found_at_random=0)),
    ("C15", "WARN", facts("unit_test", num_separated=20, num_found=15, num_found_at_random=0)),
    ("C15", "WARN", facts("unit_test", num_separated=20, num_found=20, num_found_at_random=15)),
    ("C16", "FAIL", lambda records: of(records, "square")["block"]["hygiene"].update(changed=["buffer 1.running_mean"])),
    ("C16", "FAIL", lambda records: of(records, "square")["block"]["hygiene"].update(training_modules=2)),
    ("C17", "FAIL", block("apgd_ce", draws_disjoint=False)),
    ("C17", "FAIL", another_set_of_draws_differs),
    ("C18", "WARN", outputs(are_probabilities=True)),
    ("C18", "WARN", outputs(median_margin=60.0)),
    ("C18", "FAIL", outputs(finite=False)),
    ("C19", "FAIL", toys_differ),
    ("C20", "FAIL", knowing_the_draw_hurts),
    ("C21", "WARN", examination(gradient_calls_in_forward=3)),
]


IDS = [f"{check}-{status}-{number}" for number, (check, status, _) in enumerate(PLANTED)]


@pytest.mark.parametrize(("check", "status", "plant"), PLANTED, ids=IDS)
def test_a_planted_defect_is_seen_by_its_check(records, check, status, plant):
    spoilt = copy.deepcopy(list(records))
    plant(spoilt)
    verdict = next(each for each in run_checks(Evidence(measurements(spoilt))) if each.id == check)
    assert verdict.status.value == status, verdict
    assert len(verdict.explanation) > 20
    assert verdict.advice.endswith(".")
    result = collect(spoilt)
    assert result.marked or status == "WARN"
    if status == "FAIL":
        assert check in {each.id for each in result.failed}
        assert all(row.estimate.marked for row in result.rows)
        assert result.headline.marked


def test_every_check_that_can_say_more_than_pass_is_planted_here():
    informs = {"C2"}
    assert {check for check, _, _ in PLANTED} == {check.id for check in CHECKS} - informs


def test_the_documentation_lists_every_check_by_its_title():
    page = (Path(__file__).resolve().parents[2] / "docs" / "evaluation.md").read_text()
    for check in CHECKS:
        assert f"| {check.id} | {check.title}" in page


def test_a_sound_record_is_left_alone_by_the_helpers(records):
    spoilt = copy.deepcopy(list(records))
    answer(of(spoilt, "fgsm"), 1, rows=slice(0, 0))
    assert np.array_equal(correct_matrix(of(spoilt, "fgsm"), "evaluation"), correct_matrix(of(records, "fgsm"), "evaluation"))
