"""Which trials are stopped early: each rule on trials whose curves are known, over several starts, and at thousands of trials."""

from __future__ import annotations

import itertools
import math
import random
import time
from types import SimpleNamespace

import numpy as np
import optuna
import pytest
from ray.tune.schedulers import AsyncHyperBandScheduler

from models.errors import UserError
from orchestration.sweeping.goals import StoppingConfig
from orchestration.sweeping.loading import load_sweep
from orchestration.sweeping.proposals import StudySearch
from orchestration.sweeping.schedulers import Bracket, EarlyStopping, Halving, Median, rule_of
from orchestration.sweeping.study import best_trials, open_study, spent, superseded
from orchestration.sweeping.trial_attributes import chain

EPOCHS = 27
METRIC = "validation/robust_accuracy"
RULES = ("asha", "hyperband", "median")


def curve(quality, epoch, noise=None, late=False):
    """A learning curve that ends at `quality`; a late one begins at nothing."""
    begun = 1 - math.exp(-epoch / 6) if not late else 1 / (1 + math.exp(-(epoch - 12)))
    return quality * begun + (noise.gauss(0, 0.005) if noise else 0)


def searched(scheduler, qualities, seed=0, late=()):
    """Trials one after another under a rule: epochs that each trained."""
    rule = rule_of(StoppingConfig(scheduler=scheduler, grace_epochs=1, reduction_factor=3), EPOCHS)
    noise, trained = random.Random(seed), []
    for number, quality in enumerate(qualities):
        for epoch in range(1, EPOCHS + 1):
            if epoch < EPOCHS and rule.stops(number, epoch, curve(quality, epoch, noise, number in late)):
                break
        trained.append(epoch)
    return trained


@pytest.mark.parametrize("scheduler", RULES)
def test_it_finds_a_better_trial_than_no_stopping_with_as_many_epochs(scheduler):
    wins = 0
    for seed in range(10):
        qualities = [random.Random(seed).random() ** 3 for _ in range(1)] + [
            random.Random(seed * 997 + n).random() ** 3 for n in range(199)
        ]
        trained = searched(scheduler, qualities, seed)
        full = sum(trained) // EPOCHS
        assert full < len(qualities)
        best = max(quality for quality, epochs in zip(qualities, trained, strict=True) if epochs == EPOCHS)
        wins += best >= max(qualities[:full])
        assert sum(trained) < 0.75 * EPOCHS * len(qualities), "it saves epochs"
    assert wins >= 8


def test_hyperband_lets_late_bloomers_live_where_asha_ends_them():
    """Every tenth trial is the best one in the end and the worst one until half time."""
    late = set(range(5, 400, 10))
    qualities = [0.9 if number in late else 0.5 * random.Random(number).random() for number in range(400)]
    survived = {
        rule: sum(epochs == EPOCHS for number, epochs in enumerate(searched(rule, qualities, late=late)) if number in late)
        for rule in RULES
    }
    assert survived["asha"] == 0
    assert survived["hyperband"] >= 2


def test_the_brackets_of_hyperband_share_the_trials_as_its_paper_does():
    rule = rule_of(StoppingConfig(scheduler="hyperband", grace_epochs=1, reduction_factor=3), EPOCHS)
    counts = np.bincount([rule.bracket_of(number) for number in range(1000)])
    paper = np.array([3.0**s * 4 / (s + 1) for s in (3, 2, 1, 0)])
    assert counts / 1000 == pytest.approx(paper / paper.sum(), abs=0.01)
    assert not any(rule.stops(number, epoch, 0.0) for number in range(1000) if rule.bracket_of(number) == 3 for epoch in range(1, EPOCHS))


@pytest.mark.parametrize(("factor", "epochs", "grace"), [(3, 27, 1), (2, 12, 3), (1.5, 30, 2), (4, 9, 9)])
def test_a_bracket_decides_as_that_of_ray(factor, epochs, grace):
    rays = AsyncHyperBandScheduler(time_attr="epoch", metric="v", mode="max", max_t=epochs + 1, grace_period=grace, reduction_factor=factor)
    own, generator = Bracket(grace, epochs, factor), random.Random(epochs)
    reached = dict.fromkeys(range(60), 0)
    for number in reached:
        rays.on_trial_add(None, SimpleNamespace(trial_id=str(number)))
    decisions = []
    while reached:
        number = generator.choice(list(reached))
        reached[number] += 1
        epoch, value = reached[number], generator.choice([0.1, 0.5, generator.random()])
        theirs = rays.on_trial_result(None, SimpleNamespace(trial_id=str(number)), {"epoch": epoch, "v": value}) == "STOP"
        decisions.append(theirs)
        assert own.stops(number, epoch, value) == theirs
        if theirs or epoch == epochs:
            del reached[number]
    assert True in decisions and False in decisions


