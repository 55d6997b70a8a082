"""Baselines that are evaluated while the last trials of a search still train."""

from __future__ import annotations

import pickle
import threading

import pytest
from mlflow.tracking import MlflowClient

from models.errors import UserError
from orchestration.evaluating.evaluation_run import EvaluationSettings
from orchestration.home import Home, Workplace
from orchestration.recipes import load_recipe
from orchestration.run_folder import RunFolder
from orchestration.sweeping.evaluations_ahead import EvaluationsAhead
from orchestration.sweeping.loading import load_sweep
from orchestration.sweeping.proposals import StudySearch
from orchestration.sweeping.schedulers import EarlyStopping
from orchestration.sweeping.study import open_study
from orchestration.sweeping.sweep import run_sweep


@pytest.mark.parametrize("early_stopping", [False, True])
def test_a_search_tells_when_places_are_free_while_trials_train(tmp_path, early_stopping):
    config = load_sweep("ctrw_bounds_digits", {"num_trials": 2} | ({} if early_stopping else {"stopping": None}))
    study, told = open_study(config, tmp_path), []
    stopping = EarlyStopping(config, 10, study) if early_stopping else None
    search = StudySearch(config, study, stopping=stopping, idle=lambda: told.append(len(search.over)))
    assert isinstance(search.suggest("a"), dict) and isinstance(search.suggest("b"), dict)
    assert told == []
    assert search.suggest("c") == (None if early_stopping else "FINISHED")
    search.on_trial_complete("a", {"epoch": 1})
    search.suggest("c")
    assert told == [0, 1]
    search.on_trial_complete("b", {"epoch": 1})
    assert search.suggest("c") == "FINISHED"
    assert told == [0, 1], "nothing trains any more: the search is over"


def test_what_is_wrong_with_a_baseline_does_not_break_the_search(tmp_path, monkeypatch):
    def damaged(folder):
        raise UserError("it is damaged")

    monkeypatch.setattr(RunFolder, "result", damaged)
    baselines, settings = [load_recipe("at_digits").experiment], EvaluationSettings(num_samples=8)
    with EvaluationsAhead(baselines, settings, Workplace(Home(tmp_path))) as ahead:
        ahead.places_are_free()
        assert not ahead.are_running
        ahead.trained(baselines[0])  # there is no such run
        assert ahead.are_running
    assert not ahead.are_running


def test_nothing_is_evaluated_where_that_is_not_wanted(tmp_path, monkeypatch):
    monkeypatch.setattr(RunFolder, "result", lambda folder: {})
    ahead = EvaluationsAhead([load_recipe("at_digits").experiment], None, Workplace(Home(tmp_path)))
    ahead.places_are_free()
    assert not ahead.are_running
    ahead.wait()
    assert pickle.loads(pickle.dumps(ahead)) is not None, "Tune copies whatever its searcher knows"


SWEEP = """
recipe: natural_digits
settings:
  data.image_size: 8
  data.limit_train: 96
  data.validation_size: 32
  data.limit_test: 40
  training.epochs: 2
  training.batch_size: 32
  training.attack.steps: 1
  training.validation.steps: 1
space:
  training.optimizer.learning_rate: {type: choice, choices: [0.1, 0.05]}
sampler: grid
stopping: null
baselines: [at_digits]
num_test_examples: 8
"""


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_baseline_is_evaluated_while_a_trial_still_trains(home, ray_cluster, tmp_path, monkeypatch, capsys):
    """One of two trials waits for its run's lock until the baseline has been evaluated."""
    path = tmp_path / "ahead.yaml"
    path.write_text(SWEEP)
    config = load_sweep(str(path))
    slow = RunFolder(home.run(config.experiment({"training.optimizer.learning_rate": 0.05}).fingerprint))
    evaluated, held, evaluate, seen = threading.Event(), threading.Event(), EvaluationsAhead._evaluate, []

    def tell(*what):
        evaluate(*what)
        seen.append(slow.result())
        evaluated.set()

    def hold():
        with slow.locked():
            held.set()
            evaluated.wait(600)

    monkeypatch.setattr(EvaluationsAhead, "_evaluate", tell)
    holder = threading.Thread(target=hold)
    holder.start()
    held.wait()
    try:
        summary = run_sweep(config, Workplace(home))
    finally:
        evaluated.set()
        holder.join()
    assert seen == [None], "the trial was not over when the baseline had been evaluated"
    shown = capsys.readouterr().out
    assert "evaluated beside the last trials: at_digits" in shown
    assert set(summary["evaluation"]) == {"at_digits", "natural_digits (winner)"}
    client = MlflowClient(tracking_uri=home.tracking_uri)
    experiment = client.get_experiment_by_name("rayndom")
    (baseline,) = client.search_runs([experiment.experiment_id], filter_string="tags.`rayndom.kind` = 'baseline'")
    assert baseline.info.status == "FINISHED" and "test/robust_accuracy/T1" in baseline.data.metrics
    again = run_sweep(config, Workplace(home))
    assert (again["winner"], again["evaluation"]) == (summary["winner"], summary["evaluation"])
