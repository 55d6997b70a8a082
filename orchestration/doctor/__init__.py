"""Is this machine ready, and how to mend what is not: findings as data, for the command line, for JSON and for tests.

`run_checks` looks at the installation, the machine, the services (Ray, MLflow, Optuna) and the data sets, in that order. It changes
nothing, and it waits for no server longer than a few seconds.
"""

from __future__ import annotations

from pathlib import Path

from orchestration.doctor.check import Check
from orchestration.doctor.datasets import check_datasets
from orchestration.doctor.installation import check_installation
from orchestration.doctor.machine import check_machine
from orchestration.doctor.services import check_services
from orchestration.home import Home

__all__ = ["Check", "run_checks"]


def run_checks(home: Path, data_root: Path | None = None) -> list[Check]:
    """Return all findings; none of them is raised.

    Args:
        home: home folder of runs, sweeps and the MLflow store; it need not exist yet.
        data_root: folder of the data sets; None: the environment variable RAYNDOM_DATA, else ./data.
    """
    place = Home(home.absolute())
    return [*check_installation(), *check_machine(place), *check_services(place), *check_datasets(data_root)]
