"""What a person expects of any command line: near names, valid JSON, a clock, and a blame that names what was typed."""

from __future__ import annotations

import json
import math
import re

import pytest

from orchestration import console
from orchestration.cli import build_parser, main
from orchestration.commands import COMMANDS


def refused(capsys, *arguments):
    assert main([*arguments]) == 2
    error = capsys.readouterr().err.removeprefix("error: ").strip()
    assert len(error) < 600, "a message fits a screen"
    return error


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("epochs", "training.epochs"),
        ("batch_size", "training.batch_size"),
        ("epsilon", "threat_model.epsilon"),
        ("trainning.epochs", "training"),
    ],
)
def test_a_wrong_flag_is_blamed_on_the_flag_and_the_right_one_is_named(capsys, typed, meant):
    error = refused(capsys, "train", "at_digits", f"--{typed}", "3")
    assert f"--{typed}: unknown field" in error
    assert f"Did you mean '{meant}'" in error


def test_a_value_that_does_not_fit_names_its_flag(capsys):
    assert "--training.epochs" in refused(capsys, "train", "at_digits", "--training.epochs", "many")


@pytest.mark.parametrize("command", [each for each in COMMANDS if not each.takes_fields], ids=lambda each: each.name)
def test_every_flag_that_is_nearly_right_is_recognised(capsys, command):
    parser = next(action for action in build_parser()._actions if action.dest == "command").choices[command.name]
    positional = [action for action in parser._actions if not action.option_strings and action.nargs not in ("?", "*")]
    needed = [next(iter(action.choices or ("x",))) for action in positional]
    needed += [part for action in parser._actions if action.option_strings and action.required for part in (action.option_strings[0], "x")]
    for flag in parser.flags():
        if len(flag) < 8:  # of so short a name too little is left
            continue
        mistyped = flag[:-1] + "qq"
        assert f"{mistyped!r}. Did you mean {flag}?" in refused(capsys, command.name, *needed, mistyped), flag


def test_a_wrong_choice_names_the_nearest(capsys):
    assert "Did you mean 'recipes'" in refused(capsys, "list", "recipies")
    assert "Did you mean 'list'" in refused(capsys, "lst")


def test_names_far_from_all_others_print_no_page(capsys):
    assert "There are" in refused(capsys, "sweep", "zzzzqqqq")


def test_list_alone_says_what_can_be_listed(capsys, home):
    assert main(["list", "--json"]) == 0
    for each in json.loads(capsys.readouterr().out):
        assert main(["list", each["name"], "--json", "--home", str(home.root)]) == 0
        json.loads(capsys.readouterr().out)


def test_json_is_valid_whatever_the_numbers_are(capsys):
    console.use_json(True)
    try:
        console.result({"a": [math.inf, math.nan, 1.5], "b": {"c": -math.inf, 3: (True, None)}})
    finally:
        console.use_json(False)

    def refuse(word):
        raise AssertionError(word)

    assert json.loads(capsys.readouterr().out, parse_constant=refuse) == {"a": [None, None, 1.5], "b": {"c": None, "3": [True, None]}}


def test_a_line_of_progress_carries_the_time(capsys):
    with console.Board("title", ["column"]) as board:
        board.show([["x"]], "caption", "trial 3: epoch 2/5")
    assert re.fullmatch(r"\d\d:\d\d:\d\d  trial 3: epoch 2/5\n", capsys.readouterr().out)
