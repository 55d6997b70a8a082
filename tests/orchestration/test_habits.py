"""What a person expects of any command line: near names, valid JSON, a clock, and a blame that names what was typed."""

from __future__ import annotations

import io
import json
import math
import random
import re

import pytest
from rich.console import Console

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


@pytest.mark.parametrize(
    ("words", "place"),
    [
        (["sweep", "zzzzqqqq"], "`rayndom list`"),
        (["reproduce", "zzzzqqqq"], "`rayndom reproduce`"),
        (["evaluate", "timm:zzzzqqqq", "--data", "digits"], "`timm.list_models()`"),
    ],
)
def test_names_that_are_not_printed_are_said_to_be_somewhere(capsys, home, words, place):
    assert place in refused(capsys, *words, "--home", str(home.root))


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


SENTENCE = "the median margin of the logits is 0.014 at so small a scale cross-entropy pulls"


def random_table(chosen):
    """Titles and rows of words and numbers such as commands print."""
    words = ["stopped early", "0.7955", "801.3", "finished", "12/12", "ctrw_digits", "996ec7b500daf4e4", "-3.2e-05", "2026-11-30", SENTENCE]
    titles = ["trial", "state", "validation/robust_accuracy", "defence.lower_bound", "clean %", "what it is", "minutes"]
    count = chosen.randrange(2, 8)
    return chosen.sample(titles, count), [[chosen.choice(words) for _ in range(count)] for _ in range(chosen.randrange(1, 4))]


@pytest.mark.parametrize("seed", range(60))
def test_a_narrow_screen_breaks_no_number_and_no_word(seed):
    """Where the longest words fit beside one another at all; and a table is never wider than the screen."""
    chosen = random.Random(seed)
    titles, rows = random_table(chosen)
    screen = chosen.choice([80, 100, 120])
    shown = io.StringIO()
    Console(file=shown, width=screen, highlight=False, emoji=False).print(console._table("a title", titles, rows, screen))
    lines = shown.getvalue().splitlines()
    assert max(map(len, lines)) <= screen
    longest = sum(max(len(word) for row in rows for word in row[index].split()) for index in range(len(titles)))
    if longest + sum(len(word) > 0 for word in titles) * 2 + 1 > screen:
        return
    seen = set(re.sub("[│┃]", " ", shown.getvalue()).split())
    for row in rows:
        for cell in row:
            assert {word for word in cell.split() if not re.search("[_/=]", word)} <= seen, shown.getvalue()


def test_status_of_a_sweep_fits_eighty_columns_whole():
    titles = ["trial", "state", "epoch", "lower_bound", "upper_bound", "clean %", "robust %", "validation/robust_accuracy", "minutes"]
    rows = [["0", "stopped early", "4/12", "707.7", "2529", "59.1", "23.8", "", "0.3"], ["1*", "finished", "12/12", "801.3", "1924", "99.7",
            "79.5", "0.7955", "0.6"]]  # fmt: skip
    shown = io.StringIO()
    Console(file=shown, width=80, highlight=False, emoji=False).print(console._table("a sweep", titles, rows, 80))
    assert "│stopped early│4/12 │707.7" in shown.getvalue() and "12/12" in shown.getvalue()
