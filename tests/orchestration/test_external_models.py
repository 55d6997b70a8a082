"""`rayndom evaluate` on models that Rayndom did not train: records, resumption and comparisons as for its own; what it refuses."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from analysis.evaluation.records import read_records
from analysis.reporting.report import write_report
from models import build_model
from models.external.source import external_model
from models.weights import save_pretrained
from orchestration.cli import main
from orchestration.evaluating import evaluation_report
from orchestration.home import Home
from orchestration.trained_models.external import EXTERNAL_FILE
from trainers.data import DataConfig, evaluation_batches, load_data

CODE = """
import torch
from torch import nn

from models.forward_randomness import as_random_model


class Net(nn.Module):
    def __init__(self, outputs=10, noise=0.0):
        super().__init__()
        self.noise = noise
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, outputs))

    def forward(self, x):
        print("forward")
        return self.body(x + self.noise * torch.randn_like(x) if self.noise else x)


def build():
    return Net()


def noisy():
    return Net(noise=0.2)


def random():
    return as_random_model(noisy())


def five():
    return Net(outputs=5)


def zeros():
    network = Net()
    nn.init.zeros_(network.body[1].weight), nn.init.zeros_(network.body[1].bias)
    return network


class Fails(Net):
    def forward(self, x):
        raise RuntimeError("not today")


class Words(Net):
    def forward(self, x):
        return "seven"
"""
SUITE = """
description: two short attacks
scoring: {num_selection_draws: 2, num_evaluation_draws: 6, num_known_draws: 2, num_averaged_groups: 2, num_averaged_draws: 2}
attacks:
  - {name: fgsm, attack: fgsm, protocols: [T1], num_draws: 2}
  - {name: pgd_5, attack: pgd, parameters: {steps: 5}, protocols: [T0, T1, T2], num_draws: 2}
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with code, weights of a linear network trained on digits, and a suite."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "my_model.py").write_text(CODE)
    (folder / "short.yaml").write_text(SUITE)
    torch.manual_seed(0)
    network = external_model(str(folder / "my_model.py") + ":build").load()
    ((x, y),) = evaluation_batches(load_data(DataConfig(name="digits")).train, 5000)
    optimizer = torch.optim.Adam(network.parameters(), 0.03)
    for _ in range(60):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(x), y).backward()
        optimizer.step()
    save_file(network.state_dict(), folder / "w.safetensors")
    torch.save({"state_dict": {f"module.{name}": value for name, value in network.state_dict().items()}}, folder / "w.pt")
    five = external_model(str(folder / "my_model.py") + ":five").load()
    torch.save(five.state_dict(), folder / "five.pt")
    return folder


