"""A sweep whose home is a bucket of an S3 server on the loopback, on a cluster whose nodes share nothing else; its driver is killed."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from models.weights import load_pretrained
from orchestration import storage as storages
from orchestration.home import Home
from orchestration.sweeping.study import superseded
from tests.orchestration.services import Service, answers, free_port
from tests.orchestration.sweep_process import ROOT, SweepProcess, assert_whole_record, study_of
from tests.orchestration.test_sweep_on_ray import write_sweep

SECRET = "wJalr-not-a-real-secret-key"
URL = "s3://team/homes/one"
LARGE = "exports/large/model.safetensors"
LACKING = [name for name in ("boto3", "moto", "s3fs") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.ray,
    pytest.mark.timeout(2400),
    pytest.mark.skipif(bool(LACKING), reason=f"not here: {', '.join(LACKING)}; `make setup EXTRAS=storage,services`"),
]


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """An S3 client of an empty bucket; variables of this process and its children lead to it."""
    import boto3

    address = f"http://127.0.0.1:{(port := free_port())}"
    variables = {
        "AWS_ACCESS_KEY_ID": "rayndom",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": address,
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with Service(command, tmp_path / "s3.log", lambda: answers(address)):
        client = boto3.client("s3")
        client.create_bucket(Bucket="team")
        yield client


@pytest.fixture
def other_node(tmp_path):
    """Address of a cluster whose head trains nothing: its only node with CPUs has another disk where copies of homes lie."""
    if shutil.which("unshare") is None:
        pytest.skip("there is no unshare")
    from ray.cluster_utils import Cluster

    cache = tmp_path / "cache"
    cache.mkdir()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": True, "dashboard_port": free_port()})
    ray = f"{sys.executable} -c 'from ray.scripts.scripts import main; main()' start --address {cluster.address} --num-cpus 2 --block"
    command = ["unshare", "--mount", "sh", "-c", f"mount -t tmpfs tmpfs {cache} && exec {ray}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with (tmp_path / "node.log").open("wb") as log:
        node = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True)
    try:
        yield cluster.address
    finally:
        subprocess.run(["pkill", "-TERM", "--session", str(node.pid)], check=False)
        node.wait(60)
        cluster.shutdown()


def keys(client) -> set[str]:
    pages = client.get_paginator("list_objects_v2").paginate(Bucket="team")
    return {item["Key"].removeprefix("homes/one/") for page in pages for item in page.get("Contents", [])}


def test_a_sweep_is_killed_on_one_machine_and_goes_on_from_another(bucket, other_node, tmp_path):
    path = write_sweep(tmp_path, trials=3, epochs=40, train=640)
    home = Home(Path(URL))  # for the command line alone; `Path` joins the slashes
    flags = ("--address", other_node, "--home", URL, "--max_concurrent_trials", "1", "--no-evaluation", "--stopping", "null")
    first = {storages.COPY_VARIABLE: str(tmp_path / "cache")}
    with SweepProcess(path, home, tmp_path / "1.log", flags, first) as sweep:
        sweep.wait_until(lambda text: "trial 1: epoch 2/40" in text, 900, "the second trial's second epoch")
        other = {storages.COPY_VARIABLE: str(tmp_path / "another-machine")}
        with SweepProcess(path, home, tmp_path / "2.log", flags, other) as second:
            assert second.wait(300) == 3, second.text
            assert "is written to by process" in second.text
        sweep.process.kill()
        sweep.process.wait()
    assert not list((tmp_path / "cache").glob("*/runs/*/training.pt")), "trained on another disk, as the test is about"
    with SweepProcess(path, home, tmp_path / "3.log", flags, other) as sweep:
        assert sweep.wait(1200) == 0, sweep.text
        assert "winner exported" in sweep.text
        assert re.search(r"[12] already over", sweep.text), sweep.text
    copy = Home(next((tmp_path / "another-machine").iterdir()))
    assert_whole_record(copy, "tiny", 3)
    assert len(superseded(study_of(copy, "tiny"))) == 1
    stored = keys(bucket)
    assert sum(key.endswith("/result.json") for key in stored) == 3
    assert {"mlflow.db", "exports/tiny/model.safetensors"} <= stored
    assert not any(key.endswith(".held") for key in stored)

    bucket.put_object(Bucket="team", Key=f"homes/one/{LARGE}", Body=bytes(storages.SMALL_BYTES + 1))
    # A colleague on a third machine has the model, by its name alone.
    environment = os.environ | {storages.COPY_VARIABLE: str(tmp_path / "third"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "orchestration.cli", "status", "tiny", "--home", URL]
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=True, cwd=tmp_path).stdout
    assert "3/3 trials over" in shown
    third = next((tmp_path / "third").iterdir())
    assert not (third / LARGE).exists(), "large weights wait until they are used"
    command = [sys.executable, "-m", "orchestration.cli", "export", next(iter(third.glob("runs/*"))).name, "--to", str(tmp_path / "model"),
               "--home", URL]  # fmt: skip
    subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=True, cwd=tmp_path)
    load_pretrained(tmp_path / "model")
    for log in tmp_path.glob("*.log"):
        assert SECRET not in log.read_text(errors="replace")
    assert not any(SECRET.encode() in file.read_bytes() for file in copy.root.rglob("*") if file.is_file())


def test_a_node_without_credentials_is_named_before_anything_is_trained(bucket, tmp_path):
    from ray.cluster_utils import Cluster

    path = write_sweep(tmp_path, trials=1, epochs=1)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1, env_vars={"AWS_SECRET_ACCESS_KEY": "", "AWS_ENDPOINT_URL": "http://127.0.0.1:9"})
        time.sleep(1)
        flags = ("--address", cluster.address, "--home", URL, "--no-evaluation")
        with SweepProcess(path, Home(Path(URL)), tmp_path / "log", flags, {storages.COPY_VARIABLE: str(tmp_path / "cache")}) as sweep:
            assert sweep.wait(400) == 2, sweep.text
            assert f"the home {URL} cannot be read on node" in sweep.text
    finally:
        cluster.shutdown()
