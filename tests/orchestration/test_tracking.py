"""MLflow: one run per identity, each epoch once, parents and children, a store that is away for a while or that refuses."""

from __future__ import annotations

import random
import time

import pytest
from mlflow.exceptions import MlflowException

from models.errors import UserError
from orchestration.experiment import ExperimentConfig
from orchestration.home import Home
from orchestration.recipes import load_recipe
from orchestration.tracking.background_writer import BackgroundWriter
from orchestration.tracking.store import display_uri
from orchestration.tracking.tracker import FINGERPRINT_TAG, PARENT_TAG, StoreAway, Tracker
from tests.orchestration.services import TrackingServer


@pytest.fixture
def tracker(home):
    return Tracker(home, "test")


def values(tracker, run_id, key="train/loss"):
    return [(metric.step, metric.value) for metric in tracker.client.get_metric_history(run_id, key)]


def test_the_same_identity_is_the_same_run(tracker, home):
    first = tracker.run("run", {"rayndom.fingerprint": "abc"}, "one")
    assert Tracker(home, "test").run("run", {"rayndom.fingerprint": "abc"}, "one") == first
    assert tracker.run("run", {"rayndom.fingerprint": "abd"}, "two") != first
    child = tracker.run("trial", {"rayndom.fingerprint": "abc"}, "child", parent=first)
    assert child != first
    assert tracker.client.get_run(child).data.tags[PARENT_TAG] == first


def test_an_epoch_is_logged_once_however_often_it_is_reported(tracker, home):
    run_id = tracker.run("run", {"rayndom.fingerprint": "abc"}, "one")
    for epoch in (1, 2):
        tracker.log_epoch(run_id, epoch, {"train/loss": float(epoch)})
    again = Tracker(home, "test")  # a new process that replays the epochs before it goes on
    for epoch in (1, 2, 3):
        again.log_epoch(run_id, epoch, {"train/loss": 10.0 * epoch})
    assert values(tracker, run_id) == [(1, 1.0), (2, 2.0), (3, 30.0)]


def away(*args, **kwargs):
    raise MlflowException("connection refused")


def test_what_is_logged_waits_while_the_store_is_away_and_comes_in_order(tracker, monkeypatch, capsys):
    run_id = tracker.run("run", {"rayndom.fingerprint": "abc"}, "one")
    real = tracker.client.log_batch
    monkeypatch.setattr(tracker.client, "log_batch", away)
    writer = BackgroundWriter("http://someone:secret@127.0.0.1:5000", retry_s=0.05)
    for epoch in (1, 2, 3):
        writer.later(tracker.log_epoch, run_id, epoch, {"train/loss": float(epoch)})
    writer.later(tracker.finish, run_id)
    time.sleep(0.3)
    assert values(tracker, run_id) == []
    monkeypatch.setattr(tracker.client, "log_batch", real)
    writer.close()
    assert values(tracker, run_id) == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert tracker.client.get_run(run_id).info.status == "FINISHED"
    shown = capsys.readouterr()
    assert shown.err.count("is away (connection refused)") == 1, "said once, not at each try"
    assert "127.0.0.1:5000 is back" in shown.out
    assert "secret" not in shown.out + shown.err


def test_an_epoch_that_the_store_took_before_its_answer_was_lost_is_not_logged_twice(tracker, monkeypatch):
    run_id = tracker.run("run", {"rayndom.fingerprint": "abc"}, "one")
    real, calls = tracker.client.log_batch, []

    def answer_is_lost(*args, **kwargs):
        real(*args, **kwargs)
        calls.append(1)
        if len(calls) == 1:
            raise MlflowException("read timed out")

    monkeypatch.setattr(tracker.client, "log_batch", answer_is_lost)
    writer = BackgroundWriter(tracker.uri, retry_s=0.02)
    for epoch in (1, 2):
        writer.later(tracker.log_epoch, run_id, epoch, {"train/loss": float(epoch)})
    writer.close()
    assert values(tracker, run_id) == [(1, 1.0), (2, 2.0)]


