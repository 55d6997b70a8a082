"""Plug-ins of one computer on a cluster: a submitted job and nodes that share nothing with it have what was named, and nothing else."""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path

import pytest

from orchestration import storage as storages
from orchestration.home import Home
from tests.orchestration.sweep_process import ROOT, SweepProcess
from tests.orchestration.test_jobs import private_head, rayndom, wait_for_jobs  # noqa: F401
from tests.orchestration.test_plugins import EXAMPLE
from tests.orchestration.test_storage_on_s3 import LACKING, URL, bucket, keys, other_node  # noqa: F401

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(1800)]

STRIPES = """\
import torch
from trainers.data.array_files import RawImages
from trainers.data.sets import DatasetInfo


def read(root):
    labels = torch.arange(160) % 2
    pixels = torch.where(labels.bool(), 200, 40).view(-1, 1, 1, 1).expand(-1, 1, 8, 8).to(torch.uint8)
    return RawImages(pixels, labels, pixels[:40], labels[:40], ("dark", "bright"))


DATA_SETS = (DatasetInfo("stripes", "made", 2, (1, 8, 8), (0.5,), (0.25,), read=read),)
"""
SWEEP = """\
recipe: random_resizing_digits
num_trials: 2
stopping: null
settings:
  data.name: stripes
  data.image_size: 8
  data.limit_train: 96
  data.validation_size: 32
  training.epochs: 1
  training.batch_size: 32
  training.attack.steps: 1
  training.validation.steps: 1
space:
  defence.growth: {type: float, low: 1.3, high: 1.6}
"""


def plugins_in(folder: Path) -> list[str]:
    """Flags that name two plug-ins there: a folder with a defence and a recipe, and one module with a data set."""
    shutil.copytree(EXAMPLE / "rayndom_random_resizing", folder / "rayndom_random_resizing")
    (folder / "plug_stripes.py").write_text(STRIPES)
    return [word for name in ("rayndom_random_resizing", "plug_stripes.py") for word in ("--plugin", str(folder / name))]


def test_a_submitted_job_has_its_plugins(private_head, home, tmp_path):
    head = private_head.dashboard
    wait_for_jobs(head)
    flags = plugins_in(tmp_path / "here")
    (tmp_path / "plugged.yaml").write_text(SWEEP)
    program = f"{sys.executable} -m orchestration.cli"
    words = ("submit", str(tmp_path / "plugged.yaml"), "--no-evaluation", "--home", str(home.root), "--program", program, *flags)
    submitted = rayndom(head, *words)
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    shutil.rmtree(tmp_path / "here")  # before anything can have been read from it there
    deadline = time.monotonic() + 900
    while not any(word in (shown := rayndom(head, "logs", "plugged").stdout) for word in ("is SUCCEEDED", "is FAILED")):
        assert time.monotonic() < deadline, shown
        time.sleep(3)
    assert "is SUCCEEDED" in shown, shown
    export = json.loads((home.root / "exports" / "plugged" / "config.json").read_text())
    assert (export["model"]["defence"], export["model"]["num_classes"]) == ("random_resizing", 2)


@pytest.mark.skipif(bool(LACKING), reason=f"not here: {', '.join(LACKING)}; `make setup EXTRAS=storage,services`")
def test_nodes_that_share_nothing_are_sent_the_plugins(bucket, other_node, tmp_path):
    """The node's own disk hides the folder of the plug-ins, and copies of the home: only the bucket is common."""
    flags = ("--address", other_node, "--home", URL, "--no-evaluation", *plugins_in(tmp_path / "cache" / "plugged"))
    (tmp_path / "plugged.yaml").write_text(SWEEP)
    variables = {storages.COPY_VARIABLE: str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    with SweepProcess(tmp_path / "plugged.yaml", Home(Path(URL)), tmp_path / "log", flags, variables) as sweep:
        assert sweep.wait(1200) == 0, sweep.text
        assert "winner exported" in sweep.text
    assert "exports/plugged/model.safetensors" in keys(bucket)
