"""Sweeps as Ray jobs. The commands against a client that only remembers; once, slow, against a head of its own."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from ray.job_submission import JobStatus

from models.errors import UserError
from orchestration.cli import main
from orchestration.sweeping import jobs
from orchestration.sweeping.jobs import SweepJobs
from tests.orchestration.sweep_process import assert_whole_record
from tests.orchestration.test_sweep_on_ray import write_sweep

ROOT = Path(__file__).resolve().parents[2]


class RememberingClient:
    """Stands in for Ray's client: remembers jobs, runs nothing."""

    def __init__(self, address):
        self.jobs = {}
        self.files = []

    def submit_job(self, *, entrypoint, runtime_env, metadata):
        job = f"raysubmit_{len(self.jobs)}"
        if "working_dir" in runtime_env:
            self.files += [path.name for path in Path(runtime_env["working_dir"]).rglob("*.yaml")]
        self.jobs[job] = SimpleNamespace(
            submission_id=job,
            entrypoint=entrypoint,
            runtime_env=runtime_env,
            metadata=metadata,
            status=JobStatus.RUNNING,
            start_time=len(self.jobs),
        )
        return job

    def list_jobs(self):
        return [*self.jobs.values(), SimpleNamespace(submission_id="other", metadata=None)]

    def get_job_info(self, job):
        return self.jobs[job]

    def stop_job(self, job):
        self.jobs[job].status = JobStatus.STOPPED

    def get_job_logs(self, job):
        return "a line\n"


@pytest.fixture
def client(monkeypatch):
    made = RememberingClient("")
    monkeypatch.setattr(jobs, "JobSubmissionClient", lambda address: made)
    return made


def test_submit_logs_stop_resume(client, capsys):
    assert main(["submit", "ctrw_bounds_digits", "--num_trials", "3", "--no-evaluation", "--home", "/srv/x"]) == 0
    assert client.jobs["raysubmit_0"].entrypoint == "rayndom sweep ctrw_bounds_digits --num_trials 3 --no-evaluation --home /srv/x"
    assert main(["resume", "ctrw_bounds_digits"]) == 2
    assert "nothing to resume" in capsys.readouterr().err
    assert main(["logs"]) == 0
    assert "a line" in capsys.readouterr().out
    assert main(["stop", "raysubmit_0"]) == 0
    assert main(["resume", "ctrw_bounds_digits"]) == 0
    again = client.jobs["raysubmit_1"]
    assert again.entrypoint == client.jobs["raysubmit_0"].entrypoint
    assert again.metadata["rayndom.resumes"] == "raysubmit_0"
    assert SweepJobs().find("ctrw_bounds_digits").id == "raysubmit_1"


def test_a_file_travels_with_the_job(client, tmp_path):
    path = write_sweep(tmp_path, trials=2, epochs=1)
    assert main(["submit", str(path)]) == 0
    assert client.files == ["tiny.yaml"]
    assert client.jobs["raysubmit_0"].entrypoint == "rayndom sweep submitted/tiny.yaml"


def test_a_mistake_is_found_before_the_cluster_is_asked(client, capsys):
    assert main(["submit", "ctrw_bounds_digits", "--num_trials", "0"]) == 2
    assert main(["stop", "nothing"]) == 2
    assert client.jobs == {}


def test_no_cluster_is_one_clear_message():
    with pytest.raises(UserError, match=r"no Ray cluster takes jobs at http://127\.0\.0\.1:9"):
        SweepJobs("http://127.0.0.1:9")


def test_a_token_is_shown_where_ray_would_find_it(monkeypatch, tmp_path):
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert jobs.token_headers() == {}
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("of-the-home\n")
    assert jobs.token_headers() == {"Authorization": "Bearer of-the-home"}
    (tmp_path / "named").write_text("of-the-file\n")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "named"))
    assert jobs.token_headers() == {"Authorization": "Bearer of-the-file"}
    monkeypatch.setenv("RAY_AUTH_TOKEN", "of-the-variable")
    assert jobs.token_headers() == {"Authorization": "Bearer of-the-variable"}
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert jobs.token_headers() == {}


def free_ports(count):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


TOKEN = secrets.token_hex(32)


