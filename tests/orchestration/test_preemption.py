"""Notice that a machine will be taken away: when it is looked for, what is written on it, and a node that is really drained."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from orchestration.home import Home, Workplace
from orchestration.recipes import load_recipe
from orchestration.training.job import TrainingJob
from orchestration.training.preemption import LOOK_EVERY_S, TIMED_STEPS, GroupNotice, TrialNotice
from orchestration.training.training_run import train_here
from tests.orchestration.services import free_port
from tests.orchestration.sweep_process import SweepProcess, assert_whole_record
from tests.orchestration.test_sweep_on_ray import write_sweep
from trainers.within_epoch import FOLDER


@pytest.mark.parametrize("step_seconds", [0.001, 0.3, 5.0])
def test_workers_ask_together_and_seldom(step_seconds):
    """Two workers, one of them slower at first: both ask after the same steps, about every two seconds."""
    now, asked, agreed = [0.0], {0: [], 1: []}, []
    notices = {}
    for rank in (0, 1):
        notices[rank] = GroupNotice(
            ask=lambda rank=rank: asked[rank].append(notices[rank].steps),
            agree=lambda value, rank=rank: agreed.append(value) or agreed[0],
            clock=lambda rank=rank: now[0] * (1 + rank),
        )
    steps = max(20, int(10 / step_seconds))
    for _ in range(steps):
        for rank in (0, 1):
            assert not notices[rank]()
        now[0] += step_seconds
    assert asked[0] == asked[1]
    assert 1 <= len(asked[0]) <= 1.1 * (1 + steps * step_seconds / min(LOOK_EVERY_S, max(LOOK_EVERY_S, step_seconds)))
    assert asked[0][0] <= TIMED_STEPS + LOOK_EVERY_S / step_seconds + 1
    notices[0].ask = notices[1].ask = lambda: "soon"
    seen = [[notices[rank]() for _ in range(agreed[0] + 1)] for rank in (0, 1)]
    assert seen[0] == seen[1]
    assert seen[0][-1]


@pytest.mark.ray
def test_a_trial_looks_for_its_own_node_now_and_then(ray_cluster):
    now, looked, gone = [0.0], [], set()
    notice = TrialNotice(draining=lambda: looked.append(now[0]) or gone, clock=lambda: now[0])
    for _ in range(100):
        assert not notice()
        now[0] += 0.1
    assert len(looked) <= 5
    gone.add("another node")
    now[0] += LOOK_EVERY_S
    assert not notice()
    gone.add(notice.node)
    now[0] += LOOK_EVERY_S
    assert notice()
    gone.clear()
    assert notice(), "what was announced happens"


TINY = [
    "--data.limit_train", "96", "--data.validation_size", "32", "--data.limit_test", "16", "--data.image_size", "8", "--training.epochs",
    "2", "--training.batch_size", "16", "--training.attack.steps", "1", "--training.validation.steps", "1", "--training.precision", "fp32",
]  # fmt: skip


class Gone(BaseException):
    """Stands in for the end of the machine."""


def test_on_notice_at_most_one_step_is_lost_and_the_run_ends_as_if_nothing_had_happened(tmp_path):
    experiment = load_recipe("ctrw_digits", TINY).experiment
    whole = train_here(TrainingJob.at(Workplace(Home.locate(tmp_path / "whole")), experiment))
    job = TrainingJob.at(Workplace(Home.locate(tmp_path / "home")), experiment)
    steps = []

    def taken_away(step: int, num_steps: int) -> None:
        steps.append(step)
        if len(steps) == 9:
            raise Gone

    with pytest.raises(Gone):
        train_here(job, on_step=taken_away, leaving=lambda: len(steps) >= 7)
    assert steps == [1, 2, 3, 4, 5, 6, 1, 2, 3]
    resumed = []
    result = train_here(job, on_step=lambda step, num_steps: resumed.append(step))
    assert resumed == [4, 5, 6], "the third step was written before anyone was told of it"
    assert not (job.folder.path / FOLDER).exists()
    for name in ("train/loss", "validation/clean_accuracy", "validation/robust_accuracy"):
        assert result.metrics[name] == whole.metrics[name]
    assert (job.folder.model / "model.safetensors").read_bytes() == (whole.folder.model / "model.safetensors").read_bytes()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("workers", [1, 2])
def test_a_drained_node_costs_a_step_and_no_failure(home, tmp_path, workers):
    """A real node of a local cluster is drained as by a spot machine's notice, and then lost; another one takes its place."""
    from ray.cluster_utils import Cluster

    path = write_sweep(tmp_path, trials=1, epochs=3, train=1216, extra=f"resources.workers: {workers}\n  training.attack.steps: 60")
    path.write_text(path.read_text().replace("  training.attack.steps: 2\n", "", 1))
    head = {"num_cpus": workers - 1, "include_dashboard": True, "dashboard_port": free_port()}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        node = cluster.add_node(num_cpus=1)
        environment = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "1", "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1"}
        flags = ("--no-evaluation", "--max_concurrent_trials", "1", "--address", cluster.address)
        with SweepProcess(path, home, tmp_path / "log", flags, environment) as sweep:
            sweep.wait_until(lambda text: "trial 0: epoch 1/3" in text, 900, "the first epoch")
            ray = str(Path(sys.executable).with_name("ray"))
            reason = ("--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot", "--deadline-remaining-seconds", "60")
            drain = [ray, "drain-node", "--address", cluster.address, "--node-id", node.node_id, *reason]
            subprocess.run(drain, check=True, capture_output=True, timeout=100)
            deadline = time.monotonic() + 50
            while not list(home.root.glob(f"runs/*/{FOLDER}/1-*")):
                assert time.monotonic() < deadline, sweep.text
                time.sleep(0.2)
            cluster.remove_node(node, allow_graceful=False)
            cluster.add_node(num_cpus=1)
            sweep.wait_until(lambda text: "trial 0: epoch 2/3" in text, 600, "the end of the epoch that was interrupted")
            assert sweep.wait(900) == 0, sweep.text
    finally:
        cluster.shutdown()
    assert_whole_record(home, "tiny", 1)
