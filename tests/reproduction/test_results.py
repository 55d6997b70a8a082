"""docs/results.md says what the records say: numbers, intervals, gains and the picture come from them and from nowhere else."""

from __future__ import annotations

import dataclasses
import json
import re

import numpy as np
import pytest

from analysis.reproduction.outcome import CellOutcome, Reading
from analysis.reproduction.papers import get_item
from analysis.reproduction.report import render_paper
from analysis.statistics import wilson_interval
from benchmarks.results.__main__ import PAGE, PICTURE
from benchmarks.results.gains import gains
from benchmarks.results.page import ACCURACIES, filled, part, share
from benchmarks.results.picture import digest, drawn
from benchmarks.results.records import CURVE, FILES, FOLDER, SCALE, Record, collect, from_line, number, read, to_line, together, write
from orchestration.home import Home
from orchestration.reproducing.ledger import outcome_folder
from orchestration.reproducing.plan import plan_item
from tests.reproduction.synthetic import synthetic_outcome

ITEM = "common.table2"
MOST_BYTES = 3_000_000


def accuracy(correct: list[float], **changes) -> Reading:
    """Return an accuracy of deterministic networks on the first images."""
    low, high = wilson_interval(round(sum(correct)), len(correct))
    series = {"ids": list(range(len(correct))), "correct": correct}
    return Reading(100 * float(np.mean(correct)), 100 * low, 100 * high, "pgd", "T1", len(correct), 1, series, **changes)


def record(row: str, seed: int = 0, **columns: Reading) -> Record:
    """Return a record with random numbers, those of some columns apart."""
    outcome = synthetic_outcome(ITEM, SCALE, seed)
    cells = tuple(
        dataclasses.replace(cell, paper=columns.get(cell.column, cell.paper), honest=None) for cell in outcome.cells if cell.row == row
    )
    curve = {name: [2.3, 1.0 + seed, None] for name in CURVE}
    return Record(ITEM, row, seed, curve, dataclasses.replace(outcome, cells=cells, runs={row: outcome.runs[row]}))


# What is committed


def test_the_page_and_the_picture_are_those_of_the_records():
    tables = {item: read(item) for item in FILES}
    page = PAGE.read_text(encoding="utf-8")
    assert filled(page, tables) == page, "renew it: python -m benchmarks.results page"
    assert digest(tables) in PICTURE.read_text(encoding="utf-8"), "renew it: python -m benchmarks.results page"


def test_records_are_small_and_complete():
    assert sum(path.stat().st_size for path in FOLDER.glob("*.jsonl")) + PICTURE.stat().st_size < MOST_BYTES
    for item in FILES:
        rows = {row.key for row in get_item(item).at(SCALE).rows}
        records = read(item)
        assert len({each.place for each in records}) == len(records)
        for each in records:
            run = each.outcome.runs[each.row]
            assert each.row in rows
            assert run.state == "finished"
            assert run.environment["code"]["commit"]
            assert all(cell.paper is not None or not cell.expected for cell in each.outcome.cells)
            for column in ACCURACIES:
                reading = number(each, column)
                if reading is not None:
                    assert reading.low <= reading.value <= reading.high
                    assert reading.num_samples >= (200 if column == "arc" else 500)


# How they are made


def test_a_record_survives_being_written(tmp_path):
    half = accuracy([1.0, 0.0, 0.5, 1.0])
    first, second = record("at", known=accuracy([1.0, 0.0]), worst=half), record("ctrw", seed=3)
    write(ITEM, [second, first], tmp_path)
    assert read(ITEM, tmp_path) == [first, second], "in the order of the table"
    assert json.loads(to_line(first))["ids"] == [0, 1, 2, 3]
    elsewhere = dataclasses.replace(half, series={"ids": [7, 9, 11, 2], "correct": [1.0, 0.0, 0.5, 1.0]})
    other = record("at", known=half, worst=elsewhere)
    assert from_line(to_line(other)) == other


