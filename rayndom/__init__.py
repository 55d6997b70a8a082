"""Rayndom from Python, in a script or a notebook: the same records as the command line.

    from rayndom import train, evaluate, load

    run = train("ctrw_digits", {"training.epochs": 2})
    found = evaluate(run, num_samples=100)
    model = load("ctrw_digits")

Every call goes on where an earlier one stopped, or reuses what is finished, as the command of the same name does; mistakes are
`models.errors.UserError`. What is returned shows itself in a notebook and gives data frames and figures.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rayndom.evaluations import Evaluated, evaluate
    from rayndom.reproductions import Reproduced, reproduce
    from rayndom.runs import Run, load, train
    from rayndom.sweeps import Swept, sweep

__all__ = ["Evaluated", "Reproduced", "Run", "Swept", "evaluate", "load", "reproduce", "sweep", "train"]

_PLACES = {
    "Evaluated": "evaluations",
    "evaluate": "evaluations",
    "Reproduced": "reproductions",
    "reproduce": "reproductions",
    "Run": "runs",
    "load": "runs",
    "train": "runs",
    "Swept": "sweeps",
    "sweep": "sweeps",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for: Ray is nothing that `load` needs.

    Raises:
        ImportError: a module of yours has the name of one of our packages.
    """
    if name in _PLACES:
        _check_names()
        return getattr(importlib.import_module(f"rayndom.{_PLACES[name]}"), name)
    raise AttributeError(f"module 'rayndom' has no attribute {name!r}")


def _check_names() -> None:
    """Raise an ImportError where `models` or another of our packages is somebody else's: a script's folder comes first in Python's path."""
    for package in ("models", "trainers", "analysis", "orchestration"):
        found = importlib.util.find_spec(package)
        origin = None if found is None else found.origin
        if origin is None or Path(origin).resolve().parent.parent != Path(__file__).resolve().parent.parent:
            raise ImportError(
                f"Rayndom has a package {package!r}, and {origin} hides it; rename that file, or start Python in another folder"
            )


def __dir__() -> list[str]:
    return sorted(__all__)
