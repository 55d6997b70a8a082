"""Text that is none of what a command takes, in every argument of every command: refused in one message that says which argument."""

from __future__ import annotations

import argparse
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from orchestration.cli import build_parser
from tests.fuzz.command_line import SEED, complaint, rayndom

FEW, MANY = 40, 700
RUN, OTHER = "04e9dcd8e27c21aa", "f3adf480c8de54f4"
TEXTS = (
    "", " ", "nowhere", "a\0b", "a\nb", "../..", "/", ".", "~nobody_of_this_name/x", "x" * 5000, "\udcff", "\x1b[31mred", "-", "--", "---x",
    "models:/", "models:/x", "models:/x@", "models:/x@y@z", "models:/x/0", "runs:/", "mlflow-artifacts:/x", "a,b", ",", "{}", "[", "null",
    "\u0661", "C:\\x", "http://", "http://127.0.0.1:1", "%s%n", "'", '"', "*", "?", "1e400", "nan", "at_digits@", "@", "#", "a=b", "=",
    "/dev/null", "/dev/zero", "/proc/self/mem", "a/b/c", "..", "*.py:build", "x.py:build", "x.py:", ":build", "timm:", "timm:nowhere",
    "ctrw.", ".table1",
)  # fmt: skip

JOBS = ("logs", "stop", "resume")
USE: dict[str, list[str]] = {
    "evaluate": [RUN, "--samples=10", "--workers=1"],
    "rescore": [RUN],
    "export": [RUN, "--to=out"],
    "analyse": [RUN, "--samples=4"],
    "compare": [RUN, OTHER],
    "status": [],
    "list": ["runs"],
    "show": ["at_digits"],
    "train": ["at_digits", "--dry-run"],
    "sweep": ["ctrw_bounds_digits", "--dry-run"],
    "reproduce": ["ctrw.table4", "--dry-run"],
    **{command: ["nowhere", "--address=http://127.0.0.1:1"] for command in JOBS},
}
"""Arguments with which a command would do something, soon: what is left out starts servers or a demo."""


@dataclass(frozen=True)
class Case:
    """A command with one wrong text, and what a message may call the argument."""

    words: list[str]
    names: list[str]


@pytest.fixture(autouse=True)
def nothing_is_trained(monkeypatch):
    """Dry runs train a few steps; here only what comes before is of interest."""
    report = SimpleNamespace(total_seconds=0.0, to_json=dict, rows=list)
    monkeypatch.setattr("orchestration.training.dry_run.dry_run", lambda experiment, workplace: report)


def cases() -> Iterator[Case]:
    """Yield each text in each argument."""
    (commands,) = (action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction))
    for command, base in USE.items():
        for action in commands.choices[command]._actions:
            if action.nargs == 0 or action.type is not None or action.dest == "home":
                continue
            for text in TEXTS:
                if action.dest in ("to", "address") and not text.strip(" /."):  # would write outside, or ask whatever Ray runs here
                    continue
                typed = [part for part in (text.strip()[:40], repr(text)[1:-1][:40]) if part]
                if action.option_strings:
                    flag = action.option_strings[-1]
                    # There is nothing to score again, and nobody who takes jobs: which of two mistakes is told first does not matter.
                    first = ["kept its points"] if command == "rescore" else ["127.0.0.1:1"] if command in JOBS else []
                    yield Case(
                        [command, *base, f"{flag}={text}"],
                        [flag, action.dest, *typed, *first, *(["plug-in"] if flag == "--plugin" else [])],
                    )
                else:
                    positional = [word for word in base if not word.startswith("-")]
                    rest = [*positional[1:], *(word for word in base if word.startswith("-"))]
                    said = {"items": "table or figure"}.get(action.dest, action.metavar or action.dest)
                    yield Case([command, text, *rest], [action.dest, said, *typed])


def try_cases(chosen: list[Case], earlier_home: Path, folder: Path) -> None:
    """Run each in a home of its own, from a folder of its own: what is accepted may leave files."""
    problems = []
    for index, case in enumerate(chosen):
        home = Path(shutil.copytree(earlier_home, folder / str(index) / "home", symlinks=True))
        (home / "mlflow.db").unlink()
        outcome = rayndom([*case.words, "--home", str(home)])
        problem = complaint(outcome, case.names, refused=None, allowed=(0, 2, 3))
        if problem:
            problems.append(f"{problem}: {' '.join(case.words)[:160]!r}: {outcome.error[:300]}")
        shutil.rmtree(folder / str(index))
    assert not problems, f"{len(problems)} of {len(chosen)} with seed {SEED}:\n" + "\n".join(problems)


def test_arguments(earlier_home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try_cases(random.Random(SEED + 60).sample(list(cases()), FEW), earlier_home, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_many_arguments(earlier_home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try_cases(random.Random(SEED + 61).sample(list(cases()), MANY), earlier_home, tmp_path)
