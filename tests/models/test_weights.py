"""Exported folders: they load without Ray, MLflow or an attack library, and say what is wrong with them."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from models.errors import UserError
from models.randomness import ResampleOnForward
from models.registry import build_model
from models.weights import load_pretrained, read_config, save_pretrained, with_other_parameters


@pytest.fixture
def folder(tmp_path):
    return save_pretrained(build_model("ctrw", backbone="resnet8", image_shape=(1, 8, 8)).eval(), tmp_path / "model")


def test_loads_in_a_process_that_has_neither_ray_nor_mlflow(folder):
    code = f"""
import sys
for name in ("ray", "mlflow", "optuna", "torchattacks", "rich"):
    sys.modules[name] = None  # importing it fails, as if it were not installed
import torch
from models.weights import load_pretrained
model = load_pretrained({str(folder)!r})
images = torch.rand(4, 1, 8, 8)
with torch.no_grad():
    assert not torch.equal(model(images), model(images))
print(tuple(model(images).shape))
"""
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "(4, 10)", done.stderr


def test_a_loaded_model_can_be_saved_again(folder, tmp_path):
    loaded = load_pretrained(folder)
    assert isinstance(loaded, ResampleOnForward)
    again = save_pretrained(loaded, tmp_path / "again")
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_draws_are_not_exported(folder):
    from safetensors.torch import load_file

    assert not [name for name in load_file(folder / "model.safetensors") if "delta" in name]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "not an exported model"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot read"),
        (lambda folder: (folder / "config.json").write_text(json.dumps({"format_version": 99})), "format_version 99"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"short"), "cannot read the weights"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"cannot read .*model\.safetensors"),
    ],
)
def test_a_damaged_folder_is_one_clear_message(folder, damage, message):
    damage(folder)
    with pytest.raises(UserError, match=message):
        load_pretrained(folder)


def test_weights_of_another_model_do_not_fit(folder, tmp_path):
    other = save_pretrained(build_model("at", backbone="resnet8", image_shape=(1, 8, 8)), tmp_path / "other")
    (folder / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match="do not fit"):
        load_pretrained(folder)


def test_weights_of_another_training_are_refused(folder, tmp_path):
    other = save_pretrained(build_model("ctrw", backbone="resnet8", image_shape=(1, 8, 8), seed=1), tmp_path / "other")
    (folder / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match=r"model\.safetensors are not those"):
        load_pretrained(folder)


@pytest.mark.parametrize("seed", range(5))
def test_a_flipped_bit_of_the_weights_is_found(folder, seed):
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[random.Random(seed).randrange(len(content) // 2, len(content))] ^= 1  # the lowest bit of a byte: still a finite number
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"model\.safetensors"):
        load_pretrained(folder)


def test_an_export_without_a_digest_opens_with_a_remark(folder, caplog):
    config = json.loads((folder / "config.json").read_text())
    del config["weights_sha256"]
    (folder / "config.json").write_text(json.dumps(config))
    for _ in range(2):
        load_pretrained(folder)
    assert sum("earlier version" in record.getMessage() for record in caplog.records) == 1


def test_only_models_that_were_built_by_name_can_be_exported(tmp_path):
    with pytest.raises(ValueError, match="build_model"):
        save_pretrained(torch.nn.Linear(2, 2), tmp_path)


def test_trained_weights_answer_under_other_parameters_of_the_defence(tmp_path):
    model = build_model("dcs", backbone="resnet8", image_shape=(1, 8, 8))
    folder = save_pretrained(model, tmp_path / "model", details={"metrics": {"a": 1}})
    other = load_pretrained(with_other_parameters(folder, {"sampling": "stratified2"}, tmp_path / "other"), resample_on_forward=False)
    assert other.spec.defence_parameters["sampling"] == "stratified2"
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in other.state_dict().items())
    assert read_config(tmp_path / "other")["details"]["metrics"] == {"a": 1}
    with pytest.raises(UserError, match="do not fit a network with"):
        with_other_parameters(folder, {"kernel_size": 3}, tmp_path / "smaller")
    with pytest.raises(UserError, match="sampling"):
        with_other_parameters(folder, {"samplings": "uniform"}, tmp_path / "misspelt")
