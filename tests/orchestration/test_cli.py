"""The command line as a user meets it: what works, what a mistake looks like, exit codes."""

from __future__ import annotations

import json

import pytest
import torch
import yaml

from models.weights import load_pretrained
from orchestration.cli import main

TINY = [
    "--data.image_size", "8", "--data.limit_train", "96", "--data.validation_size", "32", "--data.limit_test", "40",
    "--training.epochs", "2", "--training.batch_size", "32", "--training.attack.steps", "2", "--training.validation.steps", "2",
    "--training.precision", "fp32",
]  # fmt: skip


def run(capsys, *arguments):
    """Return (exit code, output, errors)."""
    code = main(list(arguments))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize("kind", ["defences", "backbones", "datasets", "objectives", "recipes", "sweeps", "suites"])
def test_list(kind, capsys):
    code, out, _ = run(capsys, "list", kind, "--json")
    assert code == 0
    entries = json.loads(out)
    assert entries
    assert all(entry["name"] and entry["description"] for entry in entries)


def test_show_tells_values_and_where_they_come_from(capsys):
    code, out, _ = run(capsys, "show", "ctrw_digits", "--training.epochs", "3")
    assert code == 0
    assert "training.epochs" in out
    assert "flag" in out
    code, out, _ = run(capsys, "show", "ctrw_digits", "--json")
    assert yaml.safe_load(out)["experiment"]["defence"]["name"] == "ctrw"


def test_help_of_a_recipe_lists_its_fields(capsys):
    code, out, _ = run(capsys, "train", "ctrw_digits", "--help")
    assert code == 0
    assert "--defence.lower_bound" in out
    assert "examples:" in out


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["trane", "x"], ["'trane'", "'train'"]),
        (["train"], ["needs a recipe"]),
        (["train", "ctrw_digit"], ["'ctrw_digits'"]),
        (["train", "ctrw_digits", "--threat_model.epsilon", "8"], ["8/255"]),
        (["train", "ctrw_digits", "--resources.gpus_per_worker", "1"], ["gpus_per_worker 0"]),
        (
            ["train", "ctrw_cifar10_resnet18", "--resources.gpus_per_worker", "0", "--data-root", "/nowhere"],
            ["cifar-10-batches-py", "nowhere"],
        ),
        (["sweep", "ctrw_bounds_digit"], ["'ctrw_bounds_digits'"]),
        (["sweep", "ctrw_bounds_digits", "--space.defence.lower_bound", "{type: float, low: -5, high: 10}"], ["-5"]),
        (["evaluate", "nothing-there"], ["nothing-there", "MLflow run id"]),
        (["evaluate", "0123456789abcdef"], ["no model"]),
        (["export", "0123456789abcdef"], ["--to"]),
        (["list", "defence"], ["defences"]),
        (["export", "x", "--to", "y", "--surprise"], ["--surprise"]),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(arguments, parts, capsys, home, monkeypatch):
    if torch.cuda.is_available() and "--resources.gpus_per_worker" in arguments:
        pytest.skip("this machine has the GPU that the test misses")
    arguments = [*arguments, "--home", str(home.root)] if arguments[0] not in ("trane",) else arguments
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert err.startswith("error: ")
    for part in parts:
        assert part in err
    assert "Traceback" not in err


def test_train_resume_reuse_evaluate_export(capsys, home, tmp_path, monkeypatch):
    """One model's whole way, as a user types it."""
    where = ["--home", str(home.root)]
    code, out, _ = run(capsys, "train", "ctrw_digits", *TINY, "--dry-run", "--json", *where)
    assert code == 0
    assert json.loads(out)["state"] == "new"
    code, out, _ = run(capsys, "train", "ctrw_digits", *TINY, "--json", *where)
    assert code == 0
    trained = json.loads(out)
    assert trained["reused"] is False
    code, out, _ = run(capsys, "train", "ctrw_digits", *TINY, "--json", *where)
    again = json.loads(out)
    assert again["reused"] is True
    assert {key: again[key] for key in ("mlflow_run", "metrics")} == {key: trained[key] for key in ("mlflow_run", "metrics")}

    code, out, _ = run(capsys, "evaluate", trained["mlflow_run"], "--samples", "20", "--draws", "6", "--json", *where)
    assert code == 0
    first = json.loads(out)
    assert {row["protocol"] for row in first["rows"]} >= {"T0", "T1", "T2"}
    assert [verdict["id"] for verdict in first["verdicts"]][:2] == ["C1", "C2"]
    code, out, _ = run(capsys, "evaluate", trained["fingerprint"], "--samples", "20", "--draws", "6", "--json", *where)
    assert json.loads(out)["rows"] == first["rows"], "a finished evaluation is reused, whatever names the model"

    folder = tmp_path / "exported"
    code, out, _ = run(capsys, "export", trained["fingerprint"], "--to", str(folder), "--register", "ctrw@champion", "--json", *where)
    assert code == 0
    assert json.loads(out)["registered"] == "models:/ctrw@champion"
    model = load_pretrained(folder)
    x = torch.rand(4, 1, 8, 8)
    with torch.no_grad():
        assert not torch.equal(model(x), model(x))
    card = (folder / "README.md").read_text()
    assert "load_pretrained" in card
    assert "T1" in card
    code, out, _ = run(capsys, "export", "models:/ctrw@champion", "--to", str(tmp_path / "again"), "--json", *where)
    assert code == 0
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_a_damaged_checkpoint_is_one_clear_message(capsys, home):
    where = ["--home", str(home.root)]
    code, out, _ = run(capsys, "show", "at_digits", *TINY, "--json")
    folder = home.run(json.loads(out)["fingerprint"])
    folder.mkdir(parents=True)
    (folder / "training.pt").write_bytes(b"half a file")
    code, _, err = run(capsys, "train", "at_digits", *TINY, *where)
    assert code == 2
    assert "training.pt" in err
    assert "Delete" in err


def test_a_full_disk_loses_nothing(capsys, home, monkeypatch):
    """The second epoch's checkpoint cannot be written; the same command goes on after the first."""
    import trainers.fit

    where = ["--home", str(home.root)]
    real, calls = trainers.fit.write_state, []

    def full(state, folder):
        calls.append(state["finished_epochs"])
        if state["finished_epochs"] == 2:
            raise OSError(28, "No space left on device", str(folder / "training.pt"))
        return real(state, folder)

    monkeypatch.setattr(trainers.fit, "write_state", full)
    code, _, err = run(capsys, "train", "at_digits", *TINY, *where)
    assert code == 3
    assert "No space left on device" in err
    assert "Traceback" not in err
    monkeypatch.setattr(trainers.fit, "write_state", real)
    code, out, _ = run(capsys, "train", "at_digits", *TINY, *where)
    assert code == 0
    assert "going on after epoch 1" in out
