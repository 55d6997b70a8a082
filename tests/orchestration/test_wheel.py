"""A wheel of this project in an environment of its own: it installs by plain pip, brings all its files, and works beside other people's
modules."""

from __future__ import annotations

import email
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.architecture.source import PACKAGES, ROOT, project_files
from tests.orchestration.tiny_home import TINY

SUITE = (
    "description: one attack\nscoring: {num_selection_draws: 2, num_evaluation_draws: 3, num_known_draws: 2, enumerate_up_to: 4}\n"
    "attacks:\n  - {name: pgd_2, attack: pgd, parameters: {steps: 2}, protocols: [T1], num_draws: 2}\n"
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy of the project."""
    source, to = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for file in project_files():
        name = file.relative_to(ROOT)
        if name.parts[0] in PACKAGES or name.name in ("pyproject.toml", "README.md", "LICENSE"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, source / name)
    build = f"from setuptools.build_meta import build_wheel; build_wheel({str(to)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, check=True)
    (found,) = to.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    """A fresh environment with the wheel installed by its own pip, and the packages that it depends on from this one."""
    folder = tmp_path_factory.mktemp("environment") / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, cwd=folder, env=clean_environment(), check=True)  # elsewhere pip would find this checkout and be content
    (site,) = (folder / "lib").glob("python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return folder


def clean_environment():
    return {name: value for name, value in os.environ.items() if not name.startswith(("RAYNDOM_", "MLFLOW_", "PYTHONPATH"))}


def run(folder, *words, code=0):
    done = subprocess.run(list(map(str, words)), cwd=folder, env=clean_environment(), capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.mark.slow
def test_every_file_that_the_packages_read_is_in_the_wheel(wheel):
    inside = set(zipfile.ZipFile(wheel).namelist())
    ours = {path.relative_to(ROOT) for path in project_files() if path.relative_to(ROOT).parts[0] in PACKAGES}
    missing = {str(path) for path in ours if path.suffix in (".py", ".yaml", ".txt", ".html", ".css", ".j2")} - inside
    assert not missing


@pytest.mark.slow
def test_nothing_that_the_wheel_requires_contradicts_itself(wheel):
    """torchattacks pins a requests that MLflow refuses: it is asked for by an extra alone."""
    (name,) = (each for each in zipfile.ZipFile(wheel).namelist() if each.endswith("METADATA"))
    metadata = email.message_from_bytes(zipfile.ZipFile(wheel).read(name))
    required = [Requirement(line) for line in metadata.get_all("Requires-Dist")]
    plain = {each.name for each in required if each.marker is None or each.marker.evaluate({"extra": ""})}
    assert "torchattacks" not in plain and {"torch", "ray", "mlflow"} <= plain
    assert "torchattacks" in metadata.get_all("Provides-Extra")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_it_trains_evaluates_and_loads_beside_a_models_py_of_the_users(environment, tmp_path):
    (tmp_path / "models.py").write_text("raise RuntimeError('the user''s own')\n")
    (tmp_path / "short.yaml").write_text(SUITE)
    rayndom, python = environment / "bin" / "rayndom", environment / "bin" / "python"
    run(tmp_path, rayndom, "train", "ctrw_digits", *TINY, "--home", tmp_path / "home")
    said = run(tmp_path, rayndom, "evaluate", "ctrw_digits", "--suite", "short.yaml", "--samples", "8", "--home", tmp_path / "home")
    assert "T1" in said
    run(tmp_path, rayndom, "new", "defence", "fresh", "--home", tmp_path / "home")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    code = f"import rayndom, models; print(models.__file__); print(rayndom.load('ctrw_digits', home={str(tmp_path / 'home')!r}))"
    assert str(environment) in run(elsewhere, python, "-c", code)
    # A script's own folder comes first: then one sentence says which file is in the way.
    (tmp_path / "script.py").write_text("from rayndom import load\n")
    assert "models.py hides it" in run(tmp_path, python, "script.py", code=1)
    assert Path(tmp_path / "fresh" / "pyproject.toml").is_file()
