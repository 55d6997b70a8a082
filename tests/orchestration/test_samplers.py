"""How points are proposed: each sampler on functions with a known optimum, what each refuses, and the whole space under each."""

from __future__ import annotations

import itertools
import math
import statistics
from typing import get_args

import numpy as np
import optuna
import pytest

from models.errors import UserError
from orchestration.search_space import SHARE, Dimension, as_proposed, suggest
from orchestration.sweeping.config import SamplerName, sweep_key
from orchestration.sweeping.goals import SweepObjective
from orchestration.sweeping.loading import load_sweep
from orchestration.sweeping.proposals import StudySearch
from orchestration.sweeping.samplers import SAMPLERS, sampler_of
from orchestration.sweeping.study import open_study

LOWER, UPPER, RATE, STEP, STEPS = (
    "defence.lower_bound", "defence.upper_bound", "training.optimizer.learning_rate", "training.attack.step_size", "training.attack.steps",
)  # fmt: skip
SPACE = {
    LOWER: Dimension(type="float", low=200, high=2000, log=True),
    UPPER: Dimension(type="float", low=800, high=4000, log=True, above=LOWER),
    RATE: Dimension(type="float", low=0.001, high=0.3, log=True),
    STEP: Dimension(type="float", low=0.01, high=0.1),
    STEPS: Dimension(type="int", low=2, high=12),
}
OPTIMUM = {LOWER: 700.0, UPPER: 1800.0, RATE: 0.03, STEP: 0.07, STEPS: 9}
ELSEWHERE = (
    {LOWER: 300.0, UPPER: 3000.0, RATE: 0.004, STEP: 0.03, STEPS: 4},
    {LOWER: 1500.0, UPPER: 1900.0, RATE: 0.2, STEP: 0.05, STEPS: 11},
)


def place(name, value):
    """Where a value lies in the range of its dimension, in [0,1]."""
    low, high = SPACE[name].bounds
    return math.log(value / low) / math.log(high / low) if SPACE[name].log else (value - low) / (high - low)


def regret(values, optimum=OPTIMUM):
    """Zero at the optimum alone; the two bounds matter together."""
    apart = abs(math.log(values[UPPER] / values[LOWER]) - math.log(optimum[UPPER] / optimum[LOWER]))
    return sum((place(name, value) - place(name, optimum[name])) ** 2 for name, value in values.items()) + 0.7 * apart


def sweep(sampler, trials, seed=0, objectives=1):
    goals = tuple(SweepObjective(metric=f"m{index}", mode="min") for index in range(objectives))
    fields = {"space": SPACE, "stopping": None, "sampler": sampler, "num_trials": trials, "seed": seed, "objectives": goals}
    return load_sweep("ctrw_bounds_digits").model_copy(update=fields)


def searched(config):
    """The study of a sweep over `regret`, the best of it after each trial, and all values."""
    optima = (OPTIMUM, *ELSEWHERE)[: len(config.objectives)]
    study = optuna.create_study(directions=["minimize"] * len(optima), sampler=sampler_of(config, 0))
    found = []
    for _ in range(config.num_trials):
        trial = study.ask()
        values = suggest(SPACE, trial, shares=SAMPLERS[config.sampler].shares)
        assert values[LOWER] <= values[UPPER] and all(SPACE[name].takes(value) for name, value in values.items())
        outcome = [regret(values, optimum) for optimum in optima]
        study.tell(trial, outcome)
        found.append(outcome)
    return np.array(found)


def dominated_share(outcomes):
    """Share of the box [0, 2]^m that a front dominates (hypervolume), by a fixed set of points."""
    points = np.random.default_rng(0).uniform(0, 2, (4000, outcomes.shape[1]))
    return float((outcomes[None] <= points[:, None]).all(axis=2).any(axis=1).mean())


