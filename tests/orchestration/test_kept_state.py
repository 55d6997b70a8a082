"""What the bench of kills counts: each kind of damage is seen, and a whole home has none."""

from __future__ import annotations

import json
import sqlite3

import pytest

from benchmarks.kept_state import duplicates, epochs_in_mlflow, finished, times_of, unfinished
from orchestration.tracking.experiment_run import ExperimentRun
from orchestration.tracking.tracker import Tracker
from tests.orchestration.finished_runs import METRICS, finish


@pytest.fixture
def whole(home):
    experiment = finish(home, kind="run")
    records = home.root / "evaluations" / "0123456789abcdef" / "records.jsonl"
    records.parent.mkdir(parents=True)
    records.write_text("".join(json.dumps({"key": f"block{number}", "correct": "ff", "seconds": number}) + "\n" for number in range(3)))
    return home, experiment, records


def test_a_whole_home_has_nothing_wrong_and_times_of_computing_do_not_count(whole):
    home, experiment, records = whole
    before = finished(home.root)
    assert len(before) == 5  # a training, its weights, three blocks
    records.write_text(records.read_text().replace('"seconds": 2', '"seconds": 9'))
    result = home.run(experiment.fingerprint) / "result.json"
    result.write_text(result.read_text().replace("100.0", "7.0"))
    assert finished(home.root) == before
    assert (duplicates(home.root), unfinished(home.root)) == ([], [])
    assert list(epochs_in_mlflow(home.root).values()) == [[1]]


def test_what_is_lost_or_changed_is_seen(whole):
    home, experiment, records = whole
    before = finished(home.root)
    records.write_text(records.read_text().replace('"correct": "ff"', '"correct": "fe"', 1))
    assert {name for name, value in before.items() if finished(home.root).get(name) != value} == {"block 01234567 block0"}
    weights = home.run(experiment.fingerprint) / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert len({name for name, value in before.items() if finished(home.root).get(name) != value}) == 2
    times = times_of(home.root)
    (home.run(experiment.fingerprint) / "result.json").touch()
    assert times_of(home.root) != times


def test_what_stands_twice_or_stays_open_is_seen(whole):
    home, experiment, records = whole
    records.write_text(records.read_text() + records.read_text().splitlines()[0] + "\n")
    assert len(duplicates(home.root)) == 1
    tracker = Tracker(home, "rayndom")
    (run,) = tracker.client.search_runs([tracker.experiment_id])
    kept = {key: value for key, value in run.data.tags.items() if key.startswith("rayndom.")}
    second = tracker.client.create_run(tracker.experiment_id, tags=kept)
    assert len(duplicates(home.root)) == 2
    assert len(unfinished(home.root)) == 1
    tracker.finish(second.info.run_id, "FAILED")
    assert len(unfinished(home.root)) == 1
    tracker._log_batches(run.info.run_id, {"train/loss": 0.5}, 1)
    assert len(duplicates(home.root)) == 3
    (home.root / "runs" / ".result.json.00.part").write_bytes(b"half")
    assert len(unfinished(home.root)) == 2
    with sqlite3.connect(home.root / "mlflow.db") as database:
        assert database.execute("SELECT count(*) FROM runs").fetchone() == (2,)
    ExperimentRun(tracker, "trial", experiment, "below", parent=run.info.run_id).complete([METRICS])
    assert len(duplicates(home.root)) == 3, "a trial of the same training is no second run"
