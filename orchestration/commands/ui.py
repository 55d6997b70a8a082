"""`rayndom ui`: MLflow on the right store, and optuna-dashboard for a sweep."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from models.errors import UserError
from orchestration import console
from orchestration.commands.command import Command


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--port", type=int, default=5000, help="port on this machine (default 5000)")
    parser.add_argument("--study", help="open this sweep's study in optuna-dashboard instead of MLflow")


def _run(arguments: argparse.Namespace) -> int:
    from orchestration.home import Home
    from orchestration.tracking.store import display_uri

    home = Home.locate(arguments.home)
    environment = dict(os.environ)
    if arguments.study:
        matches = sorted(home.root.glob(f"sweeps/{arguments.study}*/study.db"))
        if not matches:
            raise UserError(f"no study of a sweep {arguments.study!r} in {home.root / 'sweeps'}")
        beside = str(Path(sys.executable).parent)  # an environment that is not activated is not in PATH
        program = shutil.which("optuna-dashboard", path=beside) or shutil.which("optuna-dashboard")
        if program is None:
            raise UserError("optuna-dashboard is not installed: `make setup EXTRAS=dashboard` installs it")
        command = [program, f"sqlite:///{matches[-1]}", "--port", str(arguments.port)]
    else:
        if home.tracking_uri.startswith(("http://", "https://")):
            console.say(f"{display_uri(home.tracking_uri)}  (MLFLOW_TRACKING_URI names a server that runs already)")
            return 0
        # By the environment: a command line, and a password in it, is seen by everybody on this machine.
        environment["MLFLOW_BACKEND_STORE_URI"] = home.tracking_uri
        command = [sys.executable, "-m", "mlflow", "server"]
        command += [
            "--default-artifact-root",
            home.artifacts.as_uri(),
            "--host",
            "127.0.0.1",
            "--port",
            str(arguments.port),
        ]
    console.say(f"http://127.0.0.1:{arguments.port}  (Ctrl-C ends it)")
    return subprocess.call(command, env=environment)


UI = Command(
    "ui",
    "open MLflow on the home folder's store, or a sweep's study",
    ("rayndom ui", "rayndom ui --port 5001", "rayndom ui --study ctrw_bounds_digits"),
    _add,
    _run,
)