@pytest.mark.parametrize(
    ("sampler", "trials", "seeds"),
    [
        ("tpe", 60, 4),
        ("multivariate_tpe", 60, 4),
        ("grouped_tpe", 60, 4),
        ("cmaes", 60, 4),
        ("nsgaii", 100, 4),
        pytest.param("gp", 24, 1, marks=pytest.mark.slow),
    ],
)
def test_it_beats_chance_at_as_many_trials(sampler, trials, seeds):
    best, chance = (
        statistics.median(searched(sweep(name, trials, seed)).min() for seed in range(max(seeds, 4 if name == "random" else 0)))
        for name in (sampler, "random")
    )
    assert best < 0.8 * chance, "docs/sweeps.md says so"


@pytest.mark.parametrize(
    ("sampler", "objectives"),
    [
        ("nsgaii", 2),
        ("nsgaiii", 3),
        pytest.param("tpe", 2, marks=pytest.mark.slow),
        pytest.param("multivariate_tpe", 2, marks=pytest.mark.slow),
    ],
)
def test_its_front_beats_chance_at_as_many_trials(sampler, objectives):
    shares, chance = (
        statistics.median(dominated_share(searched(sweep(name, 120, seed, objectives))) for seed in range(3))
        for name in (sampler, "random")
    )
    assert shares > chance


def test_a_sobol_sequence_covers_the_space_more_evenly_than_chance():
    def largest_gap(sampler, seed):
        config = sweep(sampler, 64, seed)
        study = optuna.create_study(sampler=sampler_of(config, 0))
        gaps = []
        points = []
        for _ in range(64):
            trial = study.ask()
            values = suggest(SPACE, trial, shares=SAMPLERS[sampler].shares)
            points.append([place(name, values[name]) for name in (LOWER, RATE, STEP)])
            study.tell(trial, 0)
        for column in np.sort(np.array(points), axis=0).T:
            gaps.append(np.diff(column).max())
        return max(gaps)

    assert statistics.median(largest_gap("qmc", seed) for seed in range(3)) < 0.7 * statistics.median(
        largest_gap("random", seed) for seed in range(3)
    )


def test_the_names_of_the_config_are_those_of_the_samplers():
    assert set(get_args(SamplerName)) == set(SAMPLERS)


NUMBERS = "  training.optimizer.learning_rate: {type: float, low: 0.01, high: 0.1}\n  training.epochs: {type: int, low: 1, high: 3}\n"
CHOICE = "  defence.constraint: {type: choice, choices: [project]}\n"
CONDITIONAL = (
    "  training.epochs: {type: int, low: 1, high: 3}\n  training.attack.steps: {type: int, low: 1, high: 3, when: {training.epochs: [2]}}\n"
)
TWO = "objectives: [{metric: validation/robust_accuracy}, {metric: model/parameters, mode: min}]\n"


@pytest.mark.parametrize(
    ("samplers", "space", "more", "reason"),
    [
        (("cmaes", "qmc"), NUMBERS + CHOICE, "", "it moves along numbers, and defence.constraint is a choice"),
        (("gp", "cmaes", "qmc", "nsgaii"), CONDITIONAL, "", "training.attack.steps is one that only some trials have"),
        (("cmaes",), NUMBERS, TWO, "it improves one objective, and there are 2; these can: tpe"),
        (("nsgaiii",), NUMBERS, "", "it is for several objectives"),
        (("cmaes",), NUMBERS.splitlines()[0] + "\n", "", "it needs two dimensions"),
        (("gp",), NUMBERS, "num_trials: 5000\n", "its proposals take minutes beyond 1000 trials"),
    ],
)
def test_what_it_cannot_do_is_refused_in_one_sentence(tmp_path, samplers, space, more, reason):
    for sampler in samplers:
        trials = "" if "num_trials" in more else "num_trials: 4\n"
        (tmp_path / "s.yaml").write_text(f"recipe: ctrw_digits\nsampler: {sampler}\n{trials}{more}space:\n{space}")
        with pytest.raises(UserError) as refused:
            load_sweep(str(tmp_path / "s.yaml"))
        assert reason in str(refused.value) and f"sampler {sampler}" in str(refused.value)
        assert "\n" not in str(refused.value)