@pytest.fixture
def place(trained, tmp_path, monkeypatch):
    """The trained folder's copy, in which the test is, and a home. No pages are drawn: one test is about them."""
    monkeypatch.setattr(evaluation_report, "write_report", lambda *_, **__: None)
    shutil.copytree(trained, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return Home.locate(tmp_path / "home")


def rayndom(home, *arguments):
    return main([*arguments, "--home", str(home.root)])


def evaluate(home, *arguments, **flags):
    common = {"data": "digits", "epsilon": "0.1", "suite": "short.yaml", "samples": "40"} | flags
    return rayndom(
        home, "evaluate", *arguments, *(part for name, value in common.items() for part in (f"--{name.replace('_', '-')}", value))
    )


def folder_of(home, name):
    (folder,) = home.root.glob(f"external/{name}-*")
    return folder


def test_it_is_evaluated_resumed_and_kept_under_a_name_of_its_own(place, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(evaluation_report, "write_report", write_report)
        assert evaluate(place, "my_model.py:build", "--weights", "w.safetensors", "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["finished"] and not summary["marked"]
    accuracies = {row["attack"]: row["accuracy"] for row in summary["rows"]}
    assert accuracies["clean"] > 0.8 and accuracies["pgd_5"] < accuracies["clean"]
    folder = folder_of(place, "my_model.build")
    assert (folder / "report-short" / "report.html").is_file()
    records = (folder / "records.jsonl").read_bytes()
    assert json.loads((folder / EXTERNAL_FILE).read_text())["data"]["name"] == "digits"

    # The same weights from another file, with DataParallel's prefix, and by the name that it has now: nothing is measured twice.
    assert evaluate(place, "my_model.py:build", "--weights", "w.pt") == 0
    assert rayndom(place, "evaluate", folder.name, "--epsilon", "0.1", "--suite", "short.yaml", "--samples", "40") == 0
    assert (folder / "records.jsonl").read_bytes() == records
    lines = records.splitlines(keepends=True)
    (folder / "records.jsonl").write_bytes(b"".join(lines[:2]))
    assert evaluate(place, "my_model.py:build", "--weights", "w.pt") == 0
    assert read_records(folder / "records.jsonl").keys() == {json.loads(line)["key"] for line in lines}

    # Other code is another model; what was found of the earlier one can still be compared.
    with open("my_model.py", "a") as file:
        file.write("\n# changed\n")
    capsys.readouterr()
    assert rayndom(place, "evaluate", folder.name, "--epsilon", "0.1") == 2
    assert "has changed since it was evaluated" in capsys.readouterr().err
    assert rayndom(place, "compare", "my_model.py:build", "my_model.py:noisy") == 2
    assert f"name what it was ({folder.name})" in capsys.readouterr().err
    assert evaluate(place, "my_model.py:build", "--weights", "w.pt", "--dry-run") == 0
    assert "of which 0 are done already" in capsys.readouterr().out
    assert len(list(place.root.glob("external/*"))) == 1  # a dry run writes nothing


def test_points_are_kept_and_scored_again(place, capsys):
    assert evaluate(place, "my_model.py:random", "--weights", "w.pt", "--keep-points") == 0
    assert rayndom(place, "rescore", "my_model.py:random", "--draws", "12") == 0
    assert evaluate(place, "my_model.py:build", "--weights", "w.pt") == 0
    assert rayndom(place, "rescore", "my_model.py:random", "--model", "my_model.py:build") == 0
    assert "scored on my_model.build" in capsys.readouterr().out


def test_images_are_added_until_the_interval_is_narrow(place, capsys):
    assert evaluate(place, "my_model.py:build", "--weights", "w.pt", "--until", "30", samples="100") == 0
    assert "narrow enough" in capsys.readouterr().out
    assert (folder_of(place, "my_model.build") / EXTERNAL_FILE).is_file()


def test_randomness_in_forward_is_found_and_the_adapter_mends_it(place, capsys):
    assert evaluate(place, "my_model.py:noisy", "--weights", "w.pt", "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    failed = {verdict["id"]: verdict for verdict in summary["verdicts"] if verdict["verdict"] == "FAIL"}
    assert summary["marked"] and "as_random_model" in failed["C1"]["advice"]
    assert evaluate(place, "my_model.py:random", "--weights", "w.pt", "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    assert not summary["marked"]
    accuracies = {row["protocol"]: row["accuracy"] for row in summary["rows"] if row["attack"] == "pgd_5"}
    assert accuracies["T2"] <= accuracies["T1"] + 0.1

    random = folder_of(place, "my_model.random").name
    Path("w.pt").unlink()
    assert rayndom(place, "compare", "my_model.py:noisy", random, "--json") == 0  # nothing of them is executed or read
    compared = json.loads(capsys.readouterr().out)
    assert len(compared["pairs"]) == 1
    assert any("of its parameters no more is known" in note for note in compared["notes"])
    assert any("do not quote these numbers" in note for note in compared["notes"])
    for command in (
        ["analyse", "my_model.py:random"],
        ["export", "my_model.py:random", "--to", "exported"],
        ["analyse", "timm:x", "--what", "list"],
    ):
        assert rayndom(place, *command) == 2
        assert "Rayndom did not build" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["my_model.py:build"], "gives other weights at each call"),
        (["my_model.py:five", "--weights", "five.pt"], "returns 5 logits, digits has 10 classes|model has 5 classes"),
        (["my_model.py:five", "--weights", "w.pt"], "other shapes"),
        (["my_model.py:build", "--weights", "w.pt", "--image-size", "16"], r"cannot be run on images of shape \(1, 16, 16\)"),
        (["my_model.py:build", "--weights", "w.pt", "--image-size", "1"], "--image-size"),
        (["my_model.py:build", "--weights", "w.pt", "--data-folder", "x"], "--data-folder"),
        (["my_model.py:build", "--weights", "w.pt", "--data", "digit"], "Did you mean 'digits'"),
        (["my_model.py:build", "--weights", "w.pt", "--suite", "paper"], "paper"),
        (["my_model.py:build", "--weights", "w.pt", "--epsilon", "8"], "8/255"),
        (["my_model.py:Fails", "--weights", "w.pt"], "not today"),
        (["my_model.py:Words", "--weights", "w.pt"], "must return logits"),
        (["my_model.py:none", "--weights", "w.pt"], "unknown callable"),
        (["natural_digits", "--weights", "w.pt"], "--weights is for a model of your own"),
        (["my_model.py:build", "--weights", "w.pt", "--surrogate", "my_model.py:zeros"], "surrogate"),
    ],
)
def test_what_cannot_be_judged_is_one_error_and_leaves_nothing(place, capsys, arguments, words):
    flags = {flag[2:].replace("-", "_"): value for flag, value in zip(arguments[1::2], arguments[2::2], strict=True)}
    assert evaluate(place, arguments[0], **flags) == 2
    out, err = capsys.readouterr()
    assert re.search(words, err) and err.count("error:") == 1
    assert "Traceback" not in out + err
    assert not (place.root / "external").exists()


def test_a_folder_that_does_not_say_its_data_takes_a_data_set_too(place, capsys):
    save_pretrained(build_model("at", backbone="resnet8", image_shape=(1, 8, 8)), "by_hand")
    assert evaluate(place, "by_hand", "--dry-run") == 0
    assert rayndom(place, "evaluate", "by_hand") == 2
    assert "name the data set with --data" in capsys.readouterr().err
    for arguments in (["--until", "5"], ["--weights", "w.pt"]):
        assert rayndom(place, "evaluate", "by_hand", *arguments) == 2


def test_without_a_data_set_the_known_ones_are_said(place, capsys):
    assert rayndom(place, "evaluate", "my_model.py:zeros") == 2
    assert "--data: digits, fashion_mnist, cifar10" in capsys.readouterr().err
    assert rayndom(place, "evaluate", "my_model.py:zeros", "--image-size", "8") == 2
    assert "--image-size says how images of --data are read" in capsys.readouterr().err
    assert rayndom(place, "compare", "my_model.py:zeros", "my_model.py:build") == 2
    assert "was not evaluated here yet" in capsys.readouterr().err


def test_the_documented_lines_of_python_judge_it_too(place, capsys):
    page = (Path(__file__).resolve().parents[2] / "docs" / "evaluation.md").read_text()
    (code,) = re.findall(r"```python\n(from analysis.evaluate import evaluate\nfrom models.external.*?)```", page, re.DOTALL)
    exec(code.replace('suite="quick"', 'suite="short.yaml", num_samples=40'), {})
    assert "T0 = T1 = T2" in capsys.readouterr().out
    assert len(read_records(Path("records.jsonl"))) == 4


@pytest.mark.ray
@pytest.mark.slow
def test_workers_write_the_records_of_one_process(place, tmp_path, capsys):
    assert evaluate(place, "my_model.py:random", "--weights", "w.pt") == 0
    other = Home.locate(tmp_path / "other")
    assert evaluate(other, "my_model.py:random", "--weights", "w.pt", workers="2") == 0
    first, second = (read_records(folder_of(home, "my_model.random") / "records.jsonl") for home in (place, other))
    assert first.keys() == second.keys()
    assert all(first[key]["samples"] == second[key]["samples"] for key in first)