def test_rows_are_collected_when_they_are_finished_and_of_todays_experiment(tmp_path):
    home = Home(tmp_path / "home")
    for seed in (0, 2):
        planned = plan_item(get_item(ITEM), SCALE, seed=seed)
        outcome = synthetic_outcome(ITEM, SCALE, seed)
        runs = {key: dataclasses.replace(run, fingerprint=planned.trainings[key].fingerprint) for key, run in outcome.runs.items()}
        runs["dcs"] = dataclasses.replace(runs["dcs"], fingerprint="of an earlier recipe")
        missing = CellOutcome("rna", "worst", run="rna", reason="not evaluated yet")
        cells = tuple(missing if (cell.row, cell.column) == ("rna", "worst") else cell for cell in outcome.cells)
        folder = outcome_folder(home, ITEM, planned.edition)
        folder.mkdir(parents=True)
        (folder / "outcome.json").write_text(dataclasses.replace(outcome, cells=cells, runs=runs).to_json())
    found = {each.place for each in collect(home, tmp_path)}
    rows = {row.key for row in get_item(ITEM).at(SCALE).rows} - {"rna", "dcs"}
    assert found == {(row, seed) for row in rows for seed in (0, 2)}
    assert {each.place for each in read(ITEM, tmp_path)} == found
    kept = record("rna")
    write(ITEM, [*read(ITEM, tmp_path), kept], tmp_path)
    collect(home, tmp_path)
    assert kept in read(ITEM, tmp_path), "records of other homes stay"


def test_gains_are_paired_by_image_and_adjusted_by_holm():
    rng = np.random.default_rng(5)
    truth = rng.random(500)
    made = {name: [float(value) for value in truth < share] for name, share in (("at", 0.4), ("ctrw", 0.45), ("rna", 0.402), ("dcs", 0.3))}
    made["natural"] = made["at"]
    records = [record(name, worst=accuracy(correct)) for name, correct in made.items()]
    found = gains(records, "worst")
    assert set(found) == set(made) - {"at"}
    for name, gain in found.items():
        one, two = np.array(made[name]), np.array(made["at"])
        assert gain.difference.value == pytest.approx((one - two).mean())
        assert gain.difference.low <= (one - two).mean() <= gain.difference.high
        better, worse = int(((one == 1) & (two == 0)).sum()), int(((one == 0) & (two == 1)).sum())
        assert gain.p_value == pytest.approx(min(1.0, 2 * 0.5 ** (better + worse)) if not (better and worse) else gain.p_value)
    ranked = sorted(found.values(), key=lambda gain: gain.p_value)
    running = 0.0
    for place, gain in enumerate(ranked):
        running = max(running, min(1.0, (len(ranked) - place) * gain.p_value))
        assert gain.adjusted == pytest.approx(running)
    assert (found["ctrw"].answer, found["dcs"].answer, found["natural"].answer) == ("above AT", "below AT", "not separable")
    failed = [each if each.row != "ctrw" else record("ctrw", worst=accuracy(made["ctrw"], failed_checks=("C7",))) for each in records]
    assert gains(failed, "worst")["ctrw"].answer == "not to be believed: a check failed"
    assert gains([each for each in records if each.row != "at"], "worst") == {}


def test_the_page_shows_every_number_of_a_record_and_counts_rows():
    records = [record("at"), record("ctrw"), record("at", seed=1)]
    text = part(ITEM, records)
    assert f"2 of {len(get_item(ITEM).at(SCALE).rows)} rows are measured" in text
    assert "--rows natural,trades,awp,ctrw_project,rna," in text
    for each in records:
        for column in ACCURACIES:
            assert share(number(each, column)) in text
    assert text.count("CTRW (`ctrw`)") == 3, "accuracies, cost, curve; without images there is no gain"
    assert "–" in re.sub(r"\[.*?\]", "", text)
    page = "\n".join(f"<!-- begin: {item} (python -m benchmarks.results page) -->\nold\n<!-- end: {item} -->" for item in FILES) + "\n"
    renewed = filled(page, {"common.table1": [], ITEM: records})
    assert "old" not in renewed
    assert filled(renewed, {"common.table1": [], ITEM: records}) == renewed
    with pytest.raises(ValueError, match="marks"):
        filled("", {})


def test_the_picture_changes_with_the_numbers_and_only_with_them():
    tables = {ITEM: [record("at"), record("ctrw")], "common.table1": []}
    picture = drawn(tables)
    assert picture == drawn(tables)
    assert digest(tables) in picture
    assert digest(tables) != digest({ITEM: [record("at"), record("ctrw", worst=accuracy([1.0, 0.0]))]})


def test_records_make_the_page_of_a_reproduction():
    outcome = together([record("at"), record("ctrw")])
    assert next(cell.row for cell in outcome.cells if cell.paper is not None) == "at"
    assert "not measured yet" in render_paper("common", [outcome])
