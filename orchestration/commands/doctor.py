"""`rayndom doctor`: is this machine ready, and how to mend what is not."""

from __future__ import annotations

import argparse
from pathlib import Path

from orchestration import console
from orchestration.commands.command import Command, add_data_root


def _run(arguments: argparse.Namespace) -> int:
    from orchestration.doctor import run_checks
    from orchestration.home import Home

    home = Home.locate(arguments.home)
    checks = run_checks(home.root, Path(arguments.data_root) if arguments.data_root else None)
    console.result([{"name": c.name, "status": c.status, "found": c.found, "mend": c.mend} for c in checks])
    console.table(None, ["check", "status", "found", "how to mend"], [(c.name, c.status, c.found, c.mend) for c in checks])
    return 1 if any(check.status == "fail" for check in checks) else 0


DOCTOR = Command(
    "doctor",
    "check versions, GPUs, Ray, MLflow, data sets and disk, and say how to mend what is wrong",
    ("rayndom doctor", "rayndom doctor --json"),
    add_data_root,
    _run,
)
