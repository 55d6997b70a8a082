"""TPE on a window of the trials: what it calls good is what is good among all, it costs the same, and it finds as much."""

from __future__ import annotations

import random
import statistics
import time

import numpy as np
import optuna
import pytest
from optuna.samplers._tpe.sampler import _split_trials
from optuna.study import StudyDirection
from optuna.trial import TrialState, create_trial

from orchestration.search_space import suggest
from orchestration.sweeping import trial_window
from orchestration.sweeping.samplers import SAMPLERS, sampler_of
from orchestration.sweeping.trial_window import window
from tests.orchestration.test_samplers import SPACE, regret, searched, sweep

GOOD = 25


def study_of(trials: int, objectives: int = 1, seed: int = 0) -> optuna.Study:
    """A study of random trials; some violate a constraint, were stopped early, failed or run."""
    chance, directions = random.Random(seed), [StudyDirection.MAXIMIZE, StudyDirection.MINIMIZE, StudyDirection.MINIMIZE][:objectives]
    study = optuna.create_study(directions=directions)
    distribution = optuna.distributions.FloatDistribution(0, 1)
    for _ in range(trials):
        kind = chance.random()
        finished = kind < 0.6 or (kind < 0.8 and objectives > 1)
        state = TrialState.COMPLETE if finished else TrialState.PRUNED if kind < 0.9 else TrialState.FAIL
        state = TrialState.RUNNING if kind > 0.98 else state
        trial = create_trial(
            state=state,
            params={"x": chance.random()},
            distributions={"x": distribution},
            values=[chance.random() for _ in directions] if finished else None,
            intermediate_values={1: chance.random()} if state == TrialState.PRUNED else {},
        )
        if finished:
            trial.set_constraint("c", chance.uniform(-1, 0.3))
        study.add_trial(trial)
    return study


@pytest.mark.parametrize(("objectives", "seed"), [(1, 0), (1, 1), (2, 0), (3, 0)])
def test_what_is_good_among_all_trials_is_in_the_window(objectives, seed, monkeypatch):
    monkeypatch.setattr(trial_window, "LATEST", 200)
    study = study_of(900, objectives, seed)
    trials = study.get_trials(deepcopy=False)
    seen = window(trials, study.directions)
    assert [trial.number for trial in seen] == sorted({trial.number for trial in seen})
    assert seen[-200:] == trials[-200:]
    assert len(seen) < 0.7 * len(trials)
    assert {trial.number for trial in trials if trial.state == TrialState.RUNNING} <= {trial.number for trial in seen}
    counted = [trial for trial in trials if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)]
    shown = [trial for trial in seen if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)]
    if objectives == 1:
        assert _split_trials(study, counted, GOOD)[0] == _split_trials(study, shown, GOOD)[0]
    else:
        signs = np.array([-1, 1, 1][:objectives])
        feasible = [trial for trial in counted if trial.state == TrialState.COMPLETE and max(trial.constraints.values()) <= 0]
        losses = {trial.number: np.array(trial.values) * signs for trial in feasible}
        front = {n for n, own in losses.items() if not any((other <= own).all() and (other < own).any() for other in losses.values())}
        assert front <= {trial.number for trial in seen}


def test_up_to_its_size_nothing_is_left_out(monkeypatch):
    config = sweep("tpe", 40)
    full = searched(config)
    monkeypatch.setattr(trial_window, "LATEST", 40)
    assert (searched(config) == full).all()
    monkeypatch.setattr(trial_window, "LATEST", 20)
    monkeypatch.setattr(trial_window, "BEST", 3)
    assert (searched(config) != full).any(), "beyond it something is"


def test_a_proposal_takes_no_longer_at_thousands_of_trials(monkeypatch):
    def seconds(trials: int) -> float:
        config = sweep("tpe", trials)
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
        for _ in range(trials):
            trial = study.ask()
            study.tell(trial, regret(suggest(SPACE, trial)))
        study.sampler, times = sampler_of(config, trials), []
        for _ in range(7):
            before = time.process_time()
            suggest(SPACE, study.ask(), shares=SAMPLERS["tpe"].shares)
            times.append(time.process_time() - before)
        return statistics.median(times)

    monkeypatch.setattr(trial_window, "LATEST", 300)
    assert seconds(2000) < 3 * seconds(300)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("sampler", ["tpe", "multivariate_tpe"])
def test_it_finds_what_tpe_on_all_trials_finds(sampler, monkeypatch):
    """Five times as many trials as the window has; the sampler's default is a thousand."""
    monkeypatch.setattr(trial_window, "LATEST", 120)
    found = [searched(sweep(sampler, 600, seed)).min() for seed in range(5)]
    monkeypatch.setattr(trial_window, "LATEST", 10_000)
    everything = [searched(sweep(sampler, 600, seed)).min() for seed in range(5)]
    print(f"{sampler}: window {statistics.median(found):.4f}, all {statistics.median(everything):.4f}")
    assert statistics.median(found) <= 1.15 * statistics.median(everything)
