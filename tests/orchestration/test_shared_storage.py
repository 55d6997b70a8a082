"""A cluster whose nodes have disks of their own is refused before anything is trained there."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from models.errors import UserError
from orchestration.training.shared_storage import SharedStorage, probed


@pytest.fixture
def answers(ray_cluster, monkeypatch):
    """What nodes say that they read: `SharedStorage` asks this instead of them."""
    import ray

    said = {}
    return said, lambda file, node: ray.put(said[node])


@pytest.mark.ray
def test_a_node_with_another_disk_is_named(answers, tmp_path):
    from orchestration.training.shared_storage import _digest

    said, ask = answers
    file = tmp_path / "probe"
    file.write_text("seen")
    said |= {"one": _digest(file), "two": None, "three": "of another file"}
    nodes = {"one": "10.0.0.1"}
    storage = SharedStorage(file, lambda: nodes, ask)
    storage.check()
    storage.look()
    nodes["two"] = "10.0.0.2"  # it joins later
    nodes["three"] = "10.0.0.3"
    with pytest.raises(UserError, match=r"not the same on nodes 10\.0\.0\.2, 10\.0\.0\.3 .*--home"):
        storage.check()


@pytest.mark.ray
def test_one_machine_shares_its_disk_with_itself_and_keeps_no_probe(ray_cluster, tmp_path):
    with probed(tmp_path / "home") as storage:
        storage.look()
    assert list((tmp_path / "home").iterdir()) == []


@pytest.mark.ray
@pytest.mark.slow
def test_a_node_that_has_a_disk_of_its_own_there_is_refused(tmp_path):
    """Two real nodes on this machine, the second in a mount namespace where the home folder is another file system."""
    if shutil.which("unshare") is None:
        pytest.skip("there is no unshare")
    from ray.cluster_utils import Cluster

    home = tmp_path / "home"
    home.mkdir()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    ray_command = (
        f"{sys.executable} -c 'from ray.scripts.scripts import main; main()' start --address {cluster.address} --num-cpus 1 --block"
    )
    other = subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", f"mount -t tmpfs tmpfs {home} && exec {ray_command}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    program = f"""
import time, ray
from pathlib import Path
from models.errors import UserError
from orchestration.training import cluster
from orchestration.training.shared_storage import probed
cluster.connect({cluster.address!r})
for _ in range(120):
    if sum(node["Alive"] for node in ray.nodes()) == 2:
        break
    time.sleep(0.5)
else:
    print("the node did not join")
try:
    with probed(Path({str(home)!r})):
        print("accepted")
except UserError as error:
    print("refused:", error)
"""
    try:
        outcome = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False)
        if "did not join" in outcome.stdout:
            pytest.skip(f"no second node with a disk of its own can be made here: {other.stdout and other.stdout.read(500)}")
        assert "refused: the folder" in outcome.stdout, outcome.stdout + outcome.stderr
        assert "not the same on node" in outcome.stdout
    finally:
        subprocess.run(["pkill", "-TERM", "--session", str(other.pid)], check=False)
        other.wait(60)
        cluster.shutdown()
