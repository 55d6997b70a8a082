"""What breaks under a sweep: worker, trial, node, tracking server, disk, study. Each is really broken; the record must be whole after it.

One fault per test, so that a failure names it; each takes minutes, most of them for starting Ray.
"""

from __future__ import annotations

import re
import shutil
import signal
import sqlite3
import time

import pytest

from orchestration.home import Home
from tests.orchestration.places import fill, small_disk
from tests.orchestration.services import TrackingServer, free_port
from tests.orchestration.sweep_process import SweepProcess, assert_whole_record, run_folder_state, runs_of
from tests.orchestration.test_sweep_on_ray import write_sweep

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(2400)]
SEARCH = ("--no-evaluation",)
TRIED_AGAIN = "broke and is tried again"


def epochs_seen(text: str) -> int:
    return len(re.findall(r"^\d\d:\d\d:\d\d  trial \d+: epoch", text, re.M))


def assert_resumable(process: SweepProcess, *parts: str) -> None:
    """Check that a start that failed said what was wrong, once, and how to go on."""
    errors = [line for line in process.text.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, process.text
    for part in parts:
        assert part in errors[0], process.text
    assert re.search(r"not finished; go on with:  rayndom sweep \S+", process.text), process.text
    assert "Traceback" not in process.text


def test_a_killed_worker_and_a_killed_driver_of_a_trial_with_two_workers(home, tmp_path):
    path = write_sweep(tmp_path, trials=2, epochs=6, train=320, extra="resources.workers: 2")
    with SweepProcess(path, home, tmp_path / "log", SEARCH) as sweep:
        sweep.wait_until(lambda text: "epoch 2/6" in text, 600, "the second epoch")
        sweep.kill_one("ray::RayTrainWorker")
        sweep.wait_until(lambda text: "epoch 4/6" in text, 600, "an epoch after the worker was killed")
        sweep.kill_one("ray::ImplicitFunc")
        assert sweep.wait(900) == 0, sweep.text
        assert TRIED_AGAIN in sweep.text
        assert "winner exported" in sweep.text
    assert_whole_record(home, "tiny", 2)


def test_a_killed_trial_goes_on_from_its_last_epoch(home, tmp_path):
    path = write_sweep(tmp_path, trials=2, epochs=6, train=320)
    with SweepProcess(path, home, tmp_path / "log", (*SEARCH, "--max_concurrent_trials", "1")) as sweep:
        sweep.wait_until(lambda text: "trial 0: epoch 3/6" in text, 600, "the third epoch")
        before = run_folder_state(home)
        sweep.kill_one("ray::ImplicitFunc")
        assert sweep.wait(900) == 0, sweep.text
        assert TRIED_AGAIN in sweep.text
    assert before["finished_epochs"] >= 3
    assert_whole_record(home, "tiny", 2)


def test_a_lost_node_costs_its_unfinished_epochs_only(home, tmp_path):
    from ray._raylet import GcsClient
    from ray.cluster_utils import Cluster

    path = write_sweep(tmp_path, trials=3, epochs=6, train=320)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        node = cluster.add_node(num_cpus=1)
        with SweepProcess(path, home, tmp_path / "log", (*SEARCH, "--address", cluster.address)) as sweep:
            sweep.wait_until(
                lambda text: all(re.search(rf"trial {n}: epoch 2/6|trial {n}: (finished|stopped)", text) for n in (0, 1)), 600, "two epochs"
            )
            cluster.remove_node(node, allow_graceful=False)
            deadline = time.monotonic() + 200
            client = GcsClient(address=cluster.address)
            while all(str(info.state) in ("0", "ALIVE") for info in client.get_all_node_info(timeout=10).values()):
                assert time.monotonic() < deadline, "the node is not reported dead"
                time.sleep(1)
            assert sweep.wait(900) == 0, sweep.text
            assert TRIED_AGAIN in sweep.text
    finally:
        cluster.shutdown()
    assert_whole_record(home, "tiny", 3)


def test_two_workers_wait_for_a_lost_node_and_a_baseline_takes_what_is_left(home, tmp_path):
    """Longer than the minute that Ray Train would wait."""
    from ray.cluster_utils import Cluster

    path = write_sweep(tmp_path, trials=1, epochs=6, train=320, extra="resources.workers: 2")
    flags = (*SEARCH, "--baselines", "[at_digits]")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": True, "dashboard_port": free_port()})
    try:
        node = cluster.add_node(num_cpus=1)
        with SweepProcess(path, home, tmp_path / "log", (*flags, "--address", cluster.address)) as sweep:
            sweep.wait_until(lambda text: "trial 0: epoch 2/6" in text, 600, "the second epoch")
            cluster.remove_node(node, allow_graceful=False)
            sweep.wait_until(lambda text: "too little for one trial" in text, 300, "the loss of the node")
            kept = run_folder_state(home)["finished_epochs"]
            time.sleep(75)
            assert "failed" not in sweep.text, sweep.text
            node = cluster.add_node(num_cpus=1)
            sweep.wait_until(lambda text: "trial 0: finished" in text, 600, "the end of the trial")
            cluster.remove_node(node, allow_graceful=False)
            assert sweep.wait(900) == 0, sweep.text
            assert "room for 1 of 2 workers" in sweep.text
            assert "winner exported" in sweep.text
    finally:
        cluster.shutdown()
    assert kept >= 2
    assert_whole_record(home, "tiny", 1)


def test_another_ray_on_the_machine_ends_no_group(home, tmp_path):
    """Ray Train's cleaner would ask the newest Ray of the machine whether the group is still wanted, and end it."""
    from ray.cluster_utils import Cluster

    path = write_sweep(tmp_path, trials=1, epochs=30, train=320, extra="resources.workers: 2")
    head = {"num_cpus": 2, "include_dashboard": True, "dashboard_port": free_port()}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        with SweepProcess(path, home, tmp_path / "log", (*SEARCH, "--address", cluster.address)) as sweep:
            sweep.wait_until(lambda text: "trial 0: epoch 1/30" in text, 600, "the first epoch")
            other = Cluster(initialize_head=True, head_node_args=head | {"num_cpus": 1, "dashboard_port": free_port()})
            try:
                seen = epochs_seen(sweep.text)
                time.sleep(10)  # it is asked about every second
                sweep.wait_until(lambda text: "trial 0: finished" in text or epochs_seen(text) > seen, 300, "a further epoch")
                assert sweep.wait(900) == 0, sweep.text
            finally:
                other.shutdown()
    finally:
        cluster.shutdown()
    assert sweep.text.count("trial 0: epoch 1/30") == 1, "a group that begins again tells its epochs again"


def test_a_group_goes_on_with_fewer_workers_and_takes_more_when_there_is_room(home, tmp_path):
    """Three workers of whom one stands by, because three do not divide the batch; then one; then three again.

    The one has to train for longer than it takes until the group looks for room.
    """
    from ray.cluster_utils import Cluster

    path = write_sweep(tmp_path, trials=1, epochs=60, train=640, extra="resources.workers: [1, 3]")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": True, "dashboard_port": free_port()})
    try:
        node = cluster.add_node(num_cpus=2)
        with SweepProcess(path, home, tmp_path / "log", (*SEARCH, "--address", cluster.address)) as sweep:
            sweep.wait_until(lambda text: "trial 0: epoch 2/60" in text, 600, "the second epoch")
            assert "trial 0: trains with 2 of 3 workers" in sweep.text
            cluster.remove_node(node, allow_graceful=False)
            kept = run_folder_state(home)["finished_epochs"]
            sweep.wait_until(lambda text: f"trial 0: epoch {kept + 1}/60" in text, 600, "an epoch with one worker")
            assert "trial 0: goes on with 1 of 3 workers" in sweep.text
            cluster.add_node(num_cpus=2)
            sweep.wait_until(lambda text: "trial 0: goes on with 2 of 3 workers" in text, 900, "two workers again")
            assert sweep.wait(1200) == 0, sweep.text
    finally:
        cluster.shutdown()
    assert_whole_record(home, "tiny", 1)


def test_training_goes_on_while_the_tracking_server_is_down(tmp_path):
    home = Home.locate(tmp_path / "home")
    path = write_sweep(tmp_path, trials=6, epochs=8, train=1200)
    flags = (*SEARCH, "--max_concurrent_trials", "1", "--stopping", "null")
    with TrackingServer(tmp_path / "server") as server:
        # Fewer tries than by default: the absence is noticed within seconds.
        environment = {"MLFLOW_TRACKING_URI": server.uri, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
        with SweepProcess(path, home, tmp_path / "1.log", flags, environment) as sweep:
            # Away for a while: a trial ends and another begins meanwhile, and all is logged afterwards.
            sweep.wait_until(lambda text: "epoch 2/8" in text, 600, "the second epoch")
            server.stop()
            sweep.wait_until(lambda text: "is away" in text and "trial 1: epoch 2/8" in text, 600, "training without a server")
            server.start()
            sweep.wait_until(lambda text: "is back" in text, 400, "the server's return")
            # Away to the end: the search ends, and says what is missing.
            server.stop()
            assert sweep.wait(900) == 3, sweep.text
            assert "6/6 trials over" in sweep.text
            assert_resumable(sweep, "stayed away", "the same command again logs the rest")
        finished = {folder.parent.name: folder.stat().st_mtime_ns for folder in home.root.glob("runs/*/result.json")}
        assert len(finished) == 6
        with SweepProcess(path, home, tmp_path / "refused.log", flags, environment) as refused:
            assert refused.wait(300) == 3
            assert "cannot be reached" in refused.text
        server.start()
        with SweepProcess(path, home, tmp_path / "2.log", flags, environment) as sweep:
            assert sweep.wait(900) == 0, sweep.text
            assert "logged what an earlier start could not" in sweep.text
        assert finished == {folder.parent.name: folder.stat().st_mtime_ns for folder in home.root.glob("runs/*/result.json")}
        assert_whole_record(home, "tiny", 6, server.uri)


@pytest.mark.skipif(shutil.which("mount") is None, reason="needs `mount`")
def test_a_full_disk_ends_the_sweep_with_one_clear_error_and_it_goes_on_with_room(tmp_path, migrated_store):
    path = write_sweep(tmp_path, trials=3, epochs=8, train=320)
    with small_disk(tmp_path / "disk", 24) as disk:
        home = Home.locate(disk / "home")
        shutil.copy(migrated_store, home.root / "mlflow.db")
        with SweepProcess(path, home, tmp_path / "1.log", SEARCH) as sweep:
            sweep.wait_until(lambda text: "epoch 3/8" in text, 600, "the third epoch")
            filler = fill(disk)
            assert sweep.wait(900) == 3, sweep.text
            assert_resumable(sweep)
            assert re.search(r"error: .*(No space left|disk is full)", sweep.text), sweep.text
        kept = run_folder_state(home)
        assert kept["finished_epochs"] >= 3
        filler.unlink()
        with SweepProcess(path, home, tmp_path / "2.log", SEARCH) as sweep:
            assert sweep.wait(900) == 0, sweep.text
        assert_whole_record(home, "tiny", 3)


def test_a_locked_study_is_waited_for_and_then_one_clear_error(home, tmp_path):
    path = write_sweep(tmp_path, trials=2, epochs=6, train=320)
    with SweepProcess(path, home, tmp_path / "1.log", SEARCH) as sweep:
        sweep.wait_until(lambda text: "epoch 2/6" in text, 600, "the second epoch")
        (study,) = home.root.glob("sweeps/*/study.db")
        other = sqlite3.connect(study, isolation_level=None, timeout=60)
        other.execute("BEGIN EXCLUSIVE")
        try:
            seen = epochs_seen(sweep.text)
            time.sleep(10)
            assert sweep.process.poll() is None, "a short lock is waited for"
            other.execute("ROLLBACK")
            sweep.wait_until(lambda text: epochs_seen(text) > seen, 400, "an epoch after a short lock")
            other.execute("BEGIN EXCLUSIVE")
            assert sweep.wait(900) == 3, sweep.text
            assert_resumable(sweep, "study.db", "locked", "Another program")
        finally:
            other.close()
    with SweepProcess(path, home, tmp_path / "2.log", SEARCH) as sweep:
        assert sweep.wait(900) == 0, sweep.text
    assert_whole_record(home, "tiny", 2)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl_c", "sigterm"])
def test_a_polite_end_says_how_to_go_on(number, home, tmp_path):
    path = write_sweep(tmp_path, trials=2, epochs=6, train=320)
    with SweepProcess(path, home, tmp_path / "1.log", SEARCH) as sweep:
        sweep.wait_until(lambda text: "epoch 2/6" in text, 600, "the second epoch")
        sweep.signal(number)
        assert sweep.wait(200) == 130 if number == signal.SIGINT else sweep.wait(200) != 0
        assert re.search(r"go on with:  rayndom sweep \S+", sweep.text), sweep.text
        assert sweep.left_over(60) == []
    (parent,) = runs_of(home, "sweep")
    assert parent.info.status in ("RUNNING", "KILLED")
    with SweepProcess(path, home, tmp_path / "2.log", SEARCH) as sweep:
        assert sweep.wait(900) == 0, sweep.text
    assert_whole_record(home, "tiny", 2)
