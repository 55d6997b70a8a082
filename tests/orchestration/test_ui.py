"""`rayndom ui`: which program is started on which store, and what it is not told on its command line."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import psutil
import pytest

from orchestration.cli import main
from orchestration.commands import ui
from orchestration.sweeping.loading import load_sweep
from orchestration.sweeping.study import open_study
from tests.orchestration.services import answers, free_port
from tests.orchestration.sweep_process import ROOT


@pytest.fixture
def started(monkeypatch):
    """What `rayndom ui` starts: (command, environment)."""
    calls = []
    monkeypatch.setattr(ui, "_serve", lambda command, environment: calls.append((command, environment)) or 0)
    return calls


def test_mlflow_is_opened_on_the_home_folders_store(home, started, capsys):
    assert main(["ui", "--home", str(home.root), "--port", "5017"]) == 0
    ((command, environment),) = started
    assert command[:4] == [sys.executable, "-m", "mlflow", "server"]
    assert environment["MLFLOW_BACKEND_STORE_URI"] == f"sqlite:///{home.root / 'mlflow.db'}"
    assert home.artifacts.as_uri() in command
    assert "http://127.0.0.1:5017" in capsys.readouterr().out


def test_a_databases_password_is_not_on_the_command_line(home, started, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://someone:secret@host/mlflow")
    assert main(["ui", "--home", str(home.root)]) == 0
    ((command, _),) = started
    assert not any("secret" in word for word in command)


def test_a_server_that_runs_already_is_only_named(home, started, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://someone:secret@tracking:5000")
    assert main(["ui", "--home", str(home.root)]) == 0
    assert started == []
    shown = capsys.readouterr().out
    assert "http://tracking:5000" in shown
    assert "secret" not in shown


def test_a_study_is_opened_in_optuna_dashboard_or_the_missing_extra_is_named(home, started, monkeypatch, capsys):
    config = load_sweep("ctrw_bounds_digits", {"num_trials": 1})
    open_study(config, home.sweep("ctrw_bounds_digits-1"))
    monkeypatch.setattr(ui.shutil, "which", lambda name, path=None: None)
    assert main(["ui", "--study", "ctrw_bounds_digits", "--home", str(home.root)]) == 2
    assert "EXTRAS=dashboard" in capsys.readouterr().err
    monkeypatch.setattr(ui.shutil, "which", lambda name, path=None: f"/bin/{name}")
    assert main(["ui", "--study", "ctrw_bounds_digits", "--home", str(home.root)]) == 0
    ((command, _),) = started
    assert command[:2] == ["/bin/optuna-dashboard", f"sqlite:///{home.sweep('ctrw_bounds_digits-1') / 'study.db'}"]
    assert main(["ui", "--study", "nothing", "--home", str(home.root)]) == 2


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=["ctrl_c", "sigterm", "kill"])
def test_no_process_of_the_server_is_left_however_it_ends(home, tmp_path, number):
    port = free_port()
    words = ["ui", "--home", str(home.root), "--port", str(port)]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([sys.executable, "-m", "orchestration.cli", *words], cwd=ROOT, stdout=log, stderr=log)
    deadline = time.monotonic() + 300
    while not answers(f"http://127.0.0.1:{port}"):
        assert time.monotonic() < deadline and process.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.5)
    children = psutil.Process(process.pid).children(recursive=True)
    assert 1 <= len(children) <= 4
    process.send_signal(number)
    process.wait(30)
    assert [child for child in psutil.wait_procs(children, timeout=20)[1] if child.status() != psutil.STATUS_ZOMBIE] == []
