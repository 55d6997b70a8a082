"""A local Ray that starts beside another one: its processes know which one is theirs."""

from __future__ import annotations

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


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_workers_can_ask_for_their_rays_state_while_another_ray_runs(ray_cluster):
    done = subprocess.run([sys.executable, "-c", ASKS_FOR_STATE], capture_output=True, text=True, timeout=240, check=False)
    assert "actors 0" in done.stdout, done.stderr[-2000:]
