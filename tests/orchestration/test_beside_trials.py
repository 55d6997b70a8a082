"""Baselines train beside the last trials of a search, and change nothing of it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from orchestration.home import Home, Workplace
from orchestration.run_folder import RunFolder
from orchestration.sweeping.beside_trials import BASELINE, BesideTrials
from orchestration.sweeping.listed_experiments import Listed
from orchestration.sweeping.listener import TrialListener, TrialRow
from orchestration.sweeping.loading import load_sweep
from orchestration.sweeping.proposals import StudySearch
from orchestration.sweeping.schedulers import EarlyStopping
from orchestration.sweeping.study import all_trials, open_study
from orchestration.sweeping.sweep import run_sweep
from orchestration.tracking.experiment_run import ParentRun
from orchestration.tracking.tracker import Tracker
from orchestration.training.job import TrialReport
from tests.orchestration.test_sweep_on_ray import runs_of, write_sweep


def proposing(folder: Path, home: Home, trials: int, **settings):
    """Return the searcher of a sweep with its two baselines, and the baselines' fingerprints, the longest training first."""
    config = load_sweep("ctrw_bounds_digits", {"num_trials": trials, **settings})
    baselines = [config.baseline_experiment(recipe) for recipe in config.baselines]
    search = StudySearch(config, open_study(config, folder))
    beside = BesideTrials(search, [Listed(each.name, each) for each in baselines], Workplace(home), "start")
    assert [each.name for each in baselines] == ["natural_digits", "at_digits"]
    return beside, [each.fingerprint for each in reversed(baselines)]


@pytest.mark.parametrize("trials", [1, 2, 5])
def test_baselines_come_when_the_search_has_proposed_all_its_trials(tmp_path, home, trials):
    beside, baselines = proposing(tmp_path, home, trials, stopping=None)
    proposed = [beside.suggest(str(index)) for index in range(trials + 3)]
    assert all("number" in each for each in proposed[:trials])
    assert proposed[trials:] == [*({BASELINE: each} for each in baselines), Searcher.FINISHED]
    assert beside.suggest(str(trials)) == {BASELINE: baselines[0]}, "what is asked twice has one answer"
    for index in range(trials + 2):
        result = {"epoch": 1, "finished": True, "validation/robust_accuracy": 0.5}
        beside.on_trial_result(str(index), result | {"finished": False})
        beside.on_trial_complete(str(index), result)
    finished = all_trials(beside.trials.study)
    assert [trial.values for trial in finished] == [[0.5]] * trials, "the study knows nothing of baselines"


def test_a_finished_baseline_and_one_that_is_a_trial_are_left_out(tmp_path, home, monkeypatch):
    beside, baselines = proposing(tmp_path, home, 1, stopping=None)
    monkeypatch.setattr(RunFolder, "result", lambda folder: {} if folder.path.name == baselines[0] else None)
    beside, baselines = proposing(tmp_path, home, 1, stopping=None)
    beside.suggest("0")
    beside.trials.trials["0"].set_user_attr("fingerprint", baselines[1])
    assert beside.suggest("1") == Searcher.FINISHED


def test_a_place_that_a_baseline_takes_is_not_given_up(tmp_path, home, monkeypatch):
    """Else the process that the last trial leaves is ended, and the next baseline waits for a new one."""
    ended, now = [], [0.0]
    monkeypatch.setattr("orchestration.sweeping.free_places.end_idle_processes", ended.append)
    monkeypatch.setattr(FIFOScheduler, "choose_trial_to_run", lambda *_: None)
    config = load_sweep("ctrw_bounds_digits", {"num_trials": 1})
    study = open_study(config, tmp_path)
    places = EarlyStopping(config, 12, study)
    places.clock = lambda: now[0]
    search = StudySearch(config, study, stopping=places, places=places)
    baselines = [config.baseline_experiment(recipe) for recipe in config.baselines]
    beside = BesideTrials(search, [Listed(each.name, each) for each in baselines], Workplace(home), "start")
    assert "number" in beside.suggest("0")
    assert BASELINE in beside.suggest("1"), "the search waits for its trial, whose place is not the only one"
    now[0] = 60.0
    places.choose_trial_to_run(None)
    assert not ended
    beside.suggest("2")
    assert beside.suggest("3") is None, "nothing is left to begin"
    now[0] = 120.0
    places.choose_trial_to_run(None)
    assert len(ended) == 1


def test_early_stopping_and_the_counts_leave_a_baseline_alone(tmp_path, home, capsys):
    config = load_sweep("ctrw_bounds_digits", {"num_trials": 2})
    stopping = EarlyStopping(config, 12, open_study(config, tmp_path))
    baseline = SimpleNamespace(trial_id="b", config={BASELINE: "x"})
    for epoch in range(1, 12):
        result = {"epoch": epoch, "validation/robust_accuracy": 0.0}
        assert stopping.on_trial_result(None, baseline, result) == TrialScheduler.CONTINUE
    experiment, tracker = config.baseline_experiment("at_digits"), Tracker(home, "rayndom")

    def row_of(settings):
        run = ParentRun(tracker, "").child("baseline", experiment, settings.get(BASELINE, "trial 0"))
        return TrialRow(settings.get(BASELINE, "trial 0"), [], run, beside=BASELINE in settings)

    listener = TrialListener("trial", "trials", [], row_of, SimpleNamespace(later=lambda *_: None), None, wanted=2, most_broken=0)
    metrics = {"train/loss": 1.0, "validation/clean_accuracy": 0.9, "validation/robust_accuracy": 0.7}
    listener.on_trial_result(0, [], baseline, TrialReport(1, metrics, "").to_result())
    listener.on_trial_result(0, [], baseline, TrialReport(12, metrics, "", finished=True).to_result())
    listener.on_trial_complete(0, [], baseline)
    assert listener.best is None, "the best of the trials"
    assert "0/2 trials over" in capsys.readouterr().out.splitlines()[-1]
    broken = SimpleNamespace(trial_id="c", config={BASELINE: "c"}, get_error=lambda: None, error_file=None)
    listener.on_trial_error(0, [], broken)
    assert not listener.hopeless, "the share is one of trials"


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_baseline_begins_before_the_last_trial_ends(home, ray_cluster, tmp_path, capsys):
    """Three trials on two workers: the third leaves one free."""
    sweep = str(write_sweep(tmp_path, trials=3, epochs=6))
    config = load_sweep(sweep, {"baselines": ["natural_digits"], "max_concurrent_trials": 2, "stopping": None})
    summary = run_sweep(config, Workplace(home), evaluate=False)
    assert summary["complete"]
    lines = capsys.readouterr().out.splitlines()
    began = next(index for index, line in enumerate(lines) if "natural_digits: started" in line)
    assert began < max(index for index, line in enumerate(lines) if "trial" in line and "finished" in line)
    assert sum("natural_digits: started" in line for line in lines) == 1
    (run,) = runs_of(home, "baseline")
    assert run.info.status == "FINISHED"
    assert len(runs_of(home, "trial")) == 3
