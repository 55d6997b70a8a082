"""A defence of one's own is one new file per folder: the toy of `sixth_defence/` is laid over a copy of the project, nothing is edited,
and every command and every conformance suite knows it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from models.weights import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE
from tests.architecture.source import PACKAGES, ROOT, project_files

TOY = Path(__file__).with_name("sixth_defence")
SMALL = (
    "--data.limit_train=64 --data.limit_test=24 --data.validation_size=24 --data.image_size=8 --training.epochs=1 "
    "--training.batch_size=32 --training.attack.steps=1 --training.validation.steps=1 --training.validation.num_draws=2"
).split()


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project with the toy's files in their places, none of which existed."""
    folder = tmp_path_factory.mktemp("project")
    for file in project_files():
        name = file.relative_to(ROOT)
        if name.parts[0] in (*PACKAGES, "tests", "docs") or name.name in ("pyproject.toml", "README.md"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, folder / name)
    added = [path.relative_to(TOY) for path in TOY.rglob("*") if path.suffix in (".py", ".yaml")]
    assert len({name.parent for name in added}) == len(added) == 4
    for name in added:
        assert not (folder / name).exists()
        shutil.copyfile(TOY / name, folder / name)
    return folder


def run(project: Path, *arguments: str, timeout: float = 240) -> str:
    """Run Python in the copied project; its output, or a failure that shows it."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("RAYNDOM_", "MLFLOW_"))}
    variables |= {"PYTHONPATH": str(project), "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled"}
    finished = subprocess.run(
        [sys.executable, *arguments], cwd=project, env=variables, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert finished.returncode == 0, f"{' '.join(arguments)}\n{finished.stdout[-4000:]}\n{finished.stderr[-4000:]}"
    return finished.stdout + finished.stderr


def rayndom(project: Path, *arguments: str) -> str:
    return run(project, "-m", "orchestration.cli", *arguments, "--home", str(project / "home"))


def test_the_conformance_suites_cover_it_by_themselves(project: Path) -> None:
    suites = [f"tests/contracts/{name}.py" for name in ("test_defence", "test_randomness", "test_objective")]
    output = run(project, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "channel_gain or halves", *suites)
    passed = int(output.rpartition(" passed")[0].rpartition("\n")[2].split()[-1])
    assert passed >= 12 and "failed" not in output, output


@pytest.mark.slow
def test_it_is_listed_and_its_cost_is_said_before_anything_runs(project: Path) -> None:
    assert "channel_gain" in rayndom(project, "list", "defences")
    assert "halves" in rayndom(project, "list", "objectives")
    assert "defence.sigma" in rayndom(project, "show", "channel_gain_digits")
    said = rayndom(project, "train", "channel_gain_digits", "--dry-run", *SMALL)
    assert "channel_gain" in said and "parameters" in said
    estimate = "from orchestration.recipes import load_recipe\nfrom orchestration.reproducing.cost import training_cost\n"
    estimate += "print(training_cost(load_recipe('channel_gain_digits').experiment).passes)"
    assert float(run(project, "-c", estimate).split()[-1]) % (2 * 10 + 6) == 0, "what the toy's objective says of a step"


@pytest.mark.slow
def test_it_is_trained_evaluated_analysed_exported_and_used(project: Path, tmp_path: Path) -> None:
    rayndom(project, "train", "channel_gain_digits", *SMALL)
    evaluated = rayndom(project, "evaluate", "channel_gain_digits", "--samples", "8", "--draws", "2")
    assert "T1" in evaluated
    rayndom(project, "analyse", "channel_gain_digits")
    export = tmp_path / "export"
    rayndom(project, "export", "channel_gain_digits", "--to", str(export))
    assert {WEIGHTS_FILE, CONFIG_FILE, CARD_FILE} <= {path.name for path in export.iterdir()}
    assert json.loads((export / CONFIG_FILE).read_text())["model"]["defence"] == "channel_gain"


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_it_is_swept_over_its_own_search_space(project: Path) -> None:
    settings = "".join(f"  {flag.removeprefix('--').replace('=', ': ')}\n" for flag in SMALL)
    prior = "prior: {channel_gain: {at_least: 0.25}}"
    (project / "small.yaml").write_text(f"recipe: channel_gain_digits\nnum_trials: 2\n{prior}\nsettings:\n{settings}")
    rayndom(project, "sweep", "small.yaml", "--no-evaluation")
    home = project / "home"
    assert json.loads((home / "exports" / "small" / CONFIG_FILE).read_text())["model"]["defence"] == "channel_gain"
    swept = [yaml.safe_load(path.read_text()) for path in (home / "runs").glob("*/config.yaml")]
    sigmas = {run["defence"]["sigma"] for run in swept} - {0.2}
    assert len(sigmas) >= 2 and 0.25 in sigmas and all(0.25 <= sigma <= 0.5 for sigma in sigmas)


def test_the_readmes_own_defence_works_to_the_letter(project: Path) -> None:
    blocks = re.findall(
        r"```(?:python|yaml)\n# (\S+\.(?:py|yaml)):[^\n]*\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL
    )
    assert [Path(name).parent.as_posix() for name, _ in blocks] == [
        "models/defences",
        "orchestration/defences",
        "orchestration/recipes/methods",
    ]
    for name, text in blocks:
        assert not (project / name).exists()
        (project / name).write_text(text)
    assert "defence.sigma" in rayndom(project, "show", "feature_noise_digits")
    suites = [f"tests/contracts/{name}.py" for name in ("test_defence", "test_randomness")]
    output = run(project, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "feature_noise", *suites)
    assert int(output.rpartition(" passed")[0].rpartition("\n")[2].split()[-1]) >= 10 and "failed" not in output, output


@pytest.mark.slow
def test_the_readmes_own_defence_is_trained_and_evaluated(project: Path) -> None:
    if not (project / "models/defences/feature_noise.py").exists():
        test_the_readmes_own_defence_works_to_the_letter(project)
    rayndom(project, "train", "feature_noise_digits", *SMALL)
    assert "T1" in rayndom(project, "evaluate", "feature_noise_digits", "--samples", "8", "--draws", "2")