def test_the_median_is_that_of_running_means():
    rule, generator = Median(StoppingConfig(scheduler="median", grace_epochs=2)), np.random.default_rng(0)
    past = []
    for number in range(60):
        values, stopped = generator.random(6), None
        for epoch, value in enumerate(values, start=1):
            others = [np.mean(each[1:epoch]) for each in past if len(each) >= epoch >= 2]
            expected = epoch >= 2 and len(others) >= 5 and max(values[:epoch]) < np.median(others)
            assert rule.stops(number, epoch, value) == expected
            if expected:
                stopped = epoch
                break
        past.append(values[:stopped])
    assert any(len(values) < 6 for values in past)


TRIALS, FEW = 12, 9
"""Trials, and epochs of each, where a study on disk is played."""


class Killed(Exception):
    """The driver was."""


def played(config, folder, curves, workers=1, kill_after=None):
    """Let trials train as Tune would, all places in turn, by curves of their number at the first start; return the study.

    Args:
        curves: (number, epoch) -> value. kill_after: epochs after which the driver is killed.
    """
    study = open_study(config, folder)
    stopping = EarlyStopping(config, FEW, study)
    search, running, trained = StudySearch(config, study, stopping=stopping), {}, 0
    names = itertools.count()
    while True:
        while len(running) < workers:
            name = str(next(names))
            suggestion = search.suggest(name)
            if not isinstance(suggestion, dict):
                break
            running[name] = [SimpleNamespace(trial_id=name, config=suggestion), 0]
        if not running:
            assert suggestion == "FINISHED"
            return study
        for name, place in list(running.items()):
            trial, epoch = place[0], place[1] + 1
            place[1] = epoch
            trained += 1
            if kill_after is not None and trained > kill_after:
                raise Killed
            result = {"epoch": epoch, METRIC: curves(trial.config["first"], epoch)}
            decision = stopping.on_trial_result(None, trial, result)
            if decision != "STOP":  # Tune tells a searcher of the others alone
                search.on_trial_result(name, result)
            if epoch == FEW or decision == "STOP":
                search.on_trial_complete(name, result | {"finished": epoch == FEW})
                del running[name]


def bloomer(number, epoch):
    """The second trial comes to the first rung behind the first one, before anything is worse, and is the best in the end."""
    quality = {0: 0.5, 1: 0.9}.get(number, 0.3 * random.Random(number).random())
    return 0.1 if number == 1 and epoch < 2 else curve(quality, epoch) + 0.1 * (number == 0)


def tries():
    stopping = {"grace_epochs": 1, "reduction_factor": 3}
    return load_sweep("ctrw_bounds_digits", {"num_trials": TRIALS, "stopping": stopping, "sampler": "random"})


@pytest.mark.parametrize(("workers", "kill_after"), [(1, None), (1, 14), (3, 14), (3, 25)])
def test_a_late_bloomer_that_was_stopped_goes_on_and_wins(tmp_path, workers, kill_after):
    config = tries()
    if kill_after is not None:
        with pytest.raises(Killed):
            played(config, tmp_path, bloomer, workers, kill_after)
    study = played(config, tmp_path, bloomer, workers)
    trials, again = study.get_trials(), superseded(study)
    counted = [trial for trial in trials if trial.number not in again]
    assert len(counted) == spent(study) == TRIALS
    assert {trial.state.name for trial in counted} == {"COMPLETE", "PRUNED"}
    winner = trials[best_trials(config, study)[0]]
    line = chain(trials, winner.number)
    assert line[-1] == 1 and "PRUNED" in {trials[number].state.name for number in line[1:]}, "it had been stopped"
    assert len({trial.user_attrs["fingerprint"] for trial in counted}) == TRIALS, "and is the same training"
    assert winner.intermediate_values.keys() == set(range(1, FEW + 1)), "of which every epoch counts once"
    full = sum(trial.state.name == "COMPLETE" for trial in counted)
    assert full <= 5, "the others end early as before"


