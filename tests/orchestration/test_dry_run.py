"""A dry run promises what the run itself then takes: with its threads, its share of the batch and its validations."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from orchestration.cli import main
from orchestration.home import Workplace
from orchestration.recipes import load_recipe
from orchestration.tracking.tracker import Tracker
from orchestration.training.dry_run import dry_run, two_digits

SMALL = {
    "data.limit_train": 96,
    "training.batch_size": 32,
    "training.epochs": 3,
    "training.validation.every": 2,
    "training.validation.num_examples": 32,
}


@pytest.fixture(autouse=True)
def same_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def flags(fields):
    return [part for name, value in fields.items() for part in (f"--{name}", str(value))]


def small(**fields):
    return load_recipe("ctrw_digits", flags(SMALL | {name.replace("__", "."): value for name, value in fields.items()})).experiment


@pytest.mark.parametrize(
    ("fields", "threads", "workers"),
    [({}, 1, 1), ({"resources__cpus_per_worker": 2}, 2, 1), ({"resources__workers": 2}, 1, 2)],
)
def test_it_computes_as_the_run_would(home, monkeypatch, fields, threads, workers):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    seen = []

    def step(self, model, x_BCHW, y_B, context):
        seen.append((len(x_BCHW), torch.get_num_threads(), context.epoch))
        return {"loss": model(x_BCHW).logsumexp(1).mean()}

    monkeypatch.setattr("trainers.objectives.adversarial.Adversarial.training_step", step)
    report = dry_run(small(**fields), Workplace(home))
    assert {rows for rows, _, _ in seen} == {32 // workers}
    assert {used for _, used, _ in seen} == {threads} == {report.threads}
    assert {epoch for _, _, epoch in seen[1:]} == {1}  # the middle of three
    assert (report.steps_per_epoch, report.number_of_validations, report.workers) == (3, 2, workers)
    assert report.total_seconds == pytest.approx(9 * report.step_seconds + 2 * report.validation_seconds)
    assert not home.run(report.fingerprint).exists()


def test_its_json_has_names_and_numbers(home, capsys):
    assert main(["train", "ctrw_digits", "--dry-run", "--json", *flags(SMALL), "--home", str(home.root)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert all(name.isidentifier() for name in report)
    assert report["images_per_second"] == pytest.approx(32 / report["step_seconds"])
    assert report["num_parameters"] > 10_000 and report["state"] == "new"


def test_a_batch_that_the_data_does_not_have_is_refused(home, capsys):
    assert main(["train", "ctrw_digits", "--dry-run", "--data.limit_train", "20", "--home", str(home.root)]) == 2
    assert "larger than the training set" in capsys.readouterr().err


@pytest.mark.parametrize(("value", "text"), [(0.0312, "0.031"), (1.23, "1.2"), (9.96, "10"), (480.4, "480")])
def test_two_digits(value, text):
    assert two_digits(value) == text


@pytest.mark.parametrize("package", ["models", "trainers", "analysis", "orchestration"])
def test_threads_do_not_spin_for_long_unless_the_user_says_so(package):
    ours = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    program = f"import os, sys, {package}; assert 'torch' not in sys.modules; print(os.environ.get('GOMP_SPINCOUNT'))"
    for environment, expected in (({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None")):
        output = subprocess.run([sys.executable, "-c", program], env=ours | environment, capture_output=True, text=True, check=True)
        assert output.stdout.strip() == expected


def test_a_profile_says_where_the_time_of_a_step_goes_and_trains_nothing(home, capsys):
    assert main(["train", "ctrw_digits", "--profile", "1", "--json", *flags(SMALL), "--home", str(home.root)]) == 0
    said = json.loads(capsys.readouterr().out)
    folder = home.profile(small().fingerprint)
    assert said["folder"] == str(folder) and json.loads((folder / "trace.json").read_text())["traceEvents"]
    assert said["system/step/draws_seconds"] > 0 and said["system/step/attack_seconds"] > 0
    logged = Tracker(home, "rayndom").client.get_run(said["mlflow_run"]).data
    assert logged.metrics["system/step/share_of_peak"] == pytest.approx(said["system/step/share_of_peak"])
    assert not home.run(small().fingerprint).exists()
    assert Tracker(home, "rayndom").find_run(small().fingerprint) is None, "a profile is not the run that trained it"
