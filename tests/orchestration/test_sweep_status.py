"""`rayndom status` and `rayndom watch`: a sweep seen from another terminal."""

from __future__ import annotations

import json

import pytest

from models.errors import UserError
from models.files import write_text
from orchestration.cli import main
from orchestration.run_folder import RunFolder
from orchestration.sweeping.config import sweep_key
from orchestration.sweeping.loading import load_sweep
from orchestration.sweeping.proposals import StudySearch
from orchestration.sweeping.status import SweepStatus, TrialStatus, find_sweep, is_held, list_sweep_keys, sweep_status
from orchestration.sweeping.study import open_study
from orchestration.tracking.tracker import FINGERPRINT_TAG, SWEEP_TAG, Tracker
from orchestration.training.job import TrialReport
from trainers.complaints import MOST_COMMON_ANSWER

ROBUST, CLEAN = "validation/robust_accuracy", "validation/clean_accuracy"


@pytest.fixture
def begun(home):
    """A sweep with one finished, one running and one interrupted trial, and the lock that the running one holds."""
    config = load_sweep("ctrw_bounds_digits", {"num_trials": 4})
    key = sweep_key(config)
    folder = home.sweep(key)
    search = StudySearch(config, open_study(config, folder))
    write_text(folder / "sweep.json", json.dumps(config.model_dump(mode="json")))
    tracker = Tracker(home, "rayndom")
    parent = tracker.run("sweep", {SWEEP_TAG: key}, config.name)
    fingerprints = []
    for name in "abc":
        fingerprints.append(config.experiment(search.suggest(name)["values"]).fingerprint)
        run = tracker.run("trial", {SWEEP_TAG: key, FINGERPRINT_TAG: fingerprints[-1]}, name, parent)
        for epoch in (1, 2, 3):
            # The first trial answers one class until its selected epoch; the second learns at first and then does not.
            signs = {MOST_COMMON_ANSWER: 1.0 if name == "a" or (name, epoch) == ("b", 3) else 0.2}
            tracker.log_epoch(run, epoch, {"train/loss": 1.0, CLEAN: 0.9, ROBUST: 0.1 * epoch} | signs)
            search.on_trial_result(name, {"epoch": epoch, ROBUST: 0.1 * epoch})
    search.on_trial_complete("a", TrialReport(12, {ROBUST: 0.5, MOST_COMMON_ANSWER: 0.3}, "", finished=True).to_result())
    for fingerprint in fingerprints[1:]:
        RunFolder(home.run(fingerprint)).path.mkdir(parents=True)
    with RunFolder(home.run(fingerprints[1])).locked():
        yield key


def test_the_state_of_every_trial_is_known(home, begun):
    status = sweep_status(home, find_sweep(home, "ctrw_bounds_digits"))
    assert status.key == begun
    assert (status.done, status.wanted) == (1, 4)
    assert [trial.state for trial in status.trials] == ["finished", "running", "interrupted"]
    assert [trial.epoch for trial in status.trials] == [12, 3, 3]
    assert status.trials[1].robust == pytest.approx(0.3)
    assert status.best == (0,)
    assert status.trials[0].values == (0.5,)
    assert all(len(row) == len(status.columns) for row in status.rows)
    assert "1/4 trials over, 1 running" in status.summary


def test_a_trial_that_does_not_learn_is_said_to_be_one(home, begun, capsys):
    assert main(["status", begun, "--home", str(home.root)]) == 0
    shown = capsys.readouterr()
    assert shown.err.count("warning: trial") == 1
    assert "trial 1: a network answers one class for all images" in shown.err, "its last epoch counts; of a finished trial the selected one"
    assert [row[0] for row in sweep_status(home, begun).rows] == ["0*", "1 (!)", "2"]
    assert main(["status", "--json", "--home", str(home.root)]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert [len(trial["signs"]) for trial in found["trials"]] == [0, 1, 0]


def test_looking_changes_nothing(home, begun):
    before = sweep_status(home, begun)
    assert [trial.state for trial in sweep_status(home, begun).trials] == [trial.state for trial in before.trials]
    assert is_held(home.run(before.trials[1].fingerprint) / "lock"), "looking does not take the lock away"


def test_the_commands(home, begun, capsys):
    assert main(["status", "--json", "--home", str(home.root)]) == 0
    (shown,) = json.loads(capsys.readouterr().out)
    assert shown["sweep"] == begun
    assert shown["trials"][1]["state"] == "running"
    assert main(["status", "nothing", "--home", str(home.root)]) == 2
    assert begun in capsys.readouterr().err
    assert main(["watch", "--interval", "0", "--home", str(home.root)]) == 2


def test_watching_ends_when_the_sweep_has_all_its_trials(home, capsys):
    config = load_sweep("ctrw_bounds_digits", {"num_trials": 1})
    folder = home.sweep(sweep_key(config))
    search = StudySearch(config, open_study(config, folder))
    write_text(folder / "sweep.json", json.dumps(config.model_dump(mode="json")))
    search.suggest("a")
    search.on_trial_complete("a", {"epoch": 12, "finished": True, ROBUST: 0.5})
    assert main(["watch", "--interval", "0.1", "--home", str(home.root)]) == 0


def test_a_home_without_sweeps(home, capsys):
    assert list_sweep_keys(home) == []
    assert main(["status", "--home", str(home.root)]) == 0
    with pytest.raises(UserError, match="no sweep was started"):
        find_sweep(home, "x")


def test_of_thousands_of_trials_those_are_shown_that_say_most():
    trials = tuple(
        TrialStatus(number, "running" if number in (7, 4990) else "finished", 1, {}, 0.9, 0.5, (0.5,), 60.0, "f") for number in range(5000)
    )
    config = load_sweep("ctrw_bounds_digits")
    status = SweepStatus("key", config, 12, 4998, 5000, (3, 1200), trials, None)
    shown = status.most_telling(40)
    numbers = [each.number for each in shown.trials]
    assert len(numbers) == 40 and numbers == sorted(numbers)
    assert {3, 7, 1200, 4990, 4999} <= set(numbers)
    assert status.most_telling(5000) is status
