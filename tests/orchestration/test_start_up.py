"""What a command imports before it works: a terminal answers at once only if help and lists bring no large library."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from orchestration.commands import COMMANDS
from orchestration.commands.looking_up import KINDS

HEAVY = ("torch", "ray", "mlflow", "optuna", "scipy", "matplotlib", "numpy", "pandas", "sklearn", "pydantic", "sqlalchemy")
SCHEMAS = {"torch", "numpy", "pydantic"}
"""What the configuration's own classes bring: they stand beside the networks and losses that they set."""

WITH_SCHEMAS = ["list defences", "list backbones", "list datasets", "list objectives", "list suites", "list attacks", "show ctrw_digits"]
WITH_FIELDS = ["sweep --help", "simulate --help"]
"""They print the fields of a sweep."""

EVERYTHING = ["--help", "--version", *(f"{command.name} --help" for command in COMMANDS), *(f"list {kind}" for kind in KINDS)]

PROGRAM = """
import json, sys
from orchestration.cli import main
found = {}
for line in json.loads(sys.argv[1]):
    try:
        main(line.split())
    except SystemExit:
        pass
    found[line] = [name for name in json.loads(sys.argv[2]) if name in sys.modules]
print(json.dumps(found), file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("lines", "allowed"),
    [
        ([line for line in EVERYTHING if line not in (*WITH_SCHEMAS, *WITH_FIELDS)], set()),
        (WITH_SCHEMAS, SCHEMAS),
        (WITH_FIELDS, {"pydantic"}),
    ],
    ids=["light", "schemas", "fields"],
)
def test_a_command_imports_what_it_needs(lines, allowed):
    """The lines of a case run one after another in a fresh process; the first that brings too much is the one to mend."""
    command = [sys.executable, "-c", PROGRAM, json.dumps(lines), json.dumps(HEAVY)]
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(finished.stderr.splitlines()[-1])
    assert list(found) == lines
    assert {line: modules for line, modules in found.items() if not set(modules) <= allowed} == {}
