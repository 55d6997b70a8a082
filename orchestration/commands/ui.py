"""`rayndom ui`: MLflow on the right store, and optuna-dashboard for a sweep."""

from __future__ import annotations

import argparse
import contextlib
import glob
import os
import shutil
import subprocess
import sys
from pathlib import Path

from models.errors import UserError
from orchestration import console
from orchestration.commands.command import Command, whole_number

MODEL_TRAINING = "workflowType=machine_learning"
"""MLflow's view of runs and models; without it a new browser shows the one of agents and their traces."""
ENDING_S = 3
"""How long a server may take to end in good order."""


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--port", type=whole_number(1, 65_535), default=5000, help="port on this machine (default 5000)")
    parser.add_argument("--study", help="open this sweep's study in optuna-dashboard instead of MLflow")


def _run(arguments: argparse.Namespace) -> int:
    from orchestration.home import Home
    from orchestration.tracking.local_store import experiment_in, prepare_store
    from orchestration.tracking.store import display_uri

    home = Home.to_read(arguments.home)
    if not home.root.exists():
        home = Home.locate(arguments.home)
    environment = dict(os.environ)
    if arguments.study:
        matches = home.entries(f"sweeps/{glob.escape(arguments.study)}*/study.db")
        if not matches:
            raise UserError(f"no study of a sweep {arguments.study!r:.300} in {home.root / 'sweeps'}")
        beside = str(Path(sys.executable).parent)  # an environment that is not activated is not in PATH
        program = shutil.which("optuna-dashboard", path=beside) or shutil.which("optuna-dashboard")
        if program is None:
            raise UserError("optuna-dashboard is not installed: `make setup EXTRAS=dashboard` installs it")
        address = f"http://127.0.0.1:{arguments.port}"
        command = [program, f"sqlite:///{matches[-1]}", "--port", str(arguments.port)]
    else:
        if home.tracking_uri.startswith(("http://", "https://")):
            console.say(f"{display_uri(home.tracking_uri)}  (MLFLOW_TRACKING_URI names a server that runs already)")
            return 0
        prepare_store(home)  # made or mended as by every command: MLflow's server would make tables of its own while another one does
        experiment = experiment_in(home, "rayndom")
        runs = "" if experiment is None else f"/#/experiments/{experiment}/runs?{MODEL_TRAINING}"
        address = f"http://127.0.0.1:{arguments.port}{runs}"
        environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"  # ten processes for jobs that nobody here starts
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
            "--workers",
            "1",
        ]
    console.say(f"{address}  (Ctrl-C ends it)")
    return _serve(command, environment)


def _serve(command: list[str], environment: dict[str, str]) -> int:
    """Run a server until it ends or this process is told to; none of its processes outlives it."""
    import psutil

    server = subprocess.Popen(command, env=environment, start_new_session=True)
    # `kill -9` leaves this process no time to end the server: then the pipe's end does.
    watch = subprocess.Popen(["sh", "-c", 'read _; kill -TERM -"$0"', str(server.pid)], stdin=subprocess.PIPE, start_new_session=True)
    try:
        return server.wait()
    finally:
        watch.kill()
        watch.wait()
        processes = []
        with contextlib.suppress(psutil.NoSuchProcess):
            parent = psutil.Process(server.pid)
            processes = [*parent.children(recursive=True), parent]
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()
        for process in psutil.wait_procs(processes, timeout=ENDING_S)[1]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


UI = Command(
    "ui",
    "open MLflow on the home folder's store, or a sweep's study",
    ("rayndom ui", "rayndom ui --port 5001", "rayndom ui --study ctrw_bounds_digits"),
    _add,
    _run,
)