def test_in_the_end_the_best_share_of_each_rung_went_on_whatever_the_order(tmp_path):
    """As if all had waited for each other: that is what pausing is for."""
    config = tries()
    study = played(config, tmp_path, lambda number, epoch: curve((number * 7 % TRIALS + 1) / TRIALS, epoch))
    for rung in (1, 3):
        values = {trial.number: trial.intermediate_values[rung] for trial in study.trials
                  if trial.number not in superseded(study) and rung in trial.intermediate_values}  # fmt: skip
        best = sorted(values, key=values.get)[-(len(values) // 3) :]
        assert all(max(study.trials[number].intermediate_values) > rung for number in best)


def test_equal_values_let_nothing_more_go_on(tmp_path):
    study = played(tries(), tmp_path, lambda number, epoch: 0.1)
    assert not superseded(study)


@pytest.mark.parametrize("scheduler", RULES)
def test_it_remembers_the_trials_of_earlier_starts_and_judges_no_epoch_twice(tmp_path, scheduler):
    config = load_sweep("ctrw_bounds_digits", {"num_trials": 200, "stopping": {"scheduler": scheduler, "grace_epochs": 2}})
    search = StudySearch(config, open_study(config, tmp_path))
    for number in range(7):
        search.suggest(str(number))
        for epoch in range(1, 7):
            search.on_trial_result(str(number), {"epoch": epoch, METRIC: 0.5 + 0.01 * number})
        search.on_trial_complete(str(number), {"epoch": 12, "finished": True, METRIC: 0.6})
    later = EarlyStopping(config, 12, open_study(config, tmp_path))

    def first_stop(number, passed):
        trial = SimpleNamespace(trial_id=f"t{number}", config={"number": number, "passed": passed})
        for epoch in range(1, 13):
            if later.on_trial_result(None, trial, {"epoch": epoch, METRIC: 0.1}) == "STOP":
                return epoch
        return None

    strict = next(number for number in range(100, 200) if not isinstance(later.rule, Halving) or later.rule.bracket_of(number) == 0)
    assert first_stop(strict, 0) == 2
    another = next(n for n in range(strict + 1, 200) if not isinstance(later.rule, Halving) or later.rule.bracket_of(n) == 0)
    stopped = first_stop(another, 5)
    assert stopped is not None and stopped > 5, "an earlier start let it pass five epochs"
    nothing = SimpleNamespace(trial_id="n", config={"number": 199})
    for result in ({"epoch": 0}, {"epoch": 3}, {"epoch": 3, METRIC: math.nan}, {"epoch": 12, METRIC: 0.0}):
        assert later.on_trial_result(None, nothing, result) == "CONTINUE"


@pytest.mark.parametrize("scheduler", RULES)
def test_a_decision_takes_no_longer_among_thousands_of_trials(scheduler):
    config = load_sweep("ctrw_bounds_digits", {"num_trials": 9000, "stopping": {"scheduler": scheduler}})
    rule = EarlyStopping(config, 12, optuna.create_study()).rule
    started = time.process_time()
    for number in range(2000):
        for epoch in range(1, 12):
            rule.stops(number, epoch, random.Random(number * 12 + epoch).random())
    assert time.process_time() - started < 6, "22,000 decisions"


def two_goals(tmp_path, **stopping):
    (tmp_path / "goals.yaml").write_text(
        "recipe: ctrw_digits\nnum_trials: 200\nspace: {training.optimizer.learning_rate: {type: float, low: 0.01, high: 0.1}}\n"
        "objectives: [{metric: validation/clean_accuracy}, {metric: validation/robust_accuracy}]\n"
    )
    return load_sweep(str(tmp_path / "goals.yaml"), {"stopping": {"grace_epochs": 1, "reduction_factor": 3} | stopping})


def judged(config, qualities):
    """Trials one after another, by final (clean, robust) accuracies: epochs that each trained."""
    stopping, trained = EarlyStopping(config, EPOCHS, optuna.create_study(directions=["maximize"] * len(config.objectives))), []
    for number, (clean, robust) in enumerate(qualities):
        for epoch in range(1, EPOCHS + 1):
            result = {"epoch": epoch, "validation/clean_accuracy": curve(clean, epoch), METRIC: curve(robust, epoch)}
            if stopping.on_trial_result(None, SimpleNamespace(config={"number": number}), result) == "STOP":
                break
        trained.append(epoch)
    return trained


def test_a_front_survives_and_most_of_what_it_dominates_ends_early(tmp_path):
    config = two_goals(tmp_path, scheduler="pareto")
    generator = np.random.default_rng(0)
    angles = generator.uniform(0, math.pi / 2, 120)
    on_front = np.arange(120) % 6 == 0
    radii = np.where(on_front, 0.9, 0.9 * generator.uniform(0.2, 0.8, 120))
    qualities = np.column_stack([radii * np.cos(angles), radii * np.sin(angles)]).tolist()
    trained = np.array(judged(config, qualities))
    assert (trained[on_front] == EPOCHS).all(), "20 trials, none of which dominates another"
    assert (trained[~on_front] < EPOCHS).mean() > 0.8
    by_one = np.array(judged(two_goals(tmp_path, scheduler="asha"), qualities))
    assert (by_one[on_front] < EPOCHS).any(), "one metric alone does not keep it"


def test_domination_is_counted_as_a_loop_would(tmp_path):
    chance = random.Random(1)
    rule, seen = rule_of(StoppingConfig(scheduler="pareto", grace_epochs=1, reduction_factor=2), 2), []

    def dominates(a, b):
        if a[0] != b[0]:
            return a[0] < b[0]
        return all(x <= y for x, y in zip(a[1:], b[1:], strict=True)) and a != b

    outcomes = set()
    for number in range(150):
        value = (chance.choice([0.0, 0.0, 0.1]), round(chance.random(), 1), round(chance.random(), 1))
        seen.append(value)
        counts = [sum(dominates(other, own) for other in seen) for own in seen]
        better = sum(count < counts[-1] for count in counts)
        expected = counts[-1] > 0 and better >= len(seen) / 2
        assert rule.stops(number, 1, value) == expected
        outcomes.add(expected)
        assert not rule.stops(number, 1, (9.0, 9.0, 9.0)), "a trial is judged once at each rung"
    assert outcomes == {True, False}


@pytest.mark.parametrize("scheduler", RULES)
def test_what_violates_a_constraint_ends_before_what_does_not(tmp_path, scheduler):
    fields = {"num_trials": 40, "stopping": {"scheduler": scheduler, "grace_epochs": 3, "reduction_factor": 2}}
    floor = [{"metric": "validation/clean_accuracy", "at_least": 0.3}]
    config, bounded = (load_sweep("ctrw_bounds_digits", each) for each in (fields, fields | {"constraints": floor}))
    # Every second trial is the more robust one and less accurate than may be.
    qualities = [(0.2, 0.9) if number % 2 else (0.95, 0.5 + 0.001 * number) for number in range(40)]
    free, held = (np.array(judged(each, qualities)) for each in (config, bounded))
    strict = [number for number in range(40) if scheduler != "hyperband" or rule_of(config.stopping, EPOCHS).bracket_of(number) == 0]
    wrong, right = ([number for number in strict if number % 2 == odd and number > 8] for odd in (1, 0))
    assert (free[wrong] == EPOCHS).mean() > (free[right] == EPOCHS).mean()
    assert (held[wrong] < EPOCHS).all() and (held[right] == EPOCHS).mean() >= 0.5


def test_standings_of_an_earlier_start_count(tmp_path):
    config = two_goals(tmp_path, scheduler="pareto")
    search = StudySearch(config, open_study(config, tmp_path))
    for number in range(4):
        search.suggest(str(number))
        search.on_trial_result(str(number), {"epoch": 1, "validation/clean_accuracy": 0.8, METRIC: 0.5 + 0.1 * number})
        search.on_trial_complete(str(number), {"epoch": 1})
    later = EarlyStopping(config, EPOCHS, open_study(config, tmp_path))

    def decision(number, clean, robust):
        result = {"epoch": 1, "validation/clean_accuracy": clean, METRIC: robust}
        return later.on_trial_result(None, SimpleNamespace(config={"number": number}), result)

    assert decision(10, 0.7, 0.6) == "STOP"
    assert decision(11, 0.9, 0.1) == "CONTINUE"


@pytest.mark.parametrize(
    ("goals", "reason"),
    [
        ("objectives: [{metric: validation/robust_accuracy}]", "is for several objectives, and there is one"),
        ("objectives: [{metric: validation/robust_accuracy}, {metric: model/parameters, mode: min}]", "do not report model/parameters"),
    ],
)
def test_domination_needs_several_objectives_of_epochs(tmp_path, goals, reason):
    (tmp_path / "s.yaml").write_text(f"recipe: ctrw_digits\nnum_trials: 3\n{goals}\nstopping: {{scheduler: pareto}}\n")
    with pytest.raises(UserError, match=reason):
        load_sweep(str(tmp_path / "s.yaml"))
