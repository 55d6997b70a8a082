"""Many processes at once in one new home: it stays usable, nothing stands twice, and whoever cannot work says who does."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from orchestration.cli import main
from orchestration.home import Home
from tests.orchestration.earlier_homes.contents import TINY
from tests.orchestration.sweep_process import ROOT, runs_of

FIELDS = [word for name, value in TINY.items() for word in (f"--{name}", value)]
TRAIN = ["train", "at_digits", *FIELDS, "--training.epochs", "2"]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture
def new_home(tmp_path, monkeypatch):
    """A folder in which no command has run."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path / "home"


def at_once(root, *commands):
    """Start commands together in one home; return (exit code, what it printed) of each."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    started = []
    for words in commands:
        command = [sys.executable, "-m", "orchestration.cli", *words, "--home", str(root)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started.append(subprocess.Popen(command, cwd=root.parent, env=environment, **pipes))
    return [(process.returncode, text) for process in started for text in [process.communicate(timeout=900)[0]]]


def check_usable(root):
    """One training in a home, its MLflow run closed, and another one trains there."""
    home = Home.locate(root)
    (run,) = runs_of(home, "run")
    assert run.info.status == "FINISHED"
    assert main([*TRAIN, "--seed", "9", "--home", str(root)]) == 0
    assert len(runs_of(home, "run")) == 2


def test_three_trainings_of_one_recipe_have_one_writer(new_home):
    ended = at_once(new_home, *[TRAIN] * 3)
    assert sorted(code for code, _ in ended) in ([0, 3, 3], [0, 0, 3], [0, 0, 0]), ended
    for code, text in ended:
        assert code == 0 or "is being run by process" in text, text
    check_usable(new_home)


def test_three_trainings_that_wait_all_end_with_the_one_model(new_home):
    ended = at_once(new_home, *[[*TRAIN, "--wait"]] * 3)
    assert [code for code, _ in ended] == [0] * 3, ended
    assert sum("was already trained" in text for _, text in ended) == 2
    check_usable(new_home)


@pytest.mark.parametrize(
    "words",
    [
        ["status"],
        ["list", "runs"],
        ["train", "at_digits", "--dry-run"],
        ["evaluate", "at_digits", "--samples", "10", "--workers", "1"],
        ["analyse", "at_digits", "--what", "cost"],
        ["export", "at_digits", "--to", "out", "--register", "tiny@best"],
        ["compare", "at_digits", "at_digits"],
        ["reproduce", "ctrw.table4", "--dry-run"],
    ],
    ids=lambda words: words[0],
)
@pytest.mark.parametrize("trained", [False, True], ids=["new", "trained"])
def test_ten_of_each_command_that_needs_no_ray(new_home, words, trained):
    if trained:
        assert main([*TRAIN, "--home", str(new_home)]) == 0
        codes = {0, 2, 3} if words[0] == "compare" else {0, 3}
    else:
        codes = {0} if words[0] in ("status", "list", "train", "reproduce") else {2}
    ended = at_once(new_home, *[words] * 10)
    assert {code for code, _ in ended} <= codes, ended
    assert not any("Traceback" in text for _, text in ended)
    for code, text in ended:
        assert code != 3 or "is being run by" in text, text
    if trained and words[0] != "compare":
        assert 0 in {code for code, _ in ended}
    assert main([*TRAIN, "--home", str(new_home)]) == 0
    check_usable(new_home)
