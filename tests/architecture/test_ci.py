"""What `.ci/run` prints last and how it ends, with a `make` that only says what it was asked for."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.architecture.source import ROOT

FAKE_MAKE = """#!/bin/bash
echo "$1" >> asked
case "$1" in
check) exit {check} ;;
test) echo "=== 3 passed in 0.12s ==="; [ {test} = 0 ] || {{ echo "make: *** [Makefile:32: test] Error {test}" >&2; exit 2; }} ;;
esac
"""


def run(folder: Path, check: int, test: int) -> tuple[int, str, list[str]]:
    """Return the exit code, the last line and the tasks that were asked for."""
    (folder / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", folder / ".ci" / "run")
    make = folder / "bin" / "make"
    make.parent.mkdir()
    make.write_text(FAKE_MAKE.format(check=check, test=test))
    make.chmod(0o755)
    environment = os.environ | {"PATH": f"{make.parent}{os.pathsep}{os.environ['PATH']}"}
    finished = subprocess.run([folder / ".ci" / "run"], env=environment, capture_output=True, text=True, timeout=30, check=False)
    return finished.returncode, finished.stdout.splitlines()[-1], (folder / "asked").read_text().split()


def test_a_failed_check_fails_before_any_test_runs(tmp_path: Path) -> None:
    code, last, asked = run(tmp_path, check=2, test=0)
    assert code != 0 and asked == ["check"]
    assert "make check failed" in last


@pytest.mark.parametrize("test", [0, 1, 4])
def test_after_good_checks_the_closing_line_of_the_tests_is_the_last(tmp_path: Path, test: int) -> None:
    code, last, asked = run(tmp_path, check=0, test=test)
    assert (code, last, asked) == (test, "=== 3 passed in 0.12s ===", ["check", "test"])
