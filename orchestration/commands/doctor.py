"""`rayndom doctor`: is this machine ready, and how to mend what is not."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from models.file_content import absolute
from orchestration import console
from orchestration.commands.command import Command, add_data_root

if TYPE_CHECKING:
    from orchestration.doctor.check import Check
    from orchestration.storage import Storage


def run_checks(home: Path, data_root: Path | None = None, store: Storage | None = None) -> list[Check]:
    """Return all findings on the installation, the machine, the services (Ray, MLflow, Optuna) and the data sets; none of them is raised.

    Nothing is changed, and no server is waited for longer than a few seconds.

    Args:
        home: home folder of runs, sweeps and the MLflow store; it need not exist yet.
        data_root: folder of the data sets; None: the environment variable RAYNDOM_DATA, else ./data.
        store: of a home in an object store, of which `home` is the copy here.
    """
    from orchestration.doctor.installation import check_installation
    from orchestration.doctor.machine import check_datasets, check_machine
    from orchestration.doctor.services import check_services
    from orchestration.home import Home

    place = Home(home.absolute())
    return [*check_installation(), *check_machine(place, store), *check_services(place), *check_datasets(data_root)]


def _run(arguments: argparse.Namespace) -> int:
    from orchestration.home import Home, home_url
    from orchestration.storage import Storage

    # A store is not opened as commands open it: while a driver writes to it on another machine, this one shall be able to join.
    url = home_url(arguments.home)
    store = Storage.locate(url) if url else None
    root = store.root if store else Home.locate(arguments.home).root
    checks = run_checks(root, absolute(arguments.data_root) if arguments.data_root else None, store)
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
