"""Sweeps as Ray jobs. The commands against a client that only remembers; once, slow, against a head of its own."""

from __future__ import annotations

import contextlib
import os
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
from tests.orchestration.test_sweep_on_ray import assert_no_duplicates, write_sweep

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


def free_ports(count):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@pytest.fixture
def private_head():
    """A Ray head of this test alone. `ray stop` would end every Ray of the machine, so its own processes are ended one by one."""
    # Its own folder: the default one has a file that tells every `ray.init` of this machine to join the latest head.
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # short: socket names below it have at most 107 characters
    gcs, dashboard, client_port, agent, grpc, metrics = free_ports(6)
    command = [
        str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--num-cpus=2", "--disable-usage-stats",
        f"--temp-dir={folder}", f"--port={gcs}", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1",
        f"--ray-client-server-port={client_port}", f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={grpc}",
        f"--metrics-export-port={metrics}",
    ]  # fmt: skip
    environment = os.environ | {"RAY_AUTH_MODE": "disabled", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
    head = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        yield f"http://127.0.0.1:{dashboard}"
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


def wait_for(jobs_there, job, words, seconds):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if words in jobs_there.logs(job):
            return
        if jobs_there.status(job) in ("FAILED", "SUCCEEDED"):
            break
        time.sleep(1)
    pytest.fail(f"{words!r} did not come:\n{jobs_there.logs(job)}")


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_sweep_on_a_head_of_its_own_is_stopped_and_resumed(private_head, home, tmp_path):
    deadline = time.monotonic() + 90
    while True:
        try:
            there = SweepJobs(private_head)
            there.list()
            break
        except (UserError, RuntimeError):
            if time.monotonic() > deadline:
                raise
            time.sleep(2)
    path = write_sweep(tmp_path, trials=2, epochs=4, train=320)
    environment = {"PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    first = there.submit(str(path), ["--no-evaluation", "--home", str(home.root)], (sys.executable, "-m", "orchestration.cli"), environment)
    wait_for(there, first, "epoch 2/4", 200)
    there.stop(first)
    deadline = time.monotonic() + 60
    while there.status(first) == "RUNNING":
        assert time.monotonic() < deadline
        time.sleep(1)
    second = there.resume("tiny")
    wait_for(there, second, "winner exported", 250)
    while there.status(second) == "RUNNING":
        time.sleep(1)
    assert there.status(second) == "SUCCEEDED"
    assert_no_duplicates(home, 2)
