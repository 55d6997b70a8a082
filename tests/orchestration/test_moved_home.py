"""A home may be moved, and a team may read it: no file names the place where the home lay, and every mode follows the umask."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import subprocess
import sys

import pytest

from orchestration.cli import main
from orchestration.home import Home
from orchestration.sweeping.loading import load_sweep
from orchestration.sweeping.study import open_study
from orchestration.tracking.tracker import Tracker
from orchestration.trained_models.targets import resolve_target
from tests.orchestration.earlier_homes.contents import TINY
from tests.orchestration.sweep_process import ROOT

FIELDS = [word for name, value in TINY.items() for word in (f"--{name}", value)]


def use(home: Home, outside) -> None:
    """Train, evaluate, analyse, export, register and propose a sweep in a home."""
    where = ["--home", str(home.root)]
    assert main(["train", "at_digits", *FIELDS, "--training.epochs", "1", *where]) == 0
    assert main(["evaluate", "at_digits", "--samples", "10", "--workers", "1", *where]) == 0
    assert main(["analyse", "at_digits", "--what", "cost", *where]) == 0
    assert main(["export", "at_digits", "--to", str(outside), "--register", "tiny@best", *where]) == 0
    resolve_target("models:/tiny@best", home)
    open_study(load_sweep("ctrw_bounds_digits", {"num_trials": 2}), home.sweep("ctrw_bounds_digits-1"))


def places_named_in(root, place: str) -> list[str]:
    """Return which cells of databases and which files of a home name a place; locks say what command held them last."""
    found = []
    for path in root.rglob("*.db"):
        with contextlib.closing(sqlite3.connect(path)) as database:
            for (table,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
                for row in database.execute(f'SELECT * FROM "{table}"'):
                    found += [f"{path.name} {table}: {cell}" for cell in row if isinstance(cell, str) and place in cell]
    for path in root.rglob("*"):
        if path.is_file() and path.suffix != ".db" and "lock" not in path.name and place.encode() in path.read_bytes():
            found.append(str(path.relative_to(root)))
    return found


@pytest.fixture
def team_umask():
    before = os.umask(0o002)
    yield 0o002
    os.umask(before)


def test_a_home_is_used_moved_and_used_again(home, tmp_path, team_umask, capsys):
    use(home, tmp_path / "out")
    old = str(home.root)
    wrong = {str(path): oct(path.stat().st_mode) for path in (*home.root.rglob("*"), *(tmp_path / "out").rglob("*"))
             if path.name != "mlflow.db" and path.stat().st_mode & 0o777 != (0o777 if path.is_dir() else 0o666) & ~team_umask}  # fmt: skip
    assert wrong == {}, "mlflow.db is the fixture's copy"
    place = tmp_path / "another" / "place"
    shutil.move(home.root, place)
    moved = Home.locate(place)
    capsys.readouterr()
    runs = len(Tracker(moved, "rayndom").client.search_runs(["1"]))
    assert "moved here from" in capsys.readouterr().out
    assert places_named_in(place, old) == []
    program = (
        "import sys; from pathlib import Path; from orchestration.home import Home; from tests.orchestration import test_moved_home as t; "
    )
    program += "t.use(Home.locate(sys.argv[1]), Path(sys.argv[2]))"
    command = [sys.executable, "-c", program, str(place), str(tmp_path / "out")]  # MLflow remembers places for the life of a process
    subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)
    assert len(Tracker(moved, "rayndom").client.search_runs(["1"])) == runs, "found, not made again"
    assert not home.root.exists()


@pytest.mark.slow
def test_a_new_store_follows_the_umask(tmp_path, team_umask, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    home = Home.locate(tmp_path / "home")
    Tracker(home, "rayndom")
    assert {oct(path.stat().st_mode & 0o777) for path in home.root.iterdir()} == {"0o664"}
