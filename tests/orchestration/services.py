"""Real services on this machine's loopback, for tests: an MLflow server that can be stopped and started again."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest


def free_port() -> int:
    """Return a port of the loopback that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Service:
    """A process that serves; with `with`, neither it nor its children outlive the test.

    Args:
        command: what to run. log: file of its output.
        is_up: whether it answers. environment: variables that differ from this process's.
    """

    def __init__(
        self,
        command: Sequence[str],
        log: Path,
        is_up: Callable[[], bool],
        *,
        environment: dict[str, str] | None = None,
        user: str | None = None,
    ) -> None:
        self.command, self.log, self.is_up, self.environment, self.user = list(command), log, is_up, environment or {}, user
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Service:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self, seconds: float = 300) -> None:
        """Start it and wait until it answers."""
        with self.log.open("ab") as file:
            self.process = subprocess.Popen(
                self.command,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=os.environ | self.environment,
                start_new_session=True,
                user=self.user,
            )
        deadline = time.monotonic() + seconds
        while not self.is_up():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                pytest.fail(f"{self.command[0]} does not serve:\n{self.log.read_text(errors='replace')[-3000:]}")
            time.sleep(0.3)

    def stop(self) -> None:
        """End it and its children."""
        if self.process is None:
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=10)
        self.process = None


def answers(url: str) -> bool:
    """Return whether an HTTP server answers at all."""
    try:
        urllib.request.urlopen(url, timeout=2).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


class TrackingServer(Service):
    """An MLflow server.

    Args:
        folder: of its SQLite store and artifacts, unless `stores` name others.
        stores: flags of `mlflow server` for its stores.
    """

    def __init__(self, folder: Path, stores: Sequence[str] = (), environment: dict[str, str] | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        port = free_port()
        self.uri = f"http://127.0.0.1:{port}"
        own = ["--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}", "--artifacts-destination", str(folder / "artifacts")]
        command = [sys.executable, "-m", "mlflow", "server", *(stores or own), "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
        # Without the processes for jobs of its own, which nobody here gives it.
        variables = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"} | (environment or {})
        super().__init__(command, folder / "server.log", lambda: answers(f"{self.uri}/health"), environment=variables)
