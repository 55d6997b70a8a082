"""Trials that break end their sweep with the reason, are tried again by the next start, and never count as stopped early."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from optuna.trial import TrialState

from orchestration.home import Workplace
from orchestration.recipes import load_recipe
from orchestration.sweeping.listener import TrialListener, TrialRow, TrialsBroke
from orchestration.sweeping.loading import load_sweep
from orchestration.sweeping.proposals import StudySearch
from orchestration.sweeping.study import all_trials, open_study
from orchestration.sweeping.sweep import run_sweep
from orchestration.tracking.experiment_run import ParentRun
from orchestration.tracking.tracker import Tracker
from tests.orchestration.test_sweep_on_ray import runs_of, write_sweep

REASON = "out of memory"


@pytest.fixture
def listener_for(home, monkeypatch):
    """Makes listeners of trials of which every one breaks for the same reason."""
    monkeypatch.setattr("orchestration.sweeping.listener.failure_reason", lambda trial: REASON)
    experiment, tracker = load_recipe("at_digits").experiment, Tracker(home, "rayndom")

    def make(wanted, most_broken):
        writer = SimpleNamespace(later=lambda *_: None)

        def row_of(settings):
            return TrialRow(settings["title"], [], ParentRun(tracker, "").child("trial", experiment, settings["title"]))

        return TrialListener("trial", "trials", [], row_of, writer, None, wanted=wanted, most_broken=most_broken)

    return make


def trial_named(title):
    return SimpleNamespace(trial_id=title, config={"title": title})


@pytest.mark.parametrize(("wanted", "share", "allowed"), [(4, 0.25, 1), (8, 0.25, 2), (4, 0.0, 0), (3, 1.0, 3)])
def test_more_broken_trials_than_the_share_end_the_search(listener_for, capsys, wanted, share, allowed):
    listener = listener_for(wanted, share * wanted)
    for index in range(wanted):
        assert listener.hopeless == (index > allowed)
        listener.on_trial_error(0, [], trial_named(f"trial {index}"))
    capsys.readouterr()
    if wanted > allowed:
        with pytest.raises(TrialsBroke, match=f"{wanted} of {wanted} trials broke.*{REASON}"):
            listener.check_broken()
    else:
        listener.check_broken()
    said = [line for line in capsys.readouterr().err.splitlines() if REASON in line]
    assert len(said) == 1, "one line for each reason, however many trials it broke"
    assert all(f"trial {index}" in said[0] for index in range(wanted))


def test_diverged_trials_do_not_count(listener_for):
    from orchestration.training.job import TrialReport

    listener = listener_for(4, 1)
    for index in range(4):
        report = TrialReport(0, {}, "", failed="the loss is not finite").to_result()
        listener.on_trial_result(0, [], trial_named(f"trial {index}"), report)
    assert not listener.hopeless
    listener.check_broken()


def test_the_best_so_far_never_falls(listener_for, capsys):
    from orchestration.training.job import TrialReport

    listener = listener_for(4, 1)
    listener.best = 0.2
    values = [0.1, 0.8, 0.3, 0.79, 0.1, 0.81, 0.5]
    for index, value in enumerate(values):
        metrics = {"train/loss": 1.0, "validation/clean_accuracy": 0.9, "validation/robust_accuracy": value}
        report = TrialReport(1 + index // 2, metrics, "", finished=index == 4).to_result()
        listener.on_trial_result(0, [], trial_named(f"trial {index % 2}"), report)
        if index == 3:
            listener.on_trial_error(0, [], trial_named("trial 1"))
    shown = [float(part.partition(" %")[0]) for part in capsys.readouterr().out.split("best robust ")[1:]]
    assert shown[:2] == [20.0, 80.0]
    assert shown == sorted(shown)
    assert shown[-1] == 81.0


@pytest.mark.parametrize("ending", [True, False])
def test_a_trial_that_the_end_of_its_start_stops_is_not_one_that_was_stopped_early(tmp_path, ending):
    config = load_sweep("ctrw_bounds_digits", {"num_trials": 2})
    study = open_study(config, tmp_path)
    search = StudySearch(config, study, lambda: ending)
    search.suggest("a")
    search.on_trial_complete("a", {"epoch": 3, "validation/robust_accuracy": 0.2})
    assert [trial.state for trial in all_trials(study)] == [TrialState.RUNNING if ending else TrialState.PRUNED]
    if ending:
        again = open_study(config, tmp_path)
        assert StudySearch(config, again).suggest("b")["values"] == all_trials(study)[0].user_attrs["values"]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_sweep_whose_trials_break_fails_and_goes_on_when_the_cause_is_gone(home, ray_cluster, tmp_path):
    config = load_sweep(str(write_sweep(tmp_path, trials=4, epochs=2)), {"max_concurrent_trials": 1, "stopping": None})
    rehearsal = StudySearch(config, open_study(config, tmp_path / "rehearsal"))
    paths = [home.run(config.experiment(rehearsal.suggest(str(index))["values"]).fingerprint) for index in range(4)]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        path.write_text("a file where the folder of a run belongs")
    with pytest.raises(TrialsBroke, match="2 of 4 trials broke"):
        run_sweep(config, Workplace(home), evaluate=False)
    assert not any((home.root / "exports").glob("*")), "no winner of a sweep that failed"
    for path in paths:
        path.unlink(missing_ok=True)
    summary = run_sweep(config, Workplace(home), evaluate=False)
    assert summary["complete"]
    children = runs_of(home, "trial")
    assert [child.info.status for child in children] == ["FINISHED"] * 4
