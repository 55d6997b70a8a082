"""What a killed start leaves out of MLflow the next one logs; two drivers never run one sweep; a study out of reach is one error."""

from __future__ import annotations

import errno
import json
import os
import sqlite3
from types import SimpleNamespace

import pytest
from optuna.trial import TrialState

from models import build_model
from models.errors import UserError
from models.weights import save_pretrained
from orchestration.home import Workplace
from orchestration.run_folder import RunFolder
from orchestration.sweeping import study as study_module
from orchestration.sweeping.listed_experiments import Listed, train_listed
from orchestration.sweeping.listener import is_full_disk
from orchestration.sweeping.loading import load_sweep
from orchestration.sweeping.proposals import StudySearch
from orchestration.sweeping.study import RETRY, only_driver, open_study, spent
from orchestration.sweeping.trial_runs import ClosedRuns, complete_trial_runs, shared_parameters, trial_run
from orchestration.tracking.experiment_run import ALWAYS_ITS_OWN, ParentRun
from orchestration.tracking.tracker import Tracker
from orchestration.training.job import TrialReport
from orchestration.training.trial import failure_reason
from trainers.complaints import MOST_COMMON_ANSWER

ROBUST = "validation/robust_accuracy"


def write_history(home, fingerprint, epochs):
    """Leave the folder of a finished run, as training does."""
    history = [{"train/loss": 1.0 / epoch, ROBUST: 0.1 * epoch} for epoch in range(1, epochs + 1)]
    folder = RunFolder(home.run(fingerprint))
    training = {"metrics": history[-1], "num_epochs": epochs, "selected_epoch": epochs}
    save_pretrained(build_model("at", backbone="resnet8"), folder.model, details={"fingerprint": fingerprint, "training": training})
    folder.write_result({"history": history, **training})


@pytest.fixture
def half_recorded(home, tmp_path):
    """A sweep whose driver was killed: one trial closed in MLflow, one open with its first epoch, one unknown there, one unfinished."""
    config = load_sweep("ctrw_bounds_digits", {"num_trials": 4})
    study = open_study(config, tmp_path)
    search = StudySearch(config, study)
    tracker = Tracker(home, "rayndom")
    parent = tracker.run("sweep", {"rayndom.sweep": "key"}, "x")
    experiments = []
    for name in "abcd":
        experiments.append(config.experiment(search.suggest(name)["values"]))
    search.on_trial_complete("a", TrialReport(3, {ROBUST: 0.3}, "", finished=True).to_result())
    search.on_trial_complete("b", TrialReport(3, {ROBUST: 0.4}, "", finished=True).to_result())
    search.on_trial_complete("c", TrialReport(2, {ROBUST: 0.2}, "").to_result())
    for experiment in experiments[:3]:
        write_history(home, experiment.fingerprint, 3)
    below = ParentRun(tracker, parent)
    trial_run(below, tmp_path / "key", 0, config, study.trials[0].user_attrs["values"]).end()
    trial_run(below, tmp_path / "key", 1, config, study.trials[1].user_attrs["values"]).log_epoch(1, {"train/loss": 1.0, ROBUST: 0.1})
    return config, study, parent, experiments


def test_what_a_killed_start_did_not_log_is_logged_once_by_the_next(home, half_recorded, tmp_path):
    config, study, parent, experiments = half_recorded
    tracker = Tracker(home, "rayndom")
    assert complete_trial_runs(config, tmp_path / "key", study, home, ParentRun(tracker, parent)) == [1, 2]
    assert complete_trial_runs(config, tmp_path / "key", study, home, ParentRun(Tracker(home, "rayndom"), parent)) == []
    runs = {run.data.tags["rayndom.fingerprint"]: run for run in tracker.children(parent, "trial")}
    assert set(runs) == {experiment.fingerprint for experiment in experiments[:3]}, "the unfinished trial is not closed"
    second, third = (runs[experiment.fingerprint] for experiment in experiments[1:3])
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    history = tracker.client.get_metric_history
    assert [metric.step for metric in history(second.info.run_id, "train/loss")] == [1, 2, 3]
    assert [metric.value for metric in history(second.info.run_id, f"selected/{ROBUST}")] == [0.4]
    # Its worker had trained an epoch more than ASHA let it: only what the study knows of is logged.
    assert [metric.step for metric in history(third.info.run_id, "train/loss")] == [1, 2]
    assert third.data.tags["rayndom.state"] == "stopped early by ASHA"


def test_a_baseline_that_was_trained_elsewhere_is_shown_below_the_sweep(home):
    config = load_sweep("ctrw_bounds_digits")
    experiment = config.baseline_experiment("at_digits")
    write_history(home, experiment.fingerprint, 2)
    tracker = Tracker(home, "rayndom")
    parent = tracker.run("sweep", {"rayndom.sweep": "key"}, "x")
    for _ in range(2):
        train_listed("baseline", [Listed("at_digits", experiment)], Workplace(home), ParentRun(tracker, parent))
    (child,) = tracker.children(parent, "baseline")
    assert child.info.status == "FINISHED"
    assert child.data.metrics[f"selected/{ROBUST}"] == pytest.approx(0.2)
    assert [metric.step for metric in tracker.client.get_metric_history(child.info.run_id, "train/loss")] == [1, 2]


