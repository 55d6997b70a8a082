"""Epochs that are validated on a free worker of a real Ray while the next ones train."""

from __future__ import annotations

import pytest

from models.weights import load_pretrained
from orchestration.home import Home, Workplace
from orchestration.recipes import load_recipe
from orchestration.run_folder import RunFolder
from orchestration.sweeping.loading import load_sweep
from orchestration.sweeping.sweep import run_sweep
from orchestration.training.job import TrainingJob
from orchestration.training.training_run import train_here
from tests.orchestration.test_sweep_on_ray import write_sweep
from trainers.checkpoint import STATE_FILE

TINY = [
    "--data.limit_train", "96", "--data.validation_size", "32", "--data.limit_test", "16", "--data.image_size", "8",
    "--training.epochs", "4", "--training.batch_size", "32", "--training.attack.steps", "2", "--training.validation.steps", "2",
    "--training.precision", "fp32",
]  # fmt: skip


def without_times(history):
    return [{name: value for name, value in epoch.items() if not name.startswith(("time/", "system/", "memory/"))} for epoch in history]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_free_worker_measures_what_the_training_itself_would(ray_cluster, tmp_path):
    from orchestration.training.validation_task import FreeWorkers, _Task

    experiment = load_recipe("ctrw_digits", TINY).experiment
    plain = train_here(TrainingJob.at(Workplace(Home.locate(tmp_path / "plain")), experiment))
    job, there = TrainingJob.at(Workplace(Home.locate(tmp_path / "beside")), experiment).with_own_cores(), []

    class Noted(FreeWorkers):
        def begin(self, weights):
            task = super().begin(weights)
            assert task is not None, "a place is free"
            return NotedTask(task.values)

    class NotedTask(_Task):
        def result(self):
            there.append(super().result())
            return there[-1]

    beside = train_here(job, beside=Noted(job))
    assert len(there) == 3 and None not in there, "the last epoch has no next one"
    assert without_times(beside.folder.history()) == without_times(plain.folder.history())
    assert (beside.selected_epoch, beside.num_epochs) == (plain.selected_epoch, plain.num_epochs)
    one, other = (load_pretrained(run.folder.model, resample_on_forward=False).state_dict() for run in (plain, beside))
    assert all(bool((one[name] == other[name]).all()) for name in one)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_sweep_finds_the_same_with_it(home, ray_cluster, tmp_path):
    found = []
    for name, extra in (("plain", ""), ("beside", "resources.validate_beside: true")):
        (tmp_path / name).mkdir()
        path = write_sweep(tmp_path / name, trials=3, epochs=4, extra=extra)
        own = home if name == "plain" else Home.locate(tmp_path / "another home")
        config = load_sweep(str(path), {"max_concurrent_trials": 1})
        summary = run_sweep(config, Workplace(own), evaluate=False)
        histories = {file.parent.name: without_times(RunFolder(file.parent).history()) for file in own.root.glob(f"runs/*/{STATE_FILE}")}
        found.append((summary["winner"], summary["best"], summary["stopped_early"], histories))
    assert found[0] == found[1]
