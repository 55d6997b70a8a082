"""The disk that states of trials may take: which go first, what stays, and what an earlier start left counts."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest

from orchestration.home import Home
from orchestration.run_folder import RunFolder
from orchestration.sweeping.loading import load_sweep
from orchestration.sweeping.proposals import StudySearch
from orchestration.sweeping.state_quota import StateQuota
from orchestration.sweeping.study import open_study
from trainers.checkpoint import STATE_FILE
from trainers.selection import SELECTION_METRIC

SIZE = 1000


@pytest.fixture
def home(tmp_path) -> Home:
    return Home(tmp_path / "home")


def trained(home: Home, fingerprint: str, finished: bool, epoch: int, value: float):
    """A trial that is over, as its listener knows it, with its files."""
    folder = RunFolder(home.run(fingerprint))
    folder.path.mkdir(parents=True, exist_ok=True)
    (folder.path / STATE_FILE).write_bytes(bytes(SIZE))
    (folder.path / "result.json").write_text("{}")
    experiment = SimpleNamespace(fingerprint=fingerprint)
    return SimpleNamespace(finished=finished, epoch=epoch, metrics={SELECTION_METRIC: value}, experiment=experiment)


def states(home: Home) -> set[str]:
    return {path.parent.name for path in home.root.glob(f"runs/*/{STATE_FILE}")}


@pytest.mark.parametrize("seed", range(5))
def test_finished_ones_go_first_and_then_those_that_came_least_far_the_worst_before_the_better(home, seed):
    chance, quota, rows = random.Random(seed), StateQuota(home, 4 * SIZE), []
    for index in range(20):
        row = trained(home, f"run{index:02}", chance.random() < 0.3, chance.choice([1, 3, 9]), chance.random())
        rows.append(row)
        quota.after(row)
        assert len(states(home)) <= 4
    stopped = sorted((row for row in rows if not row.finished), key=lambda row: (row.epoch, row.metrics[SELECTION_METRIC]))
    # What went early was worth least of what was there then; the best of all were never among that.
    assert {row.experiment.fingerprint for row in stopped[-4:]} == states(home)
    assert len(list(home.root.glob("runs/*/result.json"))) == 20


def test_what_a_process_holds_stays_until_the_next_time(home):
    quota = StateQuota(home, 0.5 * SIZE)
    first = trained(home, "first", False, 1, 0.1)
    with RunFolder(home.run("first")).locked():
        quota.after(first)
        assert states(home) == {"first"}
    quota.after(trained(home, "second", False, 3, 0.1))
    assert states(home) == set()


def test_weights_kept_on_the_way_count_and_go_with_the_state(home):
    quota = StateQuota(home, 3 * SIZE)
    for name, value in (("first", 0.1), ("second", 0.2)):
        row = trained(home, name, False, 1, value)
        kept = RunFolder(home.run(name)).checkpoint(1)
        kept.mkdir(parents=True)
        (kept / "model.safetensors").write_bytes(bytes(SIZE))
        quota.after(row)
    assert states(home) == {"second"}
    assert RunFolder(home.run("first")).checkpoints() == {} and list(RunFolder(home.run("second")).checkpoints()) == [1]


def test_a_trial_that_went_on_counts_once(home):
    quota = StateQuota(home, 2 * SIZE)
    for epoch in (1, 3, 9):
        quota.after(trained(home, "again", False, epoch, 0.1))
    quota.after(trained(home, "other", False, 1, 0.9))
    assert states(home) == {"again", "other"}


def test_states_of_an_earlier_start_count(home, tmp_path):
    config = load_sweep("ctrw_bounds_digits", {"num_trials": 20, "sampler": "random"})
    assert StateQuota.of(config, home, open_study(config, tmp_path)) is None
    config = config.model_copy(update={"max_state_gib": 2 * SIZE / 2**30})
    search = StudySearch(config, open_study(config, tmp_path))
    for index in range(4):
        search.suggest(str(index))
        search.on_trial_result(str(index), {"epoch": 1, SELECTION_METRIC: 0.1 * index})
        search.on_trial_complete(str(index), {"epoch": 1})
        trained(home, search.trials[str(index)].user_attrs["fingerprint"], False, 1, 0.1 * index)
    study = open_study(config, tmp_path)
    quota = StateQuota.of(config, home, study)
    quota.enforce()
    assert states(home) == {trial.user_attrs["fingerprint"] for trial in study.trials[2:]}
