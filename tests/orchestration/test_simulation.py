"""What a sweep would take on a cluster: simulated time against closed forms, and the times that it starts from."""

from __future__ import annotations

import datetime
import statistics

import optuna
import pytest
from optuna.trial import TrialState, create_trial

from orchestration.cli import main
from orchestration.sweeping.goals import StoppingConfig
from orchestration.sweeping.simulation import Plan, TrialTimes, measured_times, simulate
from tests.orchestration.tiny_home import rayndom_json

EVEN = TrialTimes(start=20, epoch=10, ratios=(1.0,), source="given")


@pytest.mark.parametrize(("trials", "at_once", "rounds"), [(12, 4, 3), (13, 4, 4), (5, 64, 1), (1, 1, 1)])
def test_equal_trials_run_in_rounds(trials, at_once, rounds):
    outcome = simulate(Plan(trials, at_once, 12, None, EVEN))
    assert outcome.seconds == pytest.approx(rounds * (20 + 12 * 10))
    assert outcome.busy == pytest.approx(trials * (20 + 12 * 10))
    assert (outcome.epochs, outcome.full, outcome.losses) == (12 * trials, trials, 0)
    assert outcome.over[-1] == (pytest.approx(outcome.seconds), trials)
    assert list(outcome.over) == sorted(outcome.over)


@pytest.mark.parametrize("scheduler", ["asha", "hyperband", "median"])
def test_early_stopping_takes_as_many_epochs_as_the_rule_lets_it(scheduler):
    stopping = StoppingConfig(scheduler=scheduler, grace_epochs=3, reduction_factor=3)
    outcome = simulate(Plan(900, 16, 27, stopping, EVEN))
    assert outcome.over[-1][1] == 900
    if scheduler == "asha":
        # A third goes on at 3 and 9 epochs, a ninth to the end, and the first ones that come to a rung.
        assert 0.8 * 900 / 9 <= outcome.full <= 1.5 * 900 / 9
        assert outcome.epochs == pytest.approx(900 * (3 + 6 / 3 + 18 / 9), rel=0.15)
    assert outcome.epochs < 900 * 27
    # The places are always taken but at the end.
    assert outcome.seconds * 16 == pytest.approx(outcome.busy, rel=0.05)
    assert outcome.begun == 900 if scheduler == "median" else 900 < outcome.begun < 1.2 * 900, "some go on after they were paused"
    assert outcome.busy == pytest.approx(outcome.begun * 20 + outcome.epochs * 10)


def test_of_several_objectives_what_is_dominated_at_a_rung_ends():
    """Two objectives that know nothing of each other: more stay than of one, since a front is more than its best third."""
    stopping = StoppingConfig(scheduler="pareto", grace_epochs=3, reduction_factor=3)
    plan = Plan(600, 16, 27, stopping, EVEN, objectives=2)
    outcome, halving = simulate(plan), simulate(Plan(600, 16, 27, stopping.model_copy(update={"scheduler": "asha"}), EVEN))
    assert outcome.begun == 600 and outcome.over[-1][1] == 600, "what was dominated stays so"
    assert 600 / 9 * 0.8 <= outcome.full < 600 / 3
    assert 600 * (3 + 6 / 3 + 18 / 9) * 0.9 < outcome.epochs < 600 * 27 / 2
    assert outcome.full != halving.full, "it is played as it is, not as asha"
    assert outcome == simulate(plan)


def test_lost_places_cost_what_renewal_theory_says():
    """An epoch of length T that begins anew at each loss takes (exp(rate T) - 1) (1 / rate + pause) on average."""
    import math

    rate, epoch, pause = 2.0, 900.0, 300.0
    times = TrialTimes(start=60, epoch=epoch, ratios=(1.0,), source="given")
    outcomes = [simulate(Plan(100, 10, 4, None, times, rate, pause), seed) for seed in range(10)]
    per_second = rate / 3600
    expected = 60 + 4 * (math.exp(per_second * epoch) - 1) * (1 / per_second + pause + 60)
    mean = statistics.mean(outcome.seconds * 10 for outcome in outcomes) / 100
    assert mean == pytest.approx(expected, rel=0.12), "the last places wait for the others, a little"
    losses = statistics.mean(outcome.losses for outcome in outcomes)
    assert losses == pytest.approx(400 * (math.exp(per_second * epoch) - 1), rel=0.1)
    assert simulate(Plan(100, 10, 4, None, times, rate, pause), 3) == simulate(Plan(100, 10, 4, None, times, rate, pause), 3)


def a_study(*trials):
    """A study of trials that trained so many epochs in so many seconds."""
    study, began = optuna.create_study(), datetime.datetime(2026, 1, 1)
    for epochs, seconds in trials:
        trial = create_trial(value=0.5, state=TrialState.COMPLETE, user_attrs={"epochs": epochs} if epochs else {})
        trial.datetime_start, trial.datetime_complete = began, began + datetime.timedelta(seconds=seconds)
        study.add_trial(trial)
    return study


def test_times_are_those_of_the_trials():
    times = measured_times(a_study((3, 50), (12, 140), (12, 140), (None, 9999)), "there")
    assert (times.start, times.epoch) == (pytest.approx(20), pytest.approx(10))
    assert times.ratios == pytest.approx((1, 1, 1))
    times = measured_times(a_study((4, 40), (4, 60)), "there")
    assert (times.start, times.epoch) == (0, pytest.approx(12.5))
    assert times.ratios == pytest.approx((0.8, 1.2))
    assert measured_times(a_study((4, 40)), "there") is None
    # Longer trials that took less time: no line, all of it is epochs.
    assert measured_times(a_study((4, 90), (8, 60)), "there").start == 0


def test_the_command(home, capsys):
    flags = ("--cpus", "8", "--trials", "40", "--epoch-seconds", "3600", "--start-seconds", "0", "--price", "0.5", "--stopping", "null")
    code, found, _ = rayndom_json(capsys, home, "simulate", "ctrw_bounds_digits", *flags)
    assert code == 0
    assert found["at_once"] == 8 and found["full_trials"] == 40
    assert found["hours"][0] == pytest.approx(5 * 12)
    assert found["cost"][0] == pytest.approx(5 * 12 * 8 * 0.5)
    assert main(["simulate", "ctrw_bounds_digits", "--gpus", "8", "--epoch-seconds", "1", "--home", str(home.root)]) == 2
    assert "its trials use no GPU" in capsys.readouterr().err
    flags = ("--gpus", "8", "--trials", "40", "--epoch-seconds", "1", "--settings.resources.gpus_per_worker", "0.5")
    assert rayndom_json(capsys, home, "simulate", "ctrw_bounds_digits", *flags)[1]["at_once"] == 16
    assert main(["simulate", "ctrw_bounds_digits", "--cpus", "0", "--home", str(home.root)]) == 2
