"""Imports point down, and the check that says so would notice if they did not."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
LINT = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True, no_logo=True))"
SLOTS = ("models.defences", "trainers.objectives", "orchestration.defences")
CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]


def floors(contract: dict[str, Any]) -> list[list[str]]:
    """Return the modules of a contract's layers, highest first, without the marks that say how neighbours may meet."""
    return [re.findall(r"\w+", layer) for layer in contract["layers"]]


INNER = {contract["containers"][0]: floors(contract) for contract in CONTRACTS if "containers" in contract}
"""The layers inside a package, by its name."""


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    """Check the packages in a folder, which must hold a pyproject.toml with the contracts."""
    return subprocess.run([sys.executable, "-c", LINT], cwd=folder, capture_output=True, text=True)


def test_the_contracts_are_kept() -> None:
    finished = lint(ROOT)
    assert finished.returncode == 0, finished.stdout + finished.stderr


@pytest.fixture
def building(tmp_path: Path) -> Path:
    """The floors of the project, empty, under the project's own contracts."""
    text = (ROOT / "pyproject.toml").read_text()
    assert "importlinter" in tomllib.loads(text)["tool"]
    (tmp_path / "pyproject.toml").write_text(text[text.index("[tool.importlinter]") :])
    for package in ("rayndom", "orchestration", "analysis", "trainers", "models", *SLOTS):
        folder = tmp_path.joinpath(*package.split("."))
        folder.mkdir(parents=True)
        (folder / "__init__.py").touch()
    for package, layers in INNER.items():
        for name in itertools.chain(*layers):
            tmp_path.joinpath(package, name).mkdir(exist_ok=True)
            tmp_path.joinpath(package, name, "__init__.py").touch()
    for package in SLOTS:
        for name in ("first", "second"):
            tmp_path.joinpath(*package.split("."), f"{name}.py").touch()
    return tmp_path


def test_an_empty_building_keeps_the_contracts(building: Path) -> None:
    finished = lint(building)
    assert finished.returncode == 0, finished.stdout + finished.stderr


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("models/layer.py", "import trainers"),
        ("orchestration/cli.py", "import rayndom"),
        ("trainers/fit.py", "from analysis import attacks"),
        ("analysis/report.py", "import orchestration.defences.first"),
        ("models/layer.py", "import ray"),
        ("models/layer.py", "import torchattacks"),
        ("trainers/fit.py", "from mlflow import log_metric"),
        ("trainers/fit.py", "def later():\n    import optuna"),
        ("trainers/fit.py", "import rich.console"),
        ("analysis/report.py", "import ray.train"),
        ("analysis/report.py", "import optuna"),
        ("models/defences/first.py", "from models.defences.second import anything"),
        ("trainers/objectives/second.py", "import trainers.objectives.first"),
        ("orchestration/defences/first.py", "from orchestration.defences import second"),
    ],
)
def test_an_import_that_points_up_or_sideways_is_noticed(building: Path, file: str, line: str) -> None:
    (building / file).write_text(f"{line}\n")
    finished = lint(building)
    assert finished.returncode == 1, finished.stdout + finished.stderr
    assert "BROKEN" in finished.stdout


@pytest.mark.parametrize(
    ("package", "lower", "higher"),
    [
        (package, low, high)
        for package, layers in INNER.items()
        for above, below in itertools.pairwise(layers)
        for low, high in itertools.product(below, above)
    ],
)
def test_an_import_that_points_up_inside_a_package_is_noticed(building: Path, package: str, lower: str, higher: str) -> None:
    (building / package / lower / "late.py").write_text(f"def later():\n    import {package}.{higher}\n")
    finished = lint(building)
    assert finished.returncode == 1, finished.stdout + finished.stderr
    assert f"{package}.{lower}" in finished.stdout


def test_an_import_by_a_detour_is_noticed(building: Path) -> None:
    (building / "models" / "helper.py").write_text("import mlflow\n")
    (building / "trainers" / "fit.py").write_text("import models.helper\n")
    assert lint(building).returncode == 1


@pytest.mark.parametrize("package", INNER)
def test_a_module_that_no_layer_names_is_noticed(building: Path, package: str) -> None:
    (building / package / "stray.py").touch()
    finished = lint(building)
    assert finished.returncode == 1, finished.stdout + finished.stderr
    assert f"{package}.stray" in finished.stdout


LAYERS_OF = {
    "random_weight": "ctrw",
    "stochastic_convolution": "dcs",
    "tap_masks": "dcs",
    "deformable_convolution": "dcn",
    "random_normalization": "rna",
    "hypernetwork": "ps_red",
}
"""The files of layers that one defence is made of, and its name."""


def test_only_the_files_about_a_defence_know_its_layers() -> None:
    """Everything else asks a layer by what it answers: `RandomModule`, `models.layers.channel_map`, `cost`, `channel_statistics`."""
    assert {path.stem for path in (ROOT / "models" / "layers").glob("*.py")} >= LAYERS_OF.keys()
    toys = ROOT / "analysis" / "evaluation" / "calibration.py"  # builds a small network with a known result out of a real layer
    strangers = [
        f"{path.relative_to(ROOT)} knows {layer}"
        for package in ("analysis", "orchestration")
        for path in (ROOT / package).rglob("*.py")
        for layer in re.findall(r"\bmodels\.layers\.(\w+)", path.read_text())
        if layer in LAYERS_OF and LAYERS_OF[layer] not in path.stem and path != toys
    ]
    assert not strangers
