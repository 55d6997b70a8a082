"""`rayndom evaluate` killed twice and started again: the records are those of an undisturbed run, on any number of workers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from analysis.evaluation.records import comparable, read_records
from analysis.fingerprints import weights_hash
from models.weights import load_pretrained
from orchestration.cli import main
from orchestration.home import Home
from orchestration.run_folder import RunFolder

ROOT = Path(__file__).resolve().parents[2]
SUITE = """
description: many short blocks
scoring: {num_selection_draws: 2, num_evaluation_draws: 6, num_known_draws: 2, num_averaged_groups: 2, num_averaged_draws: 2}
studies: {names: [steps, progress, unit_test], num_samples: 20, steps: 5, num_draws: 2, max_steps: 10, num_tested: 8}
attacks:
  - {name: fgsm, attack: fgsm, protocols: [T1], num_draws: 2}
  - {name: pgd_5, attack: pgd, parameters: {steps: 5}, protocols: [T0, T1, T2, T4], num_draws: 2}
  - {name: apgd_5, attack: apgd_ce, parameters: {steps: 5}, protocols: [T1, T2, T3], num_draws: 2}
  - {name: arc_2, attack: arc, parameters: {rounds: 2, num_boundaries: 1}, protocols: [T1], num_draws: 2}
  - {name: square, attack: square, parameters: {num_queries: 30}, protocols: [T1], num_draws: 2}
  - {name: cw, attack: torchattacks_cw, parameters: {steps: 5}, protocols: [T0]}
"""
TRAINING = [
    "--data.image_size", "8", "--data.limit_train", "64", "--data.validation_size", "32", "--data.limit_test", "60",
    "--training.epochs", "1", "--training.batch_size", "32", "--training.attack.steps", "1", "--training.validation.steps", "1",
    "--training.precision", "fp32", "--resources.cpus_per_worker", "1",
]  # fmt: skip


def keys_in(path: Path) -> list[str]:
    """Return the keys of the whole lines of a file of records, repeated ones too."""
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    return [json.loads(line)["key"] for line in lines if line.startswith("{") and line.endswith("}")]


def kill_when(command: list[str], path: Path, count: int) -> None:
    """Start the command and kill it, with nothing told to it, once the file has `count` records."""
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=os.environ.copy())
    deadline = time.monotonic() + 900
    while len(keys_in(path)) < count:
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline, f"no {count} records in fifteen minutes"
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_an_evaluation_that_is_killed_twice_ends_with_the_records_of_one_that_was_not(home, tmp_path):
    assert main(["train", "ctrw_digits", *TRAINING, "--home", str(home.root)]) == 0
    (folder,) = (home.root / "runs").iterdir()
    model = RunFolder(folder).model
    suite = tmp_path / "short.yaml"
    suite.write_text(SUITE)
    command = [sys.executable, "-m", "orchestration.cli", "evaluate", str(model), "--suite", str(suite), "--samples", "40", "--json"]
    checkpoint = weights_hash(load_pretrained(model, resample_on_forward=False))[:16]

    undisturbed = Home.locate(tmp_path / "undisturbed")
    whole = subprocess.run([*command, "--home", str(undisturbed.root)], cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert whole.returncode == 0, whole.stderr
    expected = read_records(undisturbed.evaluation(checkpoint) / "records.jsonl")
    assert len(expected) >= 14

    disturbed = Home.locate(tmp_path / "disturbed")
    on_two = [*command, "--home", str(disturbed.root), "--workers", "2"]
    path = disturbed.evaluation(checkpoint) / "records.jsonl"
    kill_when(on_two, path, 2)
    first = path.read_bytes()
    with path.open("ab") as file:
        file.write(b'{"key":"half of a li')  # what a kill in the middle of a write leaves
    done = len(keys_in(path))
    assert done < len(expected)
    kill_when(on_two, path, done + 3)
    second = path.read_bytes()
    assert second.startswith(first), "what is finished is never touched again"
    assert len(keys_in(path)) < len(expected)
    last = subprocess.run(on_two, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert last.returncode == 0, last.stderr
    assert path.read_bytes().startswith(second)

    keys = keys_in(path)
    assert len(keys) == len(set(keys)), "no block ran twice"
    found = read_records(path)
    assert set(found) == set(expected)
    for key, record in expected.items():
        assert comparable(found[key]) == comparable(record), record["header"]
    # Everything that is computed from the records is the same as well; only seconds differ.
    rows = [[{k: v for k, v in row.items() if k != "seconds"} for row in json.loads(run.stdout)["rows"]] for run in (whole, last)]
    assert rows[0] == rows[1]
    assert json.loads(whole.stdout)["verdicts"] == json.loads(last.stdout)["verdicts"]
