"""A local Ray that starts beside another one: its processes know which one is theirs."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from orchestration.training import cluster

ASKS_FOR_STATE = """
import os
from orchestration.training import cluster

cluster.connect(num_cpus=1, dashboard=True)
assert "RAY_ADDRESS" not in os.environ, "what this process starts itself must not join by accident"
import ray

@ray.remote
def count_actors():
    from ray.util.state import list_actors

    return len(list_actors(timeout=60))

print("actors", ray.get(count_actors.remote()))
"""


SETTINGS = """
import orchestration.sweeping.sweep  # what `rayndom sweep` imports
from ray._private.ray_constants import RAY_ENABLE_UV_RUN_RUNTIME_ENV as ships_environment

print("ships", ships_environment)
"""


def test_ray_is_imported_after_its_settings():
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "TUNE_"))}
    done = subprocess.run([sys.executable, "-c", SETTINGS], env=plain, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.split() == ["ships", "False"], done.stderr[-2000:]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_workers_can_ask_for_their_rays_state_while_another_ray_runs(ray_cluster):
    done = subprocess.run([sys.executable, "-c", ASKS_FOR_STATE], capture_output=True, text=True, timeout=240, check=False)
    assert "actors 0" in done.stdout, done.stderr[-2000:]


@pytest.mark.parametrize(
    ("address", "of_the_job", "told"),
    [
        ("192.0.2.7:6379", {}, {"RAY_ADDRESS": "192.0.2.7:6379"}),
        ("ray://192.0.2.7:10001", {}, {}),
        ("192.0.2.7:6379", {"RAY_ADDRESS": "192.0.2.8:6379"}, {}),
    ],
)
def test_workers_of_a_cluster_are_told_which_ray_is_theirs(monkeypatch, address, of_the_job, told):
    """Else Ray Train's cleaner asks the newest Ray of its machine whether a group is still wanted, and ends a group that is well."""
    given = {}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"runtime_env": {"env_vars": of_the_job}}))
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(cluster.ray, "init", lambda **options: given.update(options))
    monkeypatch.setattr(cluster.ray, "cluster_resources", dict)
    for check in ("check_address", "check_token"):
        monkeypatch.setattr(cluster, check, lambda address: None)
    cluster.connect(address)
    assert given["address"] == address
    variables = given.get("runtime_env", {}).get("env_vars", {})
    assert {name: value for name, value in variables.items() if name == "RAY_ADDRESS"} == told
