"""`rayndom sweep` in a process of its own, for tests that end it in rude ways, and what its record must look like afterwards."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import optuna
import psutil
import pytest
from mlflow.entities import Run
from mlflow.tracking import MlflowClient
from optuna.trial import TrialState

from orchestration.home import Home
from orchestration.sweeping.study import superseded
from orchestration.tracking.tracker import FINGERPRINT_TAG, PARENT_TAG
from trainers.checkpoint import read_state

ROOT = Path(__file__).resolve().parents[2]
EVERY_EPOCH = ("train/loss", "validation/clean_accuracy", "time/epoch_seconds")


class SweepProcess:
    """One start of a sweep. Its lines go to a file; with `with`, nothing of it outlives the test.

    Args:
        sweep: name or YAML file. home: its home folder. log: file of its lines.
        flags: further arguments. environment: variables that differ from this process's.
    """

    def __init__(self, sweep: str | Path, home: Home, log: Path, flags: Sequence[str] = (), environment: dict[str, str] | None = None):
        command = [sys.executable, "-m", "orchestration.cli", "sweep", str(sweep), "--home", str(home.root), *flags]
        variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"} | (environment or {})
        self.log = log
        with log.open("w") as file:
            # Its own session, so that a signal to its group, as of Ctrl-C, does not reach the tests.
            self.process = subprocess.Popen(
                command, cwd=log.parent, stdout=file, stderr=subprocess.STDOUT, env=variables, start_new_session=True
            )
        self._seen: dict[int, psutil.Process] = {}

    def __enter__(self) -> SweepProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self._note()
        for process in (self.process, *self._seen.values()):
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                process.kill()
        self.process.wait()

    @property
    def text(self) -> str:
        """What it has printed."""
        return self.log.read_text(errors="replace")

    def wait_until(self, condition: Callable[[str], bool], seconds: float, what: str) -> str:
        """Wait until its lines satisfy a condition; return them. It must not end before."""
        deadline = time.monotonic() + seconds
        while not condition(self.text):
            self._note()
            if self.process.poll() is not None:
                pytest.fail(f"it ended with {self.process.returncode} before {what}:\n{self.text}")
            if time.monotonic() > deadline:
                pytest.fail(f"{what} did not come in {seconds} s:\n{self.text}")
            time.sleep(0.2)
        self._note()
        return self.text

    def wait(self, seconds: float) -> int:
        """Wait for its end; return the exit code."""
        deadline = time.monotonic() + seconds
        while self.process.poll() is None:
            self._note()
            if time.monotonic() > deadline:
                pytest.fail(f"it did not end in {seconds} s:\n{self.text}")
            time.sleep(0.2)
        return self.process.returncode

    def signal(self, number: int) -> None:
        """Send a signal to the driver alone."""
        self._note()
        self.process.send_signal(number)

    def kill_one(self, name: str) -> int:
        """Send SIGKILL to one of its processes whose command line contains `name`, e.g. `raylet`; return its id."""
        self._note()
        for process in self._seen.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                line = process.cmdline()
                if line and name in (line[0] if name.startswith("ray::") else os.path.basename(line[0])):
                    process.send_signal(signal.SIGKILL)
                    return process.pid
        pytest.fail(f"none of its processes is {name!r}")

    def left_over(self, seconds: float) -> list[str]:
        """Return which of its processes are still there after at most so many seconds."""
        living = psutil.wait_procs(list(self._seen.values()), timeout=seconds)[1]
        return [f"{process.pid} {' '.join(process.cmdline())[:80]}" for process in living if process.is_running()]

    def _note(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.process.pid).children(recursive=True):
                self._seen.setdefault(child.pid, child)


def runs_of(home: Home, kind: str, uri: str | None = None) -> list[Run]:
    """Return the MLflow runs of a kind."""
    client = MlflowClient(tracking_uri=uri or home.tracking_uri)
    experiment = client.get_experiment_by_name("rayndom")
    return list(client.search_runs([experiment.experiment_id], filter_string=f"tags.`rayndom.kind` = '{kind}'", max_results=1000))


def study_of(home: Home, name: str) -> optuna.Study:
    """Return the study of the only sweep of a home folder."""
    (path,) = home.root.glob("sweeps/*/study.db")
    return optuna.load_study(study_name=name, storage=f"sqlite:///{path}")


def assert_whole_record(home: Home, name: str, trials: int, uri: str | None = None) -> dict[str, int]:
    """Check that study and MLflow hold every trial once, whole, and nothing more; return figures.

    Study: nothing waits or runs; `trials` trials count. MLflow: one finished parent, one closed child per trial, in each child every
    epoch of every metric once, from the first to the last that the study knows of.
    """
    study = study_of(home, name)
    again = superseded(study)
    counted = [trial for trial in study.trials if trial.number not in again]
    assert len(counted) == trials, [trial.state for trial in study.trials]
    assert all(trial.state in (TrialState.COMPLETE, TrialState.PRUNED) for trial in counted), [trial.state for trial in study.trials]
    (parent,) = runs_of(home, "sweep", uri)
    children = runs_of(home, "trial", uri)
    by_fingerprint = {child.data.tags[FINGERPRINT_TAG]: child for child in children}
    assert len(children) == len(by_fingerprint) == len({trial.user_attrs["fingerprint"] for trial in counted})
    client = MlflowClient(tracking_uri=uri or home.tracking_uri)
    epochs = 0
    for trial in counted:
        child = by_fingerprint[trial.user_attrs["fingerprint"]]
        assert child.data.tags[PARENT_TAG] == parent.info.run_id
        assert child.info.status == "FINISHED", trial.number
        last = trial.user_attrs["epochs"]
        for metric in EVERY_EPOCH:
            steps = [each.step for each in client.get_metric_history(child.info.run_id, metric)]
            assert steps == list(range(1, last + 1)), (trial.number, metric, steps)
        epochs += last
        assert set(trial.values or []) <= set(child.data.metrics.values()), trial.number
    states = Counter(trial.state.name for trial in counted)
    return {"trials": trials, "children": len(children), "epochs": epochs, "run again": len(again), **states}


def run_folder_state(home: Home) -> dict[str, int]:
    """Return the number of run folders with a state, and the most epochs that one of them has finished."""
    states = [read_state(path.parent)["finished_epochs"] for path in home.root.glob("runs/*/training.pt")]
    return {"runs": len(states), "finished_epochs": max(states, default=0)}
