"""Sweeps on a real Ray: one parent, its children, no duplicates, also after a kill -9 in the middle."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import optuna
import pytest
from mlflow.tracking import MlflowClient

from orchestration.home import Home, Workplace
from orchestration.sweeping.loading import load_sweep
from orchestration.sweeping.sweep import run_sweep
from orchestration.tracking.tracker import PARENT_TAG
from tests.orchestration.services import free_port
from tests.orchestration.sweep_process import SweepProcess, assert_whole_record

ROOT = Path(__file__).resolve().parents[2]
SWEEP = """
description: a few tiny trials
recipe: ctrw_digits
settings:
  data.image_size: 8
  data.limit_train: {train}
  data.validation_size: 32
  data.limit_test: 40
  training.epochs: {epochs}
  training.batch_size: 32
  training.attack.steps: 2
  training.validation.steps: 2
  training.precision: fp32
  {extra}
space:
  defence.lower_bound: {{type: float, low: 200, high: 2000, log: true}}
num_trials: {trials}
stopping: {{grace_epochs: 1, reduction_factor: 2, scheduler: {scheduler}}}
sampler: {sampler}
"""


def write_sweep(
    folder: Path, *, trials: int, epochs: int, train: int = 96, extra: str = "", scheduler: str = "asha", sampler: str = "tpe"
) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(SWEEP.format(trials=trials, epochs=epochs, train=train, extra=extra, scheduler=scheduler, sampler=sampler))
    return path


def runs_of(home: Home, kind: str):
    client = MlflowClient(tracking_uri=home.tracking_uri)
    experiment = client.get_experiment_by_name("rayndom")
    return client.search_runs([experiment.experiment_id], filter_string=f"tags.`rayndom.kind` = '{kind}'")


def assert_no_duplicates(home: Home, trials: int) -> None:
    """One parent; a child per trial, each epoch of each child logged once."""
    (parent,) = runs_of(home, "sweep")
    children = runs_of(home, "trial")
    assert len(children) == trials
    fingerprints = [child.data.tags["rayndom.fingerprint"] for child in children]
    assert len(set(fingerprints)) == trials
    client = MlflowClient(tracking_uri=home.tracking_uri)
    for child in children:
        assert child.data.tags[PARENT_TAG] == parent.info.run_id
        assert child.info.status == "FINISHED"
        steps = [metric.step for metric in client.get_metric_history(child.info.run_id, "train/loss")]
        assert steps == sorted(set(steps))
        assert steps[0] == 1


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_sweep_ends_with_a_winner_and_is_not_run_twice(home, ray_cluster, tmp_path):
    config = load_sweep(str(write_sweep(tmp_path, trials=3, epochs=2)))
    summary = run_sweep(config, Workplace(home), evaluate=False)
    assert summary["complete"]
    assert_no_duplicates(home, 3)
    assert (Path(summary["export"]) / "model.safetensors").is_file()
    study = optuna.load_study(study_name="tiny", storage=f"sqlite:///{summary['study']}")
    assert study.best_trial.number == summary["winner"]
    before = {path: path.stat().st_mtime_ns for path in home.root.glob("runs/*/training.pt")}
    again = run_sweep(config, Workplace(home), evaluate=False)
    assert again["winner"] == summary["winner"]
    assert_no_duplicates(home, 3)
    assert {path: path.stat().st_mtime_ns for path in home.root.glob("runs/*/training.pt")} == before


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize(("scheduler", "sampler"), [("asha", "tpe"), ("hyperband", "gp"), ("median", "qmc")])
def test_kill_minus_nine_in_the_middle_and_the_same_command_again(home, tmp_path, scheduler, sampler):
    path = write_sweep(tmp_path, trials=4, epochs=6, train=320, scheduler=scheduler, sampler=sampler)
    with SweepProcess(path, home, tmp_path / "first", ("--no-evaluation",)) as first:
        first.wait_until(lambda text: "epoch 3/6" in text, 900, "the third epoch of a trial")
        first.process.kill()
        first.process.wait()
    finished_before = {path.parent.name for path in home.root.glob("runs/*/training.pt")}
    assert finished_before
    with SweepProcess(path, home, tmp_path / "second", ("--no-evaluation",)) as second:
        assert second.wait(1200) == 0, second.text
    assert finished_before <= {path.parent.name for path in home.root.glob("runs/*/training.pt")}
    assert_no_duplicates(home, 4)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_trials_with_two_workers_that_are_stopped_early_free_their_cores(home, tmp_path):
    path = write_sweep(tmp_path, trials=4, epochs=4, train=640, extra="resources.workers: 2")
    text = path.read_text()
    rate = "training.optimizer.learning_rate"  # after the first, trials do not learn at all
    space = f"space:\n  {rate}: {{type: choice, choices: [0.1, 1.0e-7, 2.0e-7, 3.0e-7]}}\n"
    points = "".join(f"  - {{{rate}: {value}}}\n" for value in ("0.1", "1.0e-7", "2.0e-7", "3.0e-7"))
    path.write_text(f"{text[: text.index('space:')]}{space}points:\n{points}{text[text.index('num_trials') :]}")
    command = [sys.executable, "-m", "orchestration.cli", "sweep", str(path), "--no-evaluation", "--home", str(home.root)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=800, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "1 at a time" in ended.stdout
    stopped = re.search(r"trial (\d+): stopped at", ended.stdout)
    assert stopped, "a trial was stopped early"
    assert re.search(r"trial \d+: epoch", ended.stdout[stopped.end() :]), "the next one got its cores"
    assert_no_duplicates(home, 4)


GOALS = """
description: every goal that a sweep can have
recipe: rna_digits
settings:
  data.image_size: 8
  data.limit_train: 160
  data.validation_size: 32
  data.limit_test: 40
  training.epochs: 4
  training.batch_size: 32
  training.attack.steps: 1
  training.validation.steps: 1
  training.validation.num_draws: 1
