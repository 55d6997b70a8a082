"""A home folder that an earlier commit left is listed, gone on with, evaluated, compared and exported by today's code.

`earlier_homes/make_home.py` made it, and says what it holds.
"""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
import torch

from models.weights import load_pretrained
from orchestration.cli import main
from orchestration.home import Home
from orchestration.sweeping.config import sweep_key
from orchestration.sweeping.loading import load_sweep
from tests.orchestration.earlier_homes.contents import TINY
from tests.orchestration.sweep_process import runs_of
from trainers.checkpoint import read_state

ARCHIVE = Path(__file__).parent / "earlier_homes" / "home_of_a0107eb.tar.xz"
FINISHED, INTERRUPTED = "at_digits", "rna_digits"


@pytest.fixture
def earlier(tmp_path, monkeypatch):
    """A copy of the home, elsewhere than it was made."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with tarfile.open(ARCHIVE) as packed:
        packed.extractall(tmp_path, filter="data")
    return Home.locate(tmp_path / "home")


def rayndom(home, *words):
    assert main([*words, "--home", str(home.root)]) == 0


def train(home, recipe, epochs):
    fields = [word for name, value in TINY.items() for word in (f"--{name}", value)]
    rayndom(home, "train", recipe, "--training.epochs", str(epochs), *fields)


def folder_of(home, *lines):
    """Return the run folder whose configuration has these lines."""
    (folder,) = [path.parent for path in home.root.glob("runs/*/config.yaml") if {*lines} <= {*path.read_text().splitlines()}]
    return folder


def files(folder):
    """Return the content of a folder, without the locks, which say who held them last."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file() and "lock" not in path.name}


def test_its_sweep_is_listed_with_every_trial(earlier, capsys):
    rayndom(earlier, "status", "--json")
    (sweep,) = json.loads(capsys.readouterr().out)
    assert (sweep["done"], sweep["wanted"], len(sweep["best"])) == (2, 2, 1)
    assert [trial["state"] for trial in sweep["trials"]] == ["finished", "finished"]
    assert all(trial["epoch"] == 1 and 0 <= trial["robust"] <= 1 for trial in sweep["trials"])
    assert sweep["sweep"] == sweep_key(load_sweep(str(earlier.root / "tiny.yaml"))), "the same command goes on with it"


def test_a_finished_run_is_not_trained_again(earlier, capsys):
    before = {path.name: files(path) for path in earlier.root.glob("runs/*")}
    known = {run.info.run_id: run.data.metrics for run in runs_of(earlier, "run")}
    train(earlier, FINISHED, 1)
    assert f"{FINISHED} was already trained" in capsys.readouterr().out
    assert {path.name: files(path) for path in earlier.root.glob("runs/*")} == before
    assert {run.info.run_id: run.data.metrics for run in runs_of(earlier, "run")} == known


def test_an_interrupted_run_goes_on_after_its_last_epoch(earlier, capsys):
    folder = folder_of(earlier, f"name: {INTERRUPTED}")
    (first,) = read_state(folder)["history"]
    train(earlier, INTERRUPTED, 2)
    out = capsys.readouterr().out
    assert "going on after epoch 1" in out
    assert f"{INTERRUPTED} trained in" in out
    history = json.loads((folder / "result.json").read_text())["history"]
    assert len(history) == 2
    assert history[0] == first
    assert torch.isfinite(load_pretrained(folder / "model")(torch.rand(2, 1, 16, 16))).all()
    (run,) = [run for run in runs_of(earlier, "run") if run.data.tags["rayndom.fingerprint"] == folder.name]
    assert run.info.status == "FINISHED"


def measurements(text: bytes) -> dict:
    """Return what was measured, by attack, protocol and block; lines of one block must say the same, whatever key they have."""
    found: dict = {}
    for line in text.splitlines():
        record = json.loads(line)
        block = json.dumps(record["block"], sort_keys=True)
        assert found.setdefault(block, record["samples"]) == record["samples"]
    return found


def check_taken_over(records: dict) -> None:
    """Each earlier line stands there as it did; under the key of today the same was measured. Attacks that suites gained are new."""
    for path, text in records.items():
        assert path.read_bytes().startswith(text)
        assert measurements(text).items() <= measurements(path.read_bytes()).items()


def test_records_of_its_evaluation_are_reused(earlier, capsys):
    records = {path: path.read_bytes() for path in earlier.root.glob("evaluations/*/records.jsonl")}
    headlines = {path: json.loads(path.read_text())["headline"] for path in earlier.root.glob("evaluations/*/result-quick.json")}
    assert len(records) == len(headlines) == 2
    folder = folder_of(earlier, f"name: {FINISHED}", "    weight_decay: 0.0005")
    rayndom(earlier, "evaluate", folder.name, "--suite", "quick", "--samples", "10", "--workers", "1")
    assert "blocks are done already" in capsys.readouterr().out
    check_taken_over(records)
    after = {path: json.loads(path.read_text())["headline"] for path in headlines}
    assert {path: found["accuracy"] for path, found in after.items()} == {path: found["accuracy"] for path, found in headlines.items()}


def test_its_models_are_exported_and_compared(earlier, tmp_path, capsys):
    fingerprints = [path.parent.name for path in sorted(earlier.root.glob("runs/*/result.json"))]
    for fingerprint in fingerprints:
        rayndom(earlier, "export", fingerprint, "--to", str(tmp_path / fingerprint))
        assert torch.isfinite(load_pretrained(tmp_path / fingerprint)(torch.rand(2, 1, 16, 16))).all()
    capsys.readouterr()
    rayndom(earlier, "compare", *fingerprints, "--json")
    compared = json.loads(capsys.readouterr().out)
    assert compared["parameters"], "they differ in what the sweep searched"
    assert len(compared["runs"]) == len(fingerprints) == 2


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_its_sweep_ends_at_once_with_the_same_winner(earlier, ray_cluster, capsys):
    summary = json.loads((earlier.root / "exports/tiny/search/search.json").read_text())
    trained = {path: path.read_bytes() for path in earlier.root.glob("runs/*/result.json")}
    records = {path: path.read_bytes() for path in earlier.root.glob("evaluations/*/records.jsonl")}
    rayndom(earlier, "sweep", str(earlier.root / "tiny.yaml"))
    out = capsys.readouterr().out
    assert "2 already over" in out
    assert "epoch 1/1" not in out
    assert {path: path.read_bytes() for path in earlier.root.glob("runs/*/result.json")} == trained
    check_taken_over(records)
    again = json.loads((earlier.root / "exports/tiny/search/search.json").read_text())
    assert again["front"] == summary["front"]
