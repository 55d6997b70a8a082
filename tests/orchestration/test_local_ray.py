"""A local Ray that starts beside another one: its processes know which one is theirs."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

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
