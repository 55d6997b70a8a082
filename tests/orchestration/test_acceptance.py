"""A sweep as a team would run it, in small: two defences, two objectives, Fashion-MNIST; killed three times in different ways.

make test-slow ARGS="tests/orchestration/test_acceptance.py -s"
"""

from __future__ import annotations

import json
import re
import signal
import time
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from models.errors import UserError
from models.weights import load_pretrained
from orchestration.home import Home
from orchestration.sweeping.study import spent
from tests.orchestration.sweep_process import SweepProcess, assert_whole_record, runs_of, study_of
from trainers.data.location import data_root, locate
from trainers.data.sets import DATASETS

TRIALS = 16
SWEEP = f"""
description: two defences, two objectives
recipes: [ctrw_fashion_mnist, rna_fashion_mnist]
settings:
  data.image_size: 16
  data.limit_train: 2100
  data.validation_size: 100
  data.limit_test: 100
  training.epochs: 2
  training.attack.steps: 2
  training.validation.steps: 2
  training.validation.num_draws: 2
space:
  ctrw_fashion_mnist:
    defence.lower_bound: {{type: float, low: 200, high: 2000, log: true}}
  rna_fashion_mnist:
    defence.pool: {{type: choice, choices: [[bn, in], [gn_groups_8, bgn_groups_8]]}}
  training.optimizer.learning_rate: {{type: float, low: 0.02, high: 0.3, log: true}}
objectives: [{{metric: validation/clean_accuracy}}, {{metric: validation/robust_accuracy/T1}}]
measure: {{num_examples: 20, num_draws: 5}}
num_trials: {TRIALS}
stopping: {{grace_epochs: 1, reduction_factor: 2}}
num_test_examples: 20
"""


def fashion_mnist_is_here() -> bool:
    try:
        locate(DATASETS["fashion_mnist"], data_root(None))
    except UserError:
        return False
    return True


def trials_over(text: str) -> int:
    return max((int(number) for number in re.findall(r"(\d+)/16 trials over", text)), default=0)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not fashion_mnist_is_here(), reason="Fashion-MNIST is not here: `rayndom doctor` says where it is looked for")
def test_a_sweep_over_two_defences_killed_three_times_ends_whole(home, tmp_path, capsys):
    sweep = tmp_path / "acceptance.yaml"
    sweep.write_text(SWEEP)
    began = time.monotonic()
    notes = []

    with SweepProcess(sweep, home, tmp_path / "1.log") as first:
        first.wait_until(lambda text: trials_over(text) >= 3 and "epoch 1/2" in text.splitlines()[-1], 600, "three trials over")
        first.signal(signal.SIGKILL)
        first.wait(10)
        notes.append(f"driver killed with SIGKILL after {trials_over(first.text)} trials")
        finished = {path.parent.name for path in home.root.glob("runs/*/result.json")}

        with SweepProcess(sweep, home, tmp_path / "2.log") as second:
            second.wait_until(lambda text: trials_over(text) >= 6 and "epoch 1/2" in text.splitlines()[-1], 600, "six trials over")
            before = trials_over(second.text)
            second.kill_one("ray::ImplicitFunc")
            second.wait_until(lambda text: trials_over(text) >= before + 2, 600, "two more trials over after a worker was killed")
            notes.append(f"a trial's worker killed with SIGKILL after {before} trials; the sweep went on by itself")
            second.kill_one("raylet")
            assert second.wait(300) != 0
            notes.append(f"Ray's node daemon killed after {trials_over(second.text)} trials")
            assert "not finished; go on with:  rayndom sweep" in second.text
            assert first.left_over(60) == [], "Ray's processes go away with their driver"

            with SweepProcess(sweep, home, tmp_path / "3.log") as third:
                code = third.wait(1800)
                assert code == 0, third.text
                assert second.left_over(60) == []

    seconds = time.monotonic() - began
    assert finished <= {path.parent.name for path in home.root.glob("runs/*/result.json")}
    figures = assert_sweep_is_whole(home, third.text)
    with capsys.disabled():
        lines = [f"{seconds:.0f} s in all", *notes, ", ".join(f"{name}: {value}" for name, value in figures.items())]
        print("\n" + "\n".join(lines))


def assert_sweep_is_whole(home: Home, shown: str) -> dict[str, int]:
    """Check study, MLflow, screen and export of the sweep that was killed; return figures."""
    figures = assert_whole_record(home, "acceptance", TRIALS)
    study = study_of(home, "acceptance")
    assert spent(study) == TRIALS
    recipes = {trial.user_attrs["values"]["recipe"] for trial in study.trials if "values" in trial.user_attrs}
    assert recipes == {"ctrw_fashion_mnist", "rna_fashion_mnist"}

    # What the search found: on the screen, in MLflow, and as a folder.
    (parent,) = runs_of(home, "sweep")
    client = MlflowClient(tracking_uri=home.tracking_uri)
    found = json.loads(Path(client.download_artifacts(parent.info.run_id, "search.json")).read_text())
    assert {each["trial"] for each in found["front"]} == {trial.number for trial in study.best_trials}
    assert set(found["importances"]) == {"validation/clean_accuracy", "validation/robust_accuracy/T1"}
    assert "training.optimizer.learning_rate" in found["importances"]["validation/clean_accuracy"]
    plots = {item.path for item in client.list_artifacts(parent.info.run_id, "plots")}
    assert {"plots/pareto_front.png", "plots/importances.png", "plots/history.png", "plots/parallel_coordinates.png"} <= plots
    assert "Pareto front" in shown
    winner = int(parent.data.tags["rayndom.winner"])
    assert winner in {each["trial"] for each in found["front"]}
    exported = home.root / "exports" / "acceptance"
    assert json.loads((exported / "search" / "search.json").read_text())["front"] == found["front"]
    assert (exported / "search" / "pareto_front.png").is_file()
    model = load_pretrained(exported)
    assert sum(parameter.numel() for parameter in model.parameters()) > 0
    assert {"winner/model.safetensors", "winner/config.json"} <= {item.path for item in client.list_artifacts(parent.info.run_id, "winner")}
    return figures