@pytest.fixture
def private_head():
    """A Ray head of this test alone, which asks for a token. `ray stop` would end every Ray of the machine: its own processes are ended
    one by one."""
    # Its own folder: the default one has a file that tells every `ray.init` of this machine to join the latest head.
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # short: socket names below it have at most 107 characters
    gcs, dashboard, client_port, agent, grpc, metrics = free_ports(6)
    command = [
        str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--num-cpus=2", "--disable-usage-stats",
        f"--temp-dir={folder}", f"--port={gcs}", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1",
        f"--ray-client-server-port={client_port}", f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={grpc}",
        f"--metrics-export-port={metrics}",
    ]  # fmt: skip
    own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0", "PYTHONPATH": str(ROOT)}
    environment = os.environ | own | {"OMP_NUM_THREADS": "1"}
    head = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        yield SimpleNamespace(dashboard=f"http://127.0.0.1:{dashboard}", address=f"127.0.0.1:{gcs}")
    finally:
        own = psutil.Process(head.pid).children(recursive=True) if head.poll() is None else []
        with contextlib.suppress(ProcessLookupError):
            os.killpg(head.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            head.wait(timeout=20)
        for process in psutil.wait_procs(own, timeout=5)[1]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(head.pid, signal.SIGKILL)
        head.wait()
        shutil.rmtree(folder, ignore_errors=True)


def rayndom(address, *words, mode=None, environment=None, seconds=200):
    """Run a command against the head as on another computer: with the token, and nothing else said about it."""
    variables = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_MODE"} | {"RAY_AUTH_TOKEN": TOKEN}
    variables |= ({"RAY_AUTH_MODE": mode} if mode else {}) | (environment or {})
    command = [sys.executable, "-m", "orchestration.cli", *words, "--address", address]
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=seconds, check=False)


def wait_for_jobs(address):
    """Return once the head at an address takes jobs: its dashboard starts after it does."""
    deadline = time.monotonic() + 300
    while "no sweep was submitted" not in rayndom(address, "logs").stderr:
        assert time.monotonic() < deadline
        time.sleep(2)


def wait_for(address, job, words, seconds):
    deadline = time.monotonic() + seconds
    while True:
        shown = rayndom(address, "logs", job).stdout
        if words in shown:
            return shown
        if re.search(r"is (FAILED|SUCCEEDED)", shown) or time.monotonic() > deadline:
            pytest.fail(f"{words!r} did not come:\n{shown}")
        time.sleep(1)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_sweep_on_a_head_that_asks_for_a_token_is_stopped_and_resumed(private_head, home, tmp_path):
    head = private_head.dashboard
    deadline = time.monotonic() + 200
    while (known := rayndom(head, "logs")).returncode != 2 or "no sweep was submitted" not in known.stderr:
        assert time.monotonic() < deadline, known.stderr
        time.sleep(2)
    refused = rayndom(head, "logs", mode="disabled")
    assert refused.returncode == 2
    assert "token" in refused.stderr.lower()
    path = write_sweep(tmp_path, trials=2, epochs=4, train=320)
    program = f"{sys.executable} -m orchestration.cli"
    submitted = rayndom(head, "submit", str(path), "--no-evaluation", "--home", str(home.root), "--program", program)
    assert submitted.returncode == 0, submitted.stderr
    job = re.search(r"job (raysubmit_\w+)", submitted.stdout)[1]
    wait_for(head, job, "epoch 2/4", 300)
    assert main(["status", "tiny", "--home", str(home.root)]) == 0
    assert rayndom(head, "stop", "tiny").returncode == 0
    deadline = time.monotonic() + 100
    while "is STOPPED" not in rayndom(head, "logs", job).stdout:
        assert time.monotonic() < deadline
    resumed = rayndom(head, "resume", "tiny")
    assert resumed.returncode == 0, resumed.stderr
    second = re.search(r"job (raysubmit_\w+)", resumed.stdout)[1]
    assert second != job
    shown = wait_for(head, second, "winner exported", 400)
    assert TOKEN not in shown
    assert_whole_record(home, "tiny", 2)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_job_says_how_its_sweep_ended_and_a_wrong_token_is_one_message(private_head, home, tmp_path):
    head = private_head.dashboard
    wait_for_jobs(head)
    path = write_sweep(tmp_path, trials=2, epochs=1)
    program = f"{sys.executable} -m orchestration.cli"
    command = ("submit", str(path), "--no-evaluation", "--home", str(home.root), "--program", program, "--wait", "--stopping", "null")
    (home.root / "runs").write_text("a file where the folders of runs belong: every trial breaks")
    broken = rayndom(head, *command, seconds=600)
    assert broken.returncode == 1, broken.stdout
    assert re.search(r"job raysubmit_\w+ is FAILED", broken.stdout), broken.stdout
    assert "max_failed_share" in broken.stdout
    assert "winner exported" not in broken.stdout
    (home.root / "runs").unlink()
    whole = rayndom(head, *command, seconds=600)
    assert whole.returncode == 0, whole.stdout
    assert re.search(r"job raysubmit_\w+ is SUCCEEDED", whole.stdout), whole.stdout

    started = time.monotonic()
    own = {"RAY_AUTH_TOKEN": secrets.token_hex(32)}
    refused = rayndom(private_head.address, "sweep", str(path), "--home", str(home.root), environment=own)
    assert refused.returncode == 2
    assert re.findall("^error:.*", refused.stderr, re.M) == refused.stderr.strip().splitlines()[-1:], refused.stderr
    assert "refuses the token" in refused.stderr
    assert "gcs_client" not in refused.stderr
    assert time.monotonic() - started < 30, "most of it is the start of Python"
