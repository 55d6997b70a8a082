"""Priorities between sweeps on one cluster, and places that a waiting sweep gives up."""

from __future__ import annotations

import re
import shutil
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


def test_a_search_that_has_to_wait_runs_one_trial_and_gives_its_other_places_up(tmp_path, monkeypatch):
    ended, clock, waits = [], Clock(), [True]
    monkeypatch.setattr(free_places, "end_idle_processes", ended.append)
    controller = SimpleNamespace(get_trials=lambda: [])
    config, places = load_sweep("ctrw_bounds_digits", {"num_trials": 3, "stopping": None}), FreePlaces(clock)
    search = StudySearch(config, open_study(config, tmp_path), places=places, has_to_wait=lambda: waits[0])
    assert isinstance(search.suggest("a"), dict), "without a trial that runs Tune would stand still and hold its places"
    for seconds in (0, KEPT_S - 1):
        clock.now = seconds
        assert search.suggest("b") is None
        places.choose_trial_to_run(controller)
    assert not ended, "the next trial may come at once"
    clock.now = KEPT_S
    places.choose_trial_to_run(controller)
    assert ended == [controller]
    search.on_trial_complete("a", {"epoch": 1})
    assert isinstance(search.suggest("b"), dict) and search.suggest("c") is None
    waits[0] = False
    assert isinstance(search.suggest("c"), dict)
    ended.clear()
    clock.now += 2 * KEPT_S
    places.choose_trial_to_run(controller)
    assert not ended, "its place is taken"
    waits[0] = True
    assert isinstance(search.suggest("c"), dict), "what has begun goes on"
    assert search.suggest("d") == "FINISHED", "with nothing left to begin there is nothing to wait for"


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_sweep_with_a_higher_priority_overtakes(tmp_path, migrated_store):
    """The lower one has all of a cluster of two cores; the higher one begins later and gets one of them as soon as it asks.

    Each knows of the other within two seconds; the lower one goes on with one trial at a time.
    """
    from ray.cluster_utils import Cluster

    from orchestration.home import Home

    homes = [Home.locate(tmp_path / name / "home") for name in ("low", "high")]
    for home in homes:
        shutil.copy(migrated_store, home.root / "mlflow.db")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})

    def sweep(home, trials, priority):
        path = write_sweep(home.root.parent, trials=trials, epochs=3, train=160, sampler="random")
        flags = ("--no-evaluation", "--address", cluster.address, "--stopping", "null", "--priority", str(priority))
        return SweepProcess(path, home, home.root.parent / "log", flags)

    try:
        with sweep(homes[0], 200, 0) as low:
            low.wait_until(lambda text: "trial 0: started" in text, 600, "its first trial")
            with sweep(homes[1], 12, 1) as high:
                high.wait_until(lambda text: "trial 0: started" in text, 600, "its first trial")
                before = begun(low.text)
                high.wait_until(lambda text: "12/12 trials over" in text, 900, "the end of its search")
                meanwhile = begun(low.text) - before
                assert "200/200" not in low.text, "it was over too early to say anything"
                assert meanwhile <= 20, low.text
                low.wait_until(lambda text: begun(text) > before + meanwhile, 300, "a trial after the other sweep's last one")
                assert high.wait(300) == 0
    finally:
        cluster.shutdown()
    assert_whole_record(homes[1], "tiny", 12)


def begun(text: str) -> int:
    return len(re.findall(r"trial \d+: started", text))
