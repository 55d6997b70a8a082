"""MLflow: one run per identity, each epoch once, parents and children, a store that is away for a while."""

from __future__ import annotations

import pytest
from mlflow.exceptions import MlflowException

from models.errors import UserError
from orchestration.experiment import ExperimentConfig
from orchestration.home import Home
from orchestration.recipes import load_recipe
from orchestration.tracking.tracker import PARENT_TAG, Tracker, display_uri


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


def test_metrics_wait_while_the_store_is_away(tracker, monkeypatch):
    run_id = tracker.run("run", {"rayndom.fingerprint": "abc"}, "one")
    real = tracker.client.log_batch

    def away(*args, **kwargs):
        raise MlflowException("connection refused")

    monkeypatch.setattr(tracker.client, "log_batch", away)
    tracker.log_epoch(run_id, 1, {"train/loss": 1.0})
    tracker.log_epoch(run_id, 2, {"train/loss": 2.0})
    monkeypatch.setattr(tracker.client, "log_batch", real)
    tracker.log_epoch(run_id, 3, {"train/loss": 3.0})
    assert values(tracker, run_id) == [(1, 1.0), (2, 2.0), (3, 3.0)]
    tracker.finish(run_id)
    assert tracker.client.get_run(run_id).info.status == "FINISHED"


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