def test_a_store_that_stays_away_is_one_clear_error_and_a_refusal_is_not_tried_again(tracker, monkeypatch):
    run_id = tracker.run("run", {"rayndom.fingerprint": "abc"}, "one")
    monkeypatch.setattr(tracker.client, "log_batch", away)
    writer = BackgroundWriter("http://someone:secret@127.0.0.1:5000", retry_s=0.02, patience_s=0.2)
    writer.later(tracker.log_epoch, run_id, 1, {"train/loss": 1.0})
    writer.later(tracker.finish, run_id)
    with pytest.raises(StoreAway, match=r"2 entries wait.*the same command again logs the rest") as caught:
        writer.close()
    assert "secret" not in str(caught.value)
    monkeypatch.undo()
    refusing = BackgroundWriter(tracker.uri, patience_s=0.2)
    refusing.later(tracker.finish, "0" * 32)
    with pytest.raises(MlflowException, match="not found"):
        refusing.close()


def test_parameters_survive_mlflow_and_are_not_logged_twice(tracker):
    experiment = load_recipe("ctrw_digits").experiment
    run_id = tracker.run("run", {"rayndom.fingerprint": experiment.fingerprint}, "one")
    tracker.log_params(run_id, experiment.flatten())
    tracker.log_params(run_id, experiment.flatten())
    params = tracker.client.get_run(run_id).data.params
    assert params["training.attack.step_size"] == "0.025"
    assert params["defence.name"] == "ctrw"
    tracker.log_json(run_id, experiment.model_dump(mode="json"), "config.json")
    stored = tracker.client.download_artifacts(run_id, "config.json")
    import json

    with open(stored) as file:
        assert ExperimentConfig(**json.load(file)).fingerprint == experiment.fingerprint


def test_an_unreachable_server_is_one_clear_message(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@127.0.0.1:9")
    with pytest.raises(UserError, match="cannot be reached") as caught:
        Tracker(Home.locate(tmp_path), "test")
    assert "secret" not in str(caught.value)


def test_secrets_are_not_shown():
    assert display_uri("postgresql://user:secret@host:5432/mlflow") == "postgresql://host:5432/mlflow"


def test_a_home_that_cannot_be_written_is_one_clear_message(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UserError, match="--home"):
        Home.locate(file / "home")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_real_server_that_was_down_for_a_while_has_everything_once(tmp_path, monkeypatch, capsys):
    with TrackingServer(tmp_path / "server") as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        home = Home.locate(tmp_path / "home")
        tracker = Tracker(home, "test")
        first, second = (tracker.run("run", {"rayndom.fingerprint": name}, name) for name in ("abc", "abd"))
        writer = BackgroundWriter(server.uri, retry_s=0.5)
        writer.later(tracker.log_epoch, first, 1, {"train/loss": 1.0})
        server.stop()
        for epoch in (2, 3):
            writer.later(tracker.log_epoch, first, epoch, {"train/loss": float(epoch)})
        writer.later(tracker.log_json, first, {"a": 1}, "config.json")
        writer.later(tracker.finish, first)
        writer.later(tracker.log_epoch, second, 1, {"train/loss": 1.0})
        deadline = time.monotonic() + 60
        while "is away (Connection refused)" not in capsys.readouterr().err:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        server.start()
        writer.close()
        for run_id, epochs in ((first, [1, 2, 3]), (second, [1])):
            assert [step for step, _ in values(tracker, run_id)] == epochs
        assert tracker.client.get_run(first).info.status == "FINISHED"
        assert tracker.client.list_artifacts(first)[0].path == "config.json"
        server.stop()
        gone = BackgroundWriter(server.uri, retry_s=0.2, patience_s=1)
        gone.later(tracker.finish, second)
        with pytest.raises(StoreAway, match="Connection refused"):
            gone.close()


def test_the_run_of_a_training_is_its_own_or_the_one_below_the_sweep_that_asks(home):
    """Whatever the order in which they were made."""
    generator = random.Random(0)
    for case in range(4):
        tracker, identity = Tracker(home, "rayndom"), {FINGERPRINT_TAG: f"{case:016x}"}
        sweeps = [tracker.run("sweep", {"rayndom.sweep": f"{case}-{number}"}, "sweep") for number in range(2)]
        assert tracker.find_run(f"{case:016x}") is None
        kinds = [("run", None), ("trial", sweeps[0]), ("baseline", sweeps[1])]
        generator.shuffle(kinds)
        made = {parent: tracker.run(kind, identity, kind, parent) for kind, parent in kinds}
        assert tracker.find_run(f"{case:016x}") == made[None]
        assert [tracker.find_run(f"{case:016x}", below=parent) for parent in made] == list(made.values())
        tracker.replace("run", identity)
        assert tracker.find_run(f"{case:016x}") in (made[sweeps[0]], made[sweeps[1]])
        assert tracker.kinds(f"{case:016x}") == {"run", "trial", "baseline"}
