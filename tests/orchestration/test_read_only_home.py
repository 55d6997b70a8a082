"""Commands that only read work on a home that may not be written, and say the same there; those that write name it."""

from __future__ import annotations

import json
import shutil

import pytest

from orchestration.cli import main
from orchestration.commands import ui
from orchestration.sweeping.config import SWEEP_FILE
from orchestration.sweeping.loading import load_sweep
from orchestration.sweeping.study import open_study
from tests.orchestration.finished_runs import finish
from tests.orchestration.places import read_only

READING = (
    ["status"],
    ["status", "ctrw_bounds_digits-1"],
    ["list", "runs"],
    ["list", "runs", "--json"],
    ["list", "recipes"],
    ["show", "ctrw_digits"],
    ["compare", "at_digits", "ctrw_digits"],
    ["ui"],
)
WRITING = (["train", "at_digits"], ["evaluate", "at_digits"], ["sweep", "ctrw_bounds_digits"], ["analyse", "at_digits"])


@pytest.fixture
def used_home(home):
    """A home with runs and a sweep."""
    finish(home, "at_digits", kind="run")
    finish(home, "ctrw_digits", kind="trial", weights_seed=1)
    config = load_sweep("ctrw_bounds_digits", {"num_trials": 1})
    open_study(config, home.sweep("ctrw_bounds_digits-1"))
    (home.sweep("ctrw_bounds_digits-1") / SWEEP_FILE).write_text(json.dumps(config.model_dump(mode="json")))
    return home


def said_by(words, home, capsys):
    capsys.readouterr()
    code = main([*words, *([] if words[0] == "show" or "recipes" in words else ["--home", str(home.root)])])
    told = capsys.readouterr()
    return code, told.out, told.err


def test_what_only_reads_says_the_same_where_nothing_may_be_written(used_home, capsys, monkeypatch):
    monkeypatch.setattr(ui, "_serve", lambda command, environment: 0)
    expected = [said_by(words, used_home, capsys) for words in READING]
    assert [code for code, _, _ in expected] == [0] * len(READING), expected
    with read_only(used_home.root):
        for words, before in zip(READING, expected, strict=True):
            assert said_by(words, used_home, capsys) == before, words
        for words in WRITING:
            code, _, err = said_by(words, used_home, capsys)
            assert (code, str(used_home.root) in err) == (3, True), (words, err)
        code, _, _ = said_by(["export", "at_digits", "--to", str(used_home.root.parent / "out")], used_home, capsys)
        assert code == 3


def test_what_only_reads_makes_no_home(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for words, code in ((["status"], 0), (["list", "runs"], 0), (["compare", "at_digits", "ctrw_digits"], 2), (["status", "x"], 2)):
        assert main([*words, "--home", str(tmp_path / "none")]) == code
        assert str(tmp_path / "none") in "".join(capsys.readouterr())
    assert list(tmp_path.iterdir()) == []


def test_a_moved_home_that_may_not_be_written_says_so_and_is_read(used_home, tmp_path, capsys):
    place = tmp_path / "elsewhere"
    (used_home.root / "mlflow_artifacts").mkdir(exist_ok=True)
    shutil.move(used_home.root, place)
    with read_only(place):
        assert main(["list", "runs", "--home", str(place)]) == 0
    told = capsys.readouterr()
    assert "at_digits" in told.out
    assert f"moved to {place}" in told.err
