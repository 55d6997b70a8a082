"""What operators see: the log as JSON lines, the metrics that Prometheus fetches, the panel that shows them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from orchestration import console
from orchestration.sweeping.operation_metrics import METRICS, OperationMetrics

CLUSTER = Path(__file__).resolve().parents[2] / "docs" / "cluster"


def test_the_log_is_json_lines_on_request(monkeypatch, capsys):
    monkeypatch.setenv(console.LOG_VARIABLE, "json")
    console.say('a "line"')
    console.warn("two\nlines")
    console.error("an error")
    console.table("a table", ["n", "x"], [(1, float("nan")), (2, "y")])
    with console.Board("a board", ["n"]) as board:
        board.show([[1]], "", "an event")
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = [json.loads(line) for line in captured.err.splitlines()]
    assert [line["level"] for line in lines] == ["info", "warning", "error", "info", "info"]
    assert lines[1]["message"] == "two\nlines"
    assert lines[3]["rows"] == [[1, None], [2, "y"]]
    assert lines[4]["message"].endswith("an event")
    assert all(re.match(r"\d{4}-\d\d-\d\dT", line["time"]) for line in lines)


def test_without_the_request_lines_are_for_people(monkeypatch, capsys):
    monkeypatch.delenv(console.LOG_VARIABLE, raising=False)
    console.say("a line")
    assert capsys.readouterr().out == "a line\n"


def test_no_password_is_said():
    shown = console.without_passwords("rayndom sweep x --study postgresql://me:se@cret@host/db --home s3://bucket/team 'http://u:p@h'")
    assert shown == "rayndom sweep x --study postgresql://host/db --home s3://bucket/team 'http://h'"


def test_the_panel_shows_the_metrics_there_are():
    text = (CLUSTER / "grafana_sweeps.json").read_text()
    assert {f"ray_{name}" for name in METRICS} == set(re.findall(r"ray_rayndom_\w+", text))
    assert len(json.loads(text)["panels"]) == 4


@pytest.mark.ray
def test_metrics_are_set_where_ray_runs_and_else_nothing_happens(ray_cluster, monkeypatch):
    metrics = OperationMetrics("a sweep", "trial")
    metrics.show(dict.fromkeys(METRICS, 1.0))
    assert set(metrics._gauges) == set(METRICS)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    OperationMetrics("a sweep", "trial").show({"no such metric": 1.0})
