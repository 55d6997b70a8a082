"""A recipe's name where several of its runs are finished: the refusal says in what each differs from the recipe."""

from __future__ import annotations

import pytest

from models.errors import UserError
from orchestration.exporting.targets import resolve_target
from orchestration.home import Home
from orchestration.recipes import load_recipe
from orchestration.run_folder import RunFolder


def finish(home: Home, *flags: str) -> str:
    """Leave a run that looks finished, and return its fingerprint."""
    experiment = load_recipe("at_digits", flags).experiment
    folder = RunFolder(home.run(experiment.fingerprint))
    folder.write_config(experiment)
    metrics = {"validation/clean_accuracy": 0.9, "validation/robust_accuracy": 0.5, "train/loss": 1.0}
    folder.write_result({"metrics": metrics, "selected_epoch": 1, "num_epochs": 1, "stopped_early": False, "history": [metrics]})
    return experiment.fingerprint


def test_runs_to_choose_from_are_told_apart_by_what_they_changed(tmp_path):
    home = Home(tmp_path)
    runs = {
        finish(home, "--training.epochs", "3", "--resources.cpus_per_worker", "1"): "training.epochs=3",
        finish(home, "--seed", "5", "--training.attack.steps", "7"): "training.attack.steps=7, seed=5",
    }
    with pytest.raises(UserError) as refused:
        resolve_target("at_digits", home)
    lines = str(refused.value).splitlines()[1:]
    assert {tuple(line.split(maxsplit=1)) for line in lines} == set(runs.items())
