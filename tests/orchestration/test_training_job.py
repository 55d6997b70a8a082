"""A training goes to a worker and its reports come back as they were: through JSON, and through what Tune adds to a result."""

from __future__ import annotations

import json
import math
import random

import pytest

from orchestration.home import Home, Workplace
from orchestration.recipes import load_recipe
from orchestration.tracking.experiment_run import FAILED, STOPPED_EARLY, ParentRun
from orchestration.tracking.tracker import Tracker
from orchestration.training.job import TrainingJob, TrialReport, bundled, unbundled
from orchestration.training.measure import MeasureConfig

ROBUST = "validation/robust_accuracy"


@pytest.mark.parametrize(
    "recipe", ["ctrw_digits", "rna_digits", "dcs_digits", "red_digits", "rat_taylor_digits", "trades_digits", "awp_digits"]
)
def test_a_job_is_the_same_after_the_way_to_a_worker(recipe, tmp_path):
    choose = random.Random(recipe)
    for _ in range(5):
        fields = ["--seed", str(choose.randrange(100)), "--training.epochs", str(choose.randint(1, 9)), "--resources.workers", "2"]
        experiment = load_recipe(recipe, fields).experiment
        workplace = Workplace(Home(tmp_path), choose.choice([None, tmp_path / "data"]), choose.choice([None, "auto"]))
        measure = choose.choice([None, MeasureConfig(num_examples=choose.randint(1, 50))])
        job = TrainingJob.at(workplace, experiment, measure=measure).with_own_cores()
        back = TrainingJob.from_json(json.loads(json.dumps(job.to_json())))
        assert back == job
        assert back.experiment.fingerprint == experiment.fingerprint
        assert job.folder.path == workplace.home.run(experiment.fingerprint)


def test_two_starts_of_a_job_have_different_names(tmp_path):
    experiment = load_recipe("at_digits").experiment
    starts = {TrainingJob.at(Workplace(Home(tmp_path)), experiment).start for _ in range(20)}
    assert len(starts) == 20


def test_a_report_is_the_same_among_the_entries_that_tune_adds():
    choose = random.Random(0)
    for _ in range(20):
        names = choose.sample(["train/loss", ROBUST, "model/parameters", "loss", "time/epoch_seconds"], choose.randint(0, 5))
        report = TrialReport(choose.randint(0, 9), {name: choose.random() for name in names}, "f" * 16, choose.random() < 0.5)
        tune = {"time_total_s": 3.5, "config/values/defence.sigma": 0.1, "timers/x": 2.0, "pid": 7, "done": False}
        result = tune | report.to_result()
        assert TrialReport.from_result(result) == report
        assert all(result[name] == value for name, value in report.metrics.items()), "schedulers look metrics up by their names"
    lost = TrialReport.from_result(TrialReport(1, {"train/loss": math.nan}, "x").to_result())
    assert math.isnan(lost.metrics["train/loss"])


def test_reports_that_travel_together_are_the_same_one_by_one():
    reports = [TrialReport(epoch, {"train/loss": 1 / epoch}, "f", workers=2) for epoch in (1, 2, 3)]
    for count in (1, 2, 3):
        bundle = bundled([report.to_result() for report in reports[:count]])
        assert [TrialReport.from_result(result) for result in unbundled(bundle)] == reports[:count]
        assert TrialReport.from_result(bundle) == reports[count - 1], "who does not know of bundles sees the last"
    assert unbundled(reports[0].to_result()) == [reports[0].to_result()]


def test_a_run_is_opened_once_and_completed_without_duplicates(home):
    tracker = Tracker(home, "rayndom")
    parent = ParentRun(tracker, tracker.run("sweep", {"rayndom.sweep": "key"}, "x"))
    history = [{"train/loss": 3.0, ROBUST: 0.1}, {"train/loss": 2.0, ROBUST: 0.2}]
    started = load_recipe("at_digits").experiment
    parent.child("trial", started, "trial 0").log_epoch(1, history[0])
    assert parent.closed("trial") == set()
    for _ in range(2):  # the start that goes on, and one after it
        parent.child("trial", started, "trial 0").complete(history, {ROBUST: 0.2}, STOPPED_EARLY)
    (run,) = tracker.children(parent.run_id, "trial")
    assert run.info.status == "FINISHED"
    assert run.data.tags["rayndom.state"] == STOPPED_EARLY
    for name, values in (("train/loss", [3.0, 2.0]), (f"selected/{ROBUST}", [0.2])):
        assert [entry.value for entry in tracker.client.get_metric_history(run.info.run_id, name)] == values
    broken = load_recipe("at_digits", ["--seed", "1"]).experiment
    parent.child("trial", broken, "trial 1").end(FAILED, "out of memory")
    assert parent.closed("trial") == {started.fingerprint, broken.fingerprint}
    assert parent.closed("trial", finished=True) == {started.fingerprint}
    (other,) = [each for each in tracker.children(parent.run_id, "trial") if each.info.status == "FAILED"]
    assert other.data.tags["rayndom.error"] == "out of memory"
