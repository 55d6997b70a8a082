"""`training.initial_weights`: every way to name weights, what is kept of them, and what is refused before anything starts."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.errors import UserError
from models.weights import load_pretrained
from orchestration.cli import main
from orchestration.home import Workplace
from orchestration.recipes import load_recipe
from orchestration.run_folder import RunFolder
from orchestration.training.job import TrainingJob
from orchestration.training.training_run import train_here
from tests.orchestration.tiny_home import TINY, trained_home

STILL = ["--training.optimizer.learning_rate", "1e-20", "--training.optimizer.weight_decay", "0"]


@pytest.fixture(scope="module")
def begun(tmp_path_factory, migrated_store):
    with trained_home(tmp_path_factory.mktemp("begun"), migrated_store, ["at_digits"]) as home:
        yield home


def experiment(name, *flags, recipe="at_digits"):
    return load_recipe(recipe, [*TINY, *STILL, "--training.initial_weights", str(name), *flags]).experiment


@pytest.fixture(scope="module")
def given(begun):
    """The folder of the model that was trained first."""
    fingerprint = load_recipe("at_digits", TINY).experiment.fingerprint
    return RunFolder(begun.run(fingerprint)).model


def trained(home, configured):
    job = TrainingJob.at(Workplace(home), configured)
    return train_here(job)


@pytest.mark.parametrize("kind", ["folder", "fingerprint", "recipe", "safetensors", "state dict", "models:/"])
def test_every_way_to_name_weights_begins_with_them(kind, begun, given, tmp_path):
    weights = load_file(given / "model.safetensors")
    if kind == "safetensors":
        save_file(weights, tmp_path / "given.safetensors")
    elif kind == "state dict":
        torch.save({"state_dict": {f"module.{name}": value for name, value in weights.items()}}, tmp_path / "given.pth")
    elif kind == "models:/":
        assert main(["export", given.parent.name, "--to", str(tmp_path / "e"), "--register", "known", "--home", str(begun.root)]) == 0
    name = {
        "folder": given,
        "fingerprint": given.parent.name,
        "recipe": "at_digits",
        "safetensors": tmp_path / "given.safetensors",
        "state dict": tmp_path / "given.pth",
        "models:/": "models:/known/1",
    }[kind]
    result = trained(begun, experiment(name))
    model = load_pretrained(result.folder.model)
    for key, value in model.named_parameters():
        torch.testing.assert_close(value, weights[key], rtol=0, atol=1e-12)
    report = json.loads((result.folder.path / "initial_weights.json").read_text())
    assert report["loaded"] == len(weights)
    assert (report["skipped"], report["reinitialized"]) == ([], [])
    assert report["sha256"][:12] in (result.folder.model / "README.md").read_text()
    shutil.rmtree(result.folder.path)  # a recipe's name would mean two runs


def test_a_file_that_changed_is_not_what_the_run_began_with(begun, given, tmp_path):
    weights = load_file(given / "model.safetensors")
    file = tmp_path / "given.safetensors"
    save_file(weights, file)
    configured = experiment(file)
    first = trained(begun, configured)
    assert trained(begun, configured).reused
    save_file({name: value * 2 for name, value in weights.items()}, file)
    with pytest.raises(UserError, match="is not what the run"):
        trained(begun, configured)
    file.unlink()
    assert trained(begun, configured).reused, "a finished run needs its file no more"
    shutil.rmtree(first.folder.path)
    with pytest.raises(UserError, match="there is no file"):
        trained(begun, configured)


def test_what_does_not_fit_is_said_before_ray_and_mlflow(begun, given, tmp_path, capsys, monkeypatch):
    weights = load_file(given / "model.safetensors")
    weights["backbone.classifier.weight"] = torch.zeros(3, 64)
    weights["backbone.classifier.bias"] = torch.zeros(3)
    save_file(weights, tmp_path / "other.safetensors")
    monkeypatch.setattr("orchestration.training.cluster.connect", lambda *a, **k: pytest.fail("Ray was started"))
    flags = [*TINY, "--training.initial_weights", str(tmp_path / "other.safetensors"), "--home", str(begun.root)]
    of_a_sweep = [f"--settings.{word[2:]}" if word.startswith(("--data", "--training", "--resources")) else word for word in flags]
    for command in (["train", "at_digits"], ["train", "at_digits", "--resources.workers", "2"], ["sweep", "ctrw_digits"]):
        assert main([*command, *(of_a_sweep if command[0] == "sweep" else flags)]) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert said.count("have other shapes") == 1
        assert "(3, 64)" in said
        assert "reinitialize '[classifier]'" in said
    configured = experiment(tmp_path / "other.safetensors", "--training.reinitialize", "[classifier]", recipe="ctrw_digits")
    result = trained(begun, configured)
    report = json.loads((result.folder.path / "initial_weights.json").read_text())
    assert {name.rpartition(".")[2] for name in report["reinitialized"]} == {"weight", "bias", "mu", "sigma"}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("/nowhere/at.pth", "there is no file"),
        ("at_digit", "at_digits"),
        ("timm:resnet_18", "resnet18"),
        ("timm:resnet18", "not on this machine"),
        ("my_model.py:build", "is code"),
        ("models:/nobody@best", "no exported model"),
        ("f" * 16, "no model"),
        ("x" * 1999, "no model"),
    ],
)
def test_names_of_nothing_are_one_message(name, words, begun, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=words):
        TrainingJob.at(Workplace(begun), experiment(name))


def test_fresh_parts_need_weights_beside_them():
    with pytest.raises(UserError, match="reinitialize"):
        load_recipe("at_digits", ["--training.reinitialize", "[classifier]"])


def test_a_relative_path_is_the_same_file_in_every_process(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert load_recipe("at_digits", ["--training.initial_weights", "a/b.pt"]).experiment.training.initial_weights == str(
        tmp_path / "a/b.pt"
    )
    from orchestration.sweeping.loading import load_sweep

    with pytest.raises(UserError, match="names files from the root"):
        load_sweep("ctrw_digits", {"settings.training.initial_weights": "b.pt"}).base_experiments()


def test_weights_of_timm_are_taken_from_the_cache(monkeypatch, tmp_path, begun):
    import timm

    network = timm.create_model("resnet10t", num_classes=1000)
    name = timm.get_pretrained_cfg("resnet10t").url.rpartition("/")[2]
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    torch.save(network.state_dict(), tmp_path / "checkpoints" / name)
    configured = experiment("timm:resnet10t", "--backbone", "timm:resnet10t", "--training.reinitialize", "[classifier]")
    result = trained(begun, configured)
    weights = load_file(result.folder.model / "model.safetensors")
    # Grey images: timm adds the filters of the three channels up.
    expected = network.state_dict()["conv1.0.weight"].sum(1, keepdim=True)
    torch.testing.assert_close(weights["backbone.model.conv1.0.weight"], expected)
    torch.testing.assert_close(weights["backbone.model.layer1.0.conv1.weight"], network.state_dict()["layer1.0.conv1.weight"])


def test_a_training_that_is_gone_on_with_keeps_what_it_began_with(begun, given, tmp_path):
    file = tmp_path / "given.safetensors"
    shutil.copy(given / "model.safetensors", file)
    configured = load_recipe("ctrw_digits", [*TINY, "--training.epochs", "2", "--training.initial_weights", str(file)]).experiment
    job = TrainingJob.at(Workplace(begun), configured)

    class Killed(Exception):
        pass

    def killed(report):
        raise Killed

    with pytest.raises(Killed):
        train_here(job, on_epoch=killed)
    file.unlink()
    resumed = trained(begun, configured)
    first = load_file(resumed.folder.model / "model.safetensors")
    shutil.rmtree(resumed.folder.path)
    shutil.copy(given / "model.safetensors", file)
    whole = trained(begun, configured)
    second = load_file(whole.folder.model / "model.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in second)


def test_the_card_says_that_the_average_is_what_it_holds(begun):
    result = trained(
        begun, load_recipe("at_digits", [*TINY, "--training.averaging.name", "ema", "--training.validation.select", "last"]).experiment
    )
    card = (result.folder.model / "README.md").read_text()
    assert "the weights are the average (ema) of epoch 1" in card
    assert "| average/robust_accuracy |" in card
    assert "| latest/robust_accuracy |" in card
