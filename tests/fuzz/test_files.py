"""A home and an export of which one file was damaged: the command ends with one message that names the file, or goes on without it."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from orchestration.recipes import load_recipe
from tests.fuzz.command_line import SEED, complaint, rayndom
from tests.orchestration.earlier_homes.contents import TINY

FEW, MANY = 40, 600


def mutations(path: Path, rng: random.Random) -> list[tuple[str, Callable[[], None]]]:
    """Return ways to damage a file: what they are called, and what does it."""
    content = path.read_bytes()
    ways: list[tuple[str, Callable[[], None]]] = [
        ("empty", lambda: path.write_bytes(b"")),
        ("half", lambda: path.write_bytes(content[: len(content) // 2])),
        ("zeros", lambda: path.write_bytes(bytes(len(content)))),
        ("text", lambda: path.write_text("not what it was\n")),
        ("not UTF-8", lambda: path.write_bytes(b"\xff\xfe" + content)),
    ]
    if path.suffix == ".json":
        tree = json.loads(content)
        keys = list(tree)
        for value in (None, [], 5, "x", True, float("nan"), -1, 10**30, {"zz": None}):
            key = rng.choice(keys)
            ways.append((f"{key} is {value!r}", lambda key=key, value=value: path.write_text(json.dumps(tree | {key: value})) and None))
        key = rng.choice(keys)
        ways.append((f"without {key}", lambda: path.write_text(json.dumps({k: v for k, v in tree.items() if k != key})) and None))
        for text in ("[]", "null", "5", '"x"', "[" * 100_000, '{"a":' * 50_000):
            ways.append((f"{text[:5]} {len(text)}", lambda text=text: path.write_text(text) and None))
    return ways


def damaged_homes(earlier_home: Path, folder: Path, seed: int, number: int):
    """Yield home after home with one damaged file of its finished run, and what was done."""
    rng = random.Random(seed)
    names = ["result.json", "model/config.json", "model/model.safetensors", "config.yaml", "training.pt"]
    for index in range(number):
        home = folder / str(index)
        shutil.copytree(earlier_home, home, symlinks=True)
        (home / "mlflow.db").unlink()
        run = rng.choice(sorted(home.glob("runs/*")))
        path = run / rng.choice([name for name in names if (run / name).is_file()])
        title, damage = rng.choice(mutations(path, rng))
        damage()
        yield home, run, path, title
        shutil.rmtree(home)


def try_files(earlier_home: Path, folder: Path, seed: int, number: int) -> None:
    problems = []
    for home, run, path, title in damaged_homes(earlier_home, folder, seed, number):
        for words in (["export", run.name, "--to", str(folder / f"out-{home.name}")],):
            outcome = rayndom([*words, "--home", str(home)])
            problem = complaint(outcome, [path.name, run.name], refused=None)
            if problem:
                problems.append(f"{problem}: {words[0]} with {path.relative_to(home)} {title}: {outcome.error[:300]}")
    assert not problems, f"{len(problems)} with seed {seed}:\n" + "\n".join(problems[:20])


def test_a_damaged_file(earlier_home, tmp_path):
    try_files(earlier_home, tmp_path, SEED, FEW)


@pytest.mark.slow
def test_many_damaged_files(earlier_home, tmp_path):
    try_files(earlier_home, tmp_path, SEED + 1, MANY)


def test_weights_that_are_not_finite(earlier_home, tmp_path):
    run = next(path.parent for path in sorted(earlier_home.glob("runs/*/result.json")))
    model = tmp_path / "model"
    shutil.copytree(run / "model", model)
    weights = load_file(model / "model.safetensors")
    name = sorted(key for key, tensor in weights.items() if tensor.is_floating_point())[0]
    weights[name].view(-1)[0] = float("nan")
    save_file(weights, model / "model.safetensors")
    outcome = rayndom(["export", str(model), "--to", str(tmp_path / "out"), "--home", str(tmp_path / "home")])
    assert complaint(outcome, [name], refused=True) is None, outcome.said


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_classes", 10**9), ("image_shape", [1, 10**6, 10**6]), ("std", [0.0]), ("std", [-1.0]), ("mean", []), ("defence", "nowhere")],
)
def test_a_model_that_cannot_be(earlier_home, tmp_path, field, value):
    run = next(path.parent for path in sorted(earlier_home.glob("runs/*/result.json")))
    model = tmp_path / "model"
    shutil.copytree(run / "model", model)
    config = json.loads((model / "config.json").read_text())
    config["model"][field] = value
    (model / "config.json").write_text(json.dumps(config))
    outcome = rayndom(["export", str(model), "--to", str(tmp_path / "out"), "--home", str(tmp_path / "home")])
    assert complaint(outcome, [field], refused=True) is None, outcome.said


@pytest.mark.parametrize(
    "change",
    [{"finished_epochs": -1}, {"finished_epochs": 10**9}, {"history": []}, {"weights": {}}, {"optimizer": {}}, {"best": {}}, {"ended": 3}]
    + [{name: None} for name in ("finished_epochs", "seed", "weights", "optimizer", "history", "ended")],
)
def test_a_checkpoint_that_no_training_wrote(earlier_home, tmp_path, change):
    home = tmp_path / "home"
    shutil.copytree(earlier_home, home)
    (home / "mlflow.db").unlink()
    (path,) = home.glob("runs/*/training.pt")
    torch.save(torch.load(path, weights_only=True) | change, path)
    flags = [f"--{name}={value}" for name, value in TINY.items()]
    flags += ["--training.epochs=2"]
    assert load_recipe("rna_digits", flags).experiment.fingerprint == path.parent.name
    outcome = rayndom(["train", "rna_digits", *flags, "--home", str(home)], patience_s=30)
    assert complaint(outcome, ["checkpoint"], refused=True) is None, outcome.said


@pytest.mark.parametrize("name", ["", " ", "a b", "a\n", "it's", "a@", "@champion", "a@v1", "a@latest", 'a"b', "a%b", "a@b@c"])
def test_names_that_the_registry_cannot_have(earlier_home, tmp_path, name):
    run = next(path.parent for path in sorted(earlier_home.glob("runs/*/result.json")))
    out = tmp_path / "out"
    words = ["export", str(run / "model"), "--to", str(out), "--home", str(tmp_path / "home"), f"--register={name}"]
    outcome = rayndom(words)
    if name:
        assert complaint(outcome, ["--register"], refused=True) is None, outcome.said
        assert not out.exists()
