"""Room that a sweep asks a cluster's autoscaler for: what is asked, when it is given back, and a real autoscaler that starts nodes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from orchestration.sweeping.loading import load_sweep
from orchestration.sweeping.proposals import StudySearch
from orchestration.sweeping.study import open_study
from orchestration.training import autoscaling
from orchestration.training.autoscaling import AskedRoom, bundles
from orchestration.training.resources import TrialResources, trials_that_fit
from tests.orchestration.services import free_port
from tests.orchestration.sweep_process import ROOT, SweepProcess, assert_whole_record
from tests.orchestration.test_sweep_on_ray import write_sweep

COMMANDS = (
    "cluster_synced_files", "initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands",
    "head_start_ray_commands", "worker_start_ray_commands", "rsync_exclude", "rsync_filter",
)  # fmt: skip
"""Of a cluster's file: the autoscaler wants to see them."""


@pytest.fixture
def heard(monkeypatch):
    """What a cluster was asked for, call by call."""
    calls = []
    monkeypatch.setattr(autoscaling, "request_resources", lambda bundles: calls.append(bundles))
    return calls


@pytest.mark.parametrize("trials", [1, 3, 10])
@pytest.mark.parametrize(
    "need",
    [
        TrialResources(1, 0, 1),
        TrialResources(6, 1, 1),
        TrialResources(24, 4, 4),
        TrialResources(2, 0.25, 1),
        TrialResources(2, 0.6, 2),
        TrialResources(16, 2, 1),
    ],
)
def test_what_is_asked_for_has_room_for_the_trials_and_not_for_more_than_a_node_shares(need, trials):
    asked = bundles(need, trials)
    fitting = trials_that_fit(need, asked)
    assert trials <= fitting
    assert trials_that_fit(need, asked[1:]) < trials, "nothing is asked for in vain"


def test_room_is_given_back_once_when_no_further_trial_begins(heard, tmp_path):
    config = load_sweep("ctrw_bounds_digits", {"num_trials": 2, "stopping": None})
    asked = AskedRoom(TrialResources(2, 0, 1), 2)
    search = StudySearch(config, open_study(config, tmp_path), asked=asked)
    assert isinstance(search.suggest("a"), dict) and isinstance(search.suggest("b"), dict)
    assert heard == [[{"CPU": 2.0}] * 2]
    assert search.suggest("c") == search.suggest("c") == "FINISHED"
    asked.give_back()
    assert heard == [[{"CPU": 2.0}] * 2, []]


def wait_for_head(address: str, head: subprocess.Popen, log: Path) -> None:
    """Return once the head is one of the cluster's nodes: before that whoever joins is told that there is no cluster."""
    from ray._raylet import GcsClient

    deadline, problem = time.monotonic() + 180, ""
    while True:
        assert head.poll() is None and time.monotonic() < deadline, f"{problem}\n{log.read_text(errors='replace')}"
        try:
            if GcsClient(address=address).get_all_node_info(timeout=5):
                return
        except Exception as error:  # each way in which it does not answer yet has an error of its own
            problem = str(error)
        time.sleep(1)


@pytest.fixture
def growing(tmp_path):
    """Address of a cluster whose head trains nothing and whose autoscaler starts nodes of one CPU on this machine, three at most."""
    import ray

    port = free_port()
    address = f"{ray.util.get_node_ip_address()}:{port}"
    config = {
        "cluster_name": "growing",
        "provider": {"type": "fake_multinode", "gcs_address": address},
        "max_workers": 3,
        "upscaling_speed": 10.0,
        "idle_timeout_minutes": 5,
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "worker": {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 3},
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        },
        "auth": {},
        "docker": {},
        **{key: {} for key in ("file_mounts", "head_node", "worker_nodes")},
        **{key: [] for key in COMMANDS},
    }
    file = tmp_path / "autoscaling.json"
    file.write_text(json.dumps(config))
    command = [sys.executable, "-c", "from ray.scripts.scripts import main; main()", "start", "--head", f"--port={port}", "--num-cpus=0",
               f"--autoscaling-config={file}", "--block"]  # fmt: skip
    environment = {"PYTHONPATH": str(ROOT), "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1", "RAY_AUTH_MODE": "disabled"}
    with (tmp_path / "head.log").open("wb") as log:
        head = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | environment, start_new_session=True)
    try:
        wait_for_head(address, head, tmp_path / "head.log")
        yield address
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            subprocess.run(["pkill", f"-{number.name.removeprefix('SIG')}", "--session", str(head.pid)], check=False)
            head.wait(60)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_a_sweep_makes_an_empty_cluster_grow(growing, home, tmp_path):
    path = write_sweep(tmp_path, trials=3, epochs=2, train=160, sampler="random")
    flags = ("--no-evaluation", "--address", growing)
    with SweepProcess(path, home, tmp_path / "without", flags) as sweep:
        assert sweep.wait(600) == 2, sweep.text
        assert "but there are 0 CPUs" in sweep.text
    with SweepProcess(path, home, tmp_path / "with", (*flags, "--autoscale_to", "2")) as sweep:
        assert sweep.wait(1500) == 0, sweep.text
        assert "asking the cluster for room for 2 trials at a time" in sweep.text
        assert "2 at a time" in sweep.text
    assert_whole_record(home, "tiny", 3)
