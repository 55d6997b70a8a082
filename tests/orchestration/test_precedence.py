"""Priorities between sweeps on one cluster, and places that a waiting sweep gives up."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
from ray.tune.experiment import Trial

from orchestration.sweeping import free_places
from orchestration.sweeping.free_places import KEPT_S, FreePlaces
from orchestration.sweeping.loading import load_sweep
from orchestration.sweeping.precedence import EXPIRES_S, LOOK_EVERY_S, Arbiter, Precedence, any_waits
from orchestration.sweeping.proposals import StudySearch
from orchestration.sweeping.study import open_study
from tests.orchestration.sweep_process import SweepProcess, assert_whole_record
from tests.orchestration.test_sweep_on_ray import write_sweep


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_who_has_a_lower_priority_waits_as_long_as_the_other_lacks_room():
    clock = Clock()
    arbiter = Arbiter(clock)
    assert not arbiter.tell("low", 0, True)
    assert not arbiter.tell("high", 5, False), "a lower one makes nobody wait"
    assert not arbiter.tell("low", 0, True), "the higher one has all the room that it wants"
    assert not arbiter.tell("high", 5, True)
    assert arbiter.tell("low", 0, True)
    assert not arbiter.tell("same", 5, True)
    clock.now += EXPIRES_S - 1
    assert not arbiter.tell("high", 5, False)
    assert arbiter.tell("low", 0, False), "of the same priority as the higher one, and not over"
    clock.now += 2
    assert not arbiter.tell("low", 0, False), "who says nothing any more is gone"


def tunes(status, result=None):
    return SimpleNamespace(status=status, last_result=result)


def test_a_sweep_tells_which_trials_wait_and_asks_now_and_then():
    clock, told = Clock(), []
    precedence = Precedence("mine", 3, lambda *what: told.append(what) or len(told) == 2, clock)
    running, group = tunes(Trial.RUNNING, {"epoch": 1}), tunes(Trial.RUNNING)
    assert not any_waits([running, tunes(Trial.TERMINATED)])
    assert any_waits([running, group]), "a group that Tune has started waits for its workers"
    precedence.on_step_begin(1, [running, tunes(Trial.PENDING)])
    precedence.on_step_begin(2, [running])
    assert told == [("mine", 3, True)] and not precedence.has_to_wait()
    clock.now += LOOK_EVERY_S
    precedence.on_step_begin(3, [running])
    assert told[1:] == [("mine", 3, False)] and precedence.has_to_wait()
    clock.now += LOOK_EVERY_S
    assert not precedence.has_to_wait(), "it asks while nothing of its own happens, too"
    assert not Precedence("alone", 0, None).has_to_wait()


def test_a_search_begins_no_trial_while_it_has_to_wait_and_gives_its_place_up(tmp_path, monkeypatch):
    ended, clock, waits = [], Clock(), [True]
    monkeypatch.setattr(free_places, "end_idle_processes", ended.append)
    controller = SimpleNamespace(get_trials=lambda: [])
    config, places = load_sweep("ctrw_bounds_digits", {"num_trials": 1, "stopping": None}), FreePlaces(clock)
    search = StudySearch(config, open_study(config, tmp_path), places=places, has_to_wait=lambda: waits[0])
    for seconds in (0, KEPT_S - 1):
        clock.now = seconds
        assert search.suggest("a") is None
        places.choose_trial_to_run(controller)
    assert not ended, "the next trial may come at once"
    clock.now = KEPT_S
    places.choose_trial_to_run(controller)
    assert ended == [controller]
    waits[0] = False
    assert isinstance(search.suggest("a"), dict)
    clock.now += 2 * KEPT_S
    places.choose_trial_to_run(controller)
    assert ended == [controller], "its place is taken"
    waits[0] = True
    assert isinstance(search.suggest("a"), dict), "what has begun goes on"
    assert search.suggest("b") == "FINISHED", "with nothing left to begin there is nothing to wait for"


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_sweep_with_a_higher_priority_overtakes(tmp_path, migrated_store):
    """The lower one has all of a cluster of two cores; the higher one begins later and takes every place that becomes free."""
    import shutil

    from ray.cluster_utils import Cluster

    from orchestration.home import Home

    processes, homes = [], []
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    try:
        for name, trials, priority in (("low", 8, 0), ("high", 2, 1)):
            (tmp_path / name).mkdir()
            home = Home.locate(tmp_path / name / "home")
            shutil.copy(migrated_store, home.root / "mlflow.db")
            path = write_sweep(tmp_path / name, trials=trials, epochs=3, train=160, sampler="random")
            flags = ("--no-evaluation", "--address", cluster.address, "--stopping", "null", "--priority", str(priority))
            process = SweepProcess(path, home, tmp_path / name / "log", flags)
            processes.append(process.__enter__())
            homes.append(home)
            process.wait_until(lambda text: "trial 0: started" in text, 600, "its first trial")
        low, high = processes
        high.wait_until(lambda text: "2/2 trials over" in text, 900, "the end of the higher one's search")
        begun = len(re.findall(r"trial \d+: started", low.text))
        assert begun <= 5, low.text
        assert low.wait(1200) == 0 and high.wait(300) == 0
    finally:
        for process in processes:
            process.__exit__()
        cluster.shutdown()
    for home, trials in zip(homes, (8, 2), strict=True):
        assert_whole_record(home, "tiny", trials)
