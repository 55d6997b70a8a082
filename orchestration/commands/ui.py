"""`rayndom ui`: MLflow on the right store, and optuna-dashboard for a sweep."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys

from models.errors import UserError
from orchestration import console
from orchestration.commands.command import Command


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--port", type=int, default=5000, help="port on this machine (default 5000)")
    parser.add_argument("--study", help="open this sweep's study in optuna-dashboard instead of MLflow")


def _run(arguments: argparse.Namespace) -> int:
    from orchestration.home import Home

    home = Home.locate(arguments.home)
    if arguments.study:
        matches = sorted(home.root.glob(f"sweeps/{arguments.study}*/study.db"))
        if not matches:
            raise UserError(f"no study of a sweep {arguments.study!r} in {home.root / 'sweeps'}")
        if shutil.which("optuna-dashboard") is None:
            raise UserError("optuna-dashboard is not installed: install the extra `dashboard`")
        command = ["optuna-dashboard", f"sqlite:///{matches[-1]}", "--port", str(arguments.port)]
    else:
        command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", home.tracking_uri]
        command += [
            "--default-artifact-root",
            home.artifacts.as_uri(),
            "--host",
            "127.0.0.1",
            "--port",
            str(arguments.port),
        ]
    console.say(f"http://127.0.0.1:{arguments.port}  (Ctrl-C ends it)")
    return subprocess.call(command)


UI = Command(
    "ui",
    "open MLflow on the home folder's store, or a sweep's study",
    ("rayndom ui", "rayndom ui --port 5001", "rayndom ui --study ctrw_bounds_digits"),
    _add,
    _run,
)