def test_without_the_package_cma_es_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (tmp_path / "s.yaml").write_text(f"recipe: ctrw_digits\nsampler: cmaes\nnum_trials: 4\nspace:\n{NUMBERS}")
    with pytest.raises(UserError, match="make setup EXTRAS=cmaes"):
        load_sweep(str(tmp_path / "s.yaml"))


def test_a_share_gives_every_value_above_the_bound_and_back():
    dimensions = [
        Dimension(type="float", low=1, high=100, log=True, above="x"),
        Dimension(type="float", low=0, high=1, step=0.25, above="x"),
        Dimension(type="float", low=-1, high=1, above="x"),
        Dimension(type="int", low=1, high=9, step=2, above="x"),
        Dimension(type="int", low=1, high=64, log=True, above="x"),
        Dimension(type="int", low=1, high=4, above="x"),
    ]
    for dimension, bound_at, share in itertools.product(dimensions, (0, 0.3, 0.9, 1), (0, 0.2, 0.5, 0.99, 1)):
        low, high = dimension.bounds
        bound = low + bound_at * (high - low)
        value = dimension.at_share(share, bound)
        assert bound <= value <= high and dimension.takes(value)
        assert dimension.at_share(dimension.share_of(value, bound), bound) == pytest.approx(value)
    seen = {dimensions[5].at_share(share / 100, 2) for share in range(101)}
    assert seen == {2, 3, 4}


@pytest.mark.parametrize("sampler", ["tpe", "gp", "cmaes", "qmc"])
def test_given_points_come_first_and_an_interrupted_trial_again(tmp_path, sampler):
    config = sweep(sampler, 6).model_copy(update={"points": (dict(OPTIMUM), {RATE: 0.02})})
    search = StudySearch(config, open_study(config, tmp_path))
    first, second = (search.suggest(name)["values"] for name in "ab")
    assert first == pytest.approx(OPTIMUM)
    assert second[RATE] == 0.02
    search.on_trial_complete("a", {"epoch": 2, "finished": True, "m0": 0.5})
    # kill -9 here; a later start:
    search = StudySearch(config, open_study(config, tmp_path))
    assert search.suggest("c")["values"] == pytest.approx(second)
    third = search.suggest("d")["values"]
    assert third[LOWER] <= third[UPPER] and third not in (first, second)


@pytest.mark.parametrize(("sampler", "starts", "trials"), [("qmc", 2, 4), pytest.param("cmaes", 3, 12, marks=pytest.mark.slow)])
def test_a_later_start_goes_on_with_what_the_first_learned(tmp_path, sampler, starts, trials):
    """CMA-ES finds its state in the study, and a sequence goes on where it was."""
    config, seen = sweep(sampler, starts * trials), []
    for start in range(starts):
        search = StudySearch(config, open_study(config, tmp_path))
        for index in range(trials):
            values = search.suggest(f"{start}-{index}")["values"]
            search.on_trial_complete(f"{start}-{index}", {"epoch": 1, "finished": True, "m0": regret(values)})
            seen.append(values)
    assert len({repr(values) for values in seen}) == starts * trials, "nothing is proposed twice"
    if sampler == "cmaes":
        assert statistics.median(map(regret, seen[-trials:])) < 0.7 * np.median(searched(sweep("random", 36)))


def test_what_came_later_leaves_the_keys_of_earlier_sweeps_alone():
    known = sweep_key(load_sweep("ctrw_bounds_digits"))
    assert sweep_key(load_sweep("ctrw_bounds_digits", {"stopping.scheduler": "asha"})) == known
    assert sweep_key(load_sweep("ctrw_bounds_digits", {"stopping.scheduler": "median"})) != known
    assert sweep_key(load_sweep("ctrw_bounds_digits", {"sampler": "gp"})) != known


def test_a_point_is_told_as_it_is_proposed():
    told = as_proposed(SPACE, OPTIMUM, shares=True)
    assert set(told) == {LOWER, UPPER + SHARE, RATE, STEP, STEPS}
    assert as_proposed(SPACE, OPTIMUM) == OPTIMUM
