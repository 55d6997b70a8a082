"""Trainings that cannot be: refused before a run is opened, or diverged once and for all. On a real Ray, with one worker and with two."""

from __future__ import annotations

import pytest

from models.errors import UserError
from orchestration.home import Workplace
from orchestration.recipes import load_recipe
from orchestration.run_folder import RunFolder
from orchestration.sweeping.loading import load_sweep
from orchestration.sweeping.sweep import run_sweep
from orchestration.training.single_run import run_single
from tests.orchestration.sweep_process import runs_of, study_of
from tests.orchestration.test_sweep_on_ray import write_sweep
from trainers.fit import TrainingDiverged

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1200)]
TWO = ["--resources.workers", "2", "--training.batch_size", "32"]
HUGE = "1e30"
"""A learning rate with which the loss is not finite in the first epoch."""


def test_a_group_without_its_data_leaves_no_run(home, ray_cluster, tmp_path):
    experiment = load_recipe("at_digits", ["--data.name", "cifar10", "--backbone.name", "resnet8", *TWO]).experiment
    with pytest.raises(UserError, match="cifar10"):
        run_single(experiment, Workplace(home, tmp_path / "no data"))
    assert runs_of(home, "run") == []


def test_a_group_whose_objective_refuses_it_leaves_no_run(home, ray_cluster):
    fields = ["--data.limit_train", "96", "--data.validation_size", "32", "--training.batch_norm", "synchronized"]
    with pytest.raises(UserError, match="synchronized"):
        run_single(load_recipe("rat_taylor_digits", [*fields, *TWO]).experiment, Workplace(home))
    assert runs_of(home, "run") == []


def test_a_group_that_diverges_says_so_and_is_not_trained_again(home, ray_cluster):
    fields = ["--data.limit_train", "96", "--data.validation_size", "32", "--training.epochs", "2", "--training.precision", "fp32"]
    experiment = load_recipe("natural_digits", [*fields, "--training.optimizer.learning_rate", HUGE, *TWO]).experiment
    for _ in range(2):
        with pytest.raises(TrainingDiverged):
            run_single(experiment, Workplace(home))
    (run,) = runs_of(home, "run")
    assert run.info.status == "FAILED"
    assert RunFolder(home.run(experiment.fingerprint)).diverged()


def test_a_trial_that_diverges_is_one_failed_trial_with_its_reason(home, ray_cluster, tmp_path, capsys):
    path = write_sweep(tmp_path, trials=3, epochs=2)
    text = path.read_text().replace("space:", f"space:\n  training.optimizer.learning_rate: {{type: choice, choices: [0.05, {HUGE}]}}")
    head, _, tail = text.partition("  defence.lower_bound")
    path.write_text(head + tail.partition("\n")[2].replace("num_trials: 3", "sampler: grid"))
    config = load_sweep(str(path), {"stopping": None})
    written = {}
    for _ in range(2):
        summary = run_sweep(config, Workplace(home), evaluate=False)
        assert summary["trials"] == 2
        states = {trial.user_attrs["values"]["training.optimizer.learning_rate"]: trial for trial in study_of(home, "tiny").trials}
        assert {state.state.name for state in states.values()} == {"COMPLETE", "FAIL"}
        (failed,) = (trial for trial in states.values() if trial.state.name == "FAIL")
        assert "not finite" in failed.user_attrs["reason"] or "nan" in failed.user_attrs["reason"]
        found = {path: path.stat().st_mtime_ns for path in home.root.glob("runs/*/diverged.json")}
        assert len(found) == 1
        assert written in ({}, found), "trained again"
        written = found
        assert sorted(run.info.status for run in runs_of(home, "trial")) == ["FAILED", "FINISHED"]
        assert "tried again" not in capsys.readouterr().err