def test_a_kill_while_unfinished_trials_are_taken_over_loses_none(tmp_path, monkeypatch):
    config = load_sweep("ctrw_bounds_digits", {"num_trials": 2})
    first = StudySearch(config, open_study(config, tmp_path)).suggest("a")["values"]
    # The process dies after it has closed the trial and before it has queued it again.
    monkeypatch.setattr("optuna.Study.enqueue_trial", lambda *args, **kwargs: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        open_study(config, tmp_path)
    monkeypatch.undo()
    study = open_study(config, tmp_path)
    assert study.trials[0].state == TrialState.FAIL
    assert study.trials[0].user_attrs[RETRY]
    assert spent(study) == 0
    assert StudySearch(config, study).suggest("b")["values"] == first


def test_a_second_driver_is_refused_and_told_who_runs_the_sweep(tmp_path):
    with only_driver(tmp_path, "bounds"):
        with pytest.raises(UserError, match=rf"process {os.getpid()} on .*rayndom watch bounds"):
            with only_driver(tmp_path, "bounds", patience_s=0.1):
                pytest.fail("two drivers")
    with only_driver(tmp_path, "bounds", patience_s=0.1):
        pass


def test_a_locked_study_is_one_clear_error(tmp_path, monkeypatch):
    config = load_sweep("ctrw_bounds_digits", {"num_trials": 2})
    open_study(config, tmp_path)
    monkeypatch.setattr(study_module, "LOCK_PATIENCE_S", 0.1)
    other = sqlite3.connect(tmp_path / "study.db", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(UserError, match=r"study\.db cannot be used: .*locked.*Another program"):
        open_study(config, tmp_path)
    other.close()
    assert len(open_study(config, tmp_path).trials) == 0


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_told_from_other_errors(code):
    assert is_full_disk(str(OSError(code, os.strerror(code), "training.pt")))
    assert not is_full_disk(json.dumps({"loss": "nan"}))


DIED = """Failure # 1 (occurred at 2026-01-01)
Traceback (most recent call last):
ValueError: an earlier one
Failure # 2 (occurred at 2026-01-01)
Traceback (most recent call last):
  File "x.py", line 1, in f
ray.exceptions.ActorDiedError: The actor died unexpectedly before finishing this task.
\tclass_name: ImplicitFunc
The actor is dead because its owner has died. Name: None
"""


@pytest.mark.parametrize(
    ("stored", "local", "reason"),
    [
        (DIED, None, "The actor died unexpectedly before finishing this task."),
        (None, "Failure # 1 (x)\nTraceback\nOSError: [Errno 28] No space left on device", "OSError: [Errno 28] No space left on device"),
        (None, None, "unknown"),
    ],
)
def test_why_a_trial_broke_is_one_line(stored, local, reason, tmp_path):
    file = tmp_path / "error.txt"
    if local is not None:
        file.write_text(local)
    trial = SimpleNamespace(get_error=lambda: stored, error_file=str(file))
    assert failure_reason(trial) == reason


def test_a_trial_costs_the_store_few_rows(home, tmp_path):
    """Parameters that all trials share stand on the sweep's run, most metrics are logged once, and a sign of trouble at every epoch."""
    config = load_sweep("ctrw_bounds_digits", {"num_trials": 2})
    tracker, shared = Tracker(home, "rayndom"), shared_parameters(config.base_experiments())
    parent = ParentRun(tracker, tracker.run("sweep", {"rayndom.sweep": "key"}, "x"), shared)
    values = {"defence.lower_bound": 300.0, "defence.upper_bound": 900.0}
    run = trial_run(parent, tmp_path / "key", 0, config, values)
    for epoch in range(1, 6):
        answer = 1.0 if epoch == 2 else 0.1
        run.log_epoch(epoch, {"train/loss": 1.0 / epoch, ROBUST: 0.1, "train/other": float(epoch), MOST_COMMON_ANSWER: answer})
    run.end()
    (stored,) = tracker.children(parent.run_id, "trial")
    assert {name: float(value) for name, value in stored.data.params.items() if name in values} == values
    assert stored.data.params["defence.name"] == "ctrw"
    assert len(stored.data.params) == len(values) + len(ALWAYS_ITS_OWN)
    assert shared.keys() | stored.data.params.keys() == config.experiment(values).flatten().keys(), "nothing is in neither"
    steps = {name: [each.step for each in tracker.client.get_metric_history(stored.info.run_id, name)] for name in stored.data.metrics}
    assert steps == {"train/loss": [1, 2, 3, 4, 5], ROBUST: [1, 2, 3, 4, 5], "train/other": [5], MOST_COMMON_ANSWER: [2, 3, 4, 5]}
    assert stored.data.metrics["train/other"] == 5.0


def test_the_note_of_closed_runs_survives_what_a_kill_leaves(tmp_path):
    note = ClosedRuns(tmp_path, "run")
    assert note.numbers() is None
    note.add()
    assert note.numbers() == set()
    note.add(3, 14)
    with note.path.open("a") as file:
        file.write("15")  # cut before its end: it may have been 159
    assert note.numbers() == {3, 14}
    note.add(159)
    assert note.numbers() == {3, 14, 159}
    assert ClosedRuns(tmp_path, "another run").numbers() is None
