"""Flags, addresses and folders that cannot be: one message that names the flag, the variable or the folder, before anything starts."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import pytest

from analysis.reporting.markdown import escape
from models.errors import UserError
from orchestration.cli import build_parser
from orchestration.recipes import load_recipe
from orchestration.training.card import model_card
from tests.fuzz.command_line import complaint, rayndom

SLOW_START_S = 60
"""Patience with a first command, which imports what the others find imported."""

NO_NUMBERS = [
    "-1",
    "1e400",
    "nan",
    "inf",
    "-inf",
    "x",
    "",
    " ",
    "1.5.2",
    "0x10",
    "1_0",
    "\u0661",
    "9" * 400,
    str(10**20),
    "true",
    "1,5",
    "1/0",
]
NO_WHOLE_NUMBERS = ["0.5", "1e3", "1e-3"]
ADDRESSES = [
    "./mlr", "mlr", "/tmp", "foo://", "foo://x", "s3://x", "file:///x", "ftp://x", "sqlite://", "sqlite:///", "http://", "http://a b",
    "http://[::1", "http://127.0.0.1:99999", "http://127.0.0.1:x", " ", "\n", " http://x", "postgresql://", "mysql://a/b",
    "uc:x", "://", ":",     "http://user:secret@127.0.0.1:1", "postgresql://user:secret@[::1",
]  # fmt: skip


def numeric_flags() -> list[tuple[str, str, type]]:
    """Return (command, flag, kind) of every flag that takes a number."""
    (commands,) = (action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction))
    found = []
    for name, parser in commands.choices.items():
        for action in parser._actions:
            if action.type is not None and action.option_strings:
                whole = "whole" in getattr(action.type, "__qualname__", "")
                found.append((name, action.option_strings[-1], int if whole else float))
    return found


def test_there_are_numeric_flags():
    flags = numeric_flags()
    assert len(flags) >= 11 and {int, float} == {kind for _, _, kind in flags}


@pytest.mark.parametrize(("command", "flag", "kind"), numeric_flags())
def test_numbers_that_are_none(command, flag, kind):
    wrong = [*NO_NUMBERS, *(NO_WHOLE_NUMBERS if kind is int else [])]
    if flag in ("--samples", "--draws", "--workers", "--port", "--interval"):
        wrong.append("0")
    for text in wrong:
        outcome = rayndom([command, "at_digits", f"{flag}={text}"] if command != "ui" else [command, f"{flag}={text}"], SLOW_START_S)
        assert complaint(outcome, [flag], refused=True) is None, (text, outcome.said)


@pytest.mark.parametrize("address", ADDRESSES)
def test_addresses_of_no_store(tmp_path, monkeypatch, address):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    from orchestration.home import Home
    from orchestration.tracking.tracker import Tracker

    with pytest.raises(UserError) as refused:
        Tracker(Home.locate(tmp_path / "home"), "rayndom")
    said = str(refused.value)
    assert "MLflow" in said or "MLFLOW_TRACKING_URI" in said
    assert "secret" not in said
    assert {path.name for path in tmp_path.iterdir()} <= {"home"}, "nothing is made where the address seems to lead"


def test_a_folder_of_temporary_files_with_a_long_name(tmp_path, monkeypatch):
    from orchestration.training.cluster import connect

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path / ("t" * 100)))
    with pytest.raises(UserError, match="TMPDIR"):
        connect()


@pytest.mark.parametrize("folder", ["~nobody_of_this_name/home", "a\0b", "x" * 300, "/dev/null/home", "/proc/nothing/here"])
def test_homes_that_cannot_be(folder):
    for words in (["export", "0" * 16, "--to", "x"], ["train", "at_digits"]):
        outcome = rayndom([*words, "--home", folder], SLOW_START_S)
        assert complaint(outcome, [folder, repr(folder).strip("'")], refused=True, allowed=(2, 3)) is None, outcome.said


def test_a_home_that_cannot_be_determined(monkeypatch):
    monkeypatch.setenv("RAYNDOM_HOME", "~nobody_of_this_name")
    assert complaint(rayndom(["status"], SLOW_START_S), ["~nobody_of_this_name"], refused=True) is None
    for words in (
        ["show", "at_digits", "--recipes", "~nobody_of_this_name/x"],
        ["train", "at_digits", "--data-root", "~nobody_of_this_name"],
    ):
        assert complaint(rayndom(words, SLOW_START_S), ["~nobody_of_this_name"], refused=True) is None


@pytest.mark.parametrize("name", ["runs", "sweeps", "evaluations", "exports", "mlflow.db", "mlflow.db.lock"])
@pytest.mark.parametrize("as_folder", [True, False])
def test_a_file_where_a_folder_should_be_and_the_reverse(tmp_path, monkeypatch, name, as_folder):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    home = tmp_path / "home"
    home.mkdir()
    (home / name).mkdir() if as_folder else (home / name).write_text("x")
    for words in (["status"], ["list", "runs"], ["export", "at_digits", "--to", str(tmp_path / "out")], ["export", "0" * 16, "--to", "x"]):
        outcome = rayndom([*words, "--home", str(home)], SLOW_START_S)
        problem = complaint(outcome, [name, "at_digits", "0" * 16], refused=None, allowed=(0, 2, 3))
        assert problem is None, (words, problem, outcome.said)


@pytest.mark.parametrize(
    "text", ["<b>x</b>", "[a](http://b)", "*a*", "a|b", "`a`", "a\nb", "_a_", "<script>alert(1)</script>", "&lt;", "![x](y)", "# a", "$x$"]
)
def test_markup_is_shown_as_it_is(text):
    shown = escape(text)
    assert "\n" not in shown
    assert shown.replace("\\", "") == " ".join(text.split())
    for sign in "<>[]*`|&":
        assert shown.count(sign) == shown.count(f"\\{sign}")


def test_a_card_shows_names_of_classes_as_they_are():
    names = ["<img src=x onerror=alert(1)>", "[here](http://x)", "**loud**", "x" * 250, "two\n\n# lines"]
    record = {"metrics": {"validation/clean_accuracy": 0.5}, "selected_epoch": 1, "num_epochs": 1}
    (line,) = (line for line in model_card(load_recipe("at_digits").experiment, record, names).splitlines() if line.startswith("- data"))
    assert "\\<img" in line and "\\[here\\]" in line and "\\*\\*loud" in line and "lines" in line
    assert len(line) < 400


def test_names_without_markup_stay_as_they_are():
    for name in ("golf_ball", "t-shirt", "0", "Bücher", "a (b), c: d", "n01440764"):
        assert escape(name) == name


def test_a_hint_to_go_on_stands_only_where_it_is_true(tmp_path, monkeypatch):
    def broken(*_: object, **__: object) -> None:
        raise KeyError("finished_epochs")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, os.strerror(28), str(tmp_path / "x"))

    for raised, code, hint in ((broken, 1, False), (full, 3, True)):
        monkeypatch.setattr("orchestration.training.single_run.run_single", raised)
        outcome = rayndom(["train", "at_digits", "--home", str(tmp_path / "home")], SLOW_START_S)
        assert outcome.code == code
        assert ("goes on from there" in outcome.error) is hint, outcome.error
        monkeypatch.setattr("orchestration.training.dry_run.dry_run", raised)
        assert "goes on from there" not in rayndom(["train", "at_digits", "--dry-run", "--home", str(tmp_path / "home")]).error


def test_the_working_folder_may_be_gone(tmp_path, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    here = Path.cwd()
    try:
        os.chdir(gone)
        gone.rmdir()
        outcome = rayndom(["status", "--home", "relative"], SLOW_START_S)
    finally:
        os.chdir(here)
    assert complaint(outcome, ["relative", "deleted"], refused=True) is None, outcome.said