space:
  training.optimizer.learning_rate: {type: float, low: 0.02, high: 0.3, log: true}
  defence.choice: {type: choice, choices: [per_layer, per_network]}
objectives: [{metric: validation/robust_accuracy/T1}, {metric: model/latency_ms, mode: min}]
constraints: [{metric: model/parameters, at_most: 1000000}, {metric: validation/clean_accuracy, at_least: 0.0}]
measure: {num_examples: 8, num_draws: 2}
num_trials: 8
stopping: {grace_epochs: 2, reduction_factor: 4}
repeats: {top: 2, seeds: [1]}
baselines: [at_digits]
num_test_examples: 8
"""


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_goal_of_a_sweep_is_reached_shown_and_kept(home, ray_cluster, tmp_path, capsys):
    path = tmp_path / "goals.yaml"
    path.write_text(GOALS)
    summary = run_sweep(load_sweep(str(path)), Workplace(home))
    shown = capsys.readouterr().out
    for words in ("Pareto front", "importance", "Spearman", "best trials over training seeds", "wins on validation images"):
        assert words in shown
    client = MlflowClient(tracking_uri=home.tracking_uri)
    (parent,) = runs_of(home, "sweep")
    found = json.loads(Path(client.download_artifacts(parent.info.run_id, "search.json")).read_text())
    assert found["front"]
    assert set(found["importances"]) == {"validation/robust_accuracy/T1", "model/latency_ms"}
    assert {each["epoch"] for each in found["proxy"]} <= {2, 4}
    assert len(found["proxy"]) >= 1
    assert parent.data.tags["rayndom.selected_on"] == "validation"
    repeats, (baseline,) = runs_of(home, "repeat"), runs_of(home, "baseline")
    assert len(repeats) == 2
    assert {run.info.status for run in (parent, baseline, *repeats)} == {"FINISHED"}
    assert any(name.endswith("/standard_deviation") for name in parent.data.metrics)
    assert set(summary["evaluation"]) == {"at_digits", "rna_digits (winner)"}
    kept = {file.name for file in (Path(summary["export"]) / "search").iterdir()}
    assert {"search.json", "pareto_front.png", "importances.png", "history.png", "parallel_coordinates.png"} <= kept


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("workers", [1, 2])
def test_two_sweeps_at_once_in_one_cluster_and_one_home_both_end(home, tmp_path, workers):
    """Each asks for all of the cluster; with groups of two workers neither may hold one place and wait for the other."""
    from ray.cluster_utils import Cluster

    extra = f"resources.workers: {workers}" if workers > 1 else ""
    paths = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        path = write_sweep(tmp_path / name, trials=3, epochs=3, train=160, extra=extra, sampler="random")
        paths.append(path.rename(path.with_name(f"{name}.yaml")))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": True, "dashboard_port": free_port()})
    try:
        flags = ("--no-evaluation", "--address", cluster.address)
        with SweepProcess(paths[0], home, tmp_path / "1", flags) as one, SweepProcess(paths[1], home, tmp_path / "2", flags) as two:
            assert one.wait(1500) == 0, one.text
            assert two.wait(1500) == 0, two.text
    finally:
        cluster.shutdown()
    assert sorted(run.data.tags["rayndom.sweep"].partition("-")[0] for run in runs_of(home, "sweep")) == ["one", "two"]
    assert len(runs_of(home, "trial")) == 6
    assert all(run.info.status == "FINISHED" for kind in ("sweep", "trial") for run in runs_of(home, kind))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("workers", [1, 2])
def test_a_paused_trial_goes_on_where_it_was(home, tmp_path, workers):
    """The second trial comes to the first rung behind the first one, and is among the best half once worse ones have come there."""
    path = write_sweep(tmp_path, trials=5, epochs=4, train=320, extra=f"resources.workers: {workers}")
    rate, values = "training.optimizer.learning_rate", (0.1, 0.003, 1e-7, 2e-7, 3e-7)
    text = path.read_text()
    space = f"space:\n  {rate}: {{type: choice, choices: {list(values)}}}\npoints:\n" + "".join(
        f"  - {{{rate}: {value}}}\n" for value in values
    )
    path.write_text(f"{text[: text.index('space:')]}{space}{text[text.index('num_trials') :]}")
    with SweepProcess(path, home, tmp_path / "log", ("--no-evaluation", "--max_concurrent_trials", "1", "--max_state_gib", "1")) as sweep:
        assert sweep.wait(2000) == 0, sweep.text
    assert re.search(r"trial 1: stopped at 1", sweep.text), sweep.text
    again = re.search(r"trial (\d+): started, goes on with what trial 1 came to", sweep.text)
    assert again, sweep.text
    assert re.search(rf"trial {again[1]}: epoch 2/4", sweep.text), "and trains on"
    assert "5/5 trials over" in sweep.text and "6/5" not in sweep.text
    assert_whole_record(home, "tiny", 5)
    (trial,) = (run for run in runs_of(home, "trial") if run.data.params.get(rate) == "0.003")
    assert trial.info.run_name.startswith("trial 1:"), "one run, from the first epoch on"
