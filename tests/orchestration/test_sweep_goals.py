"""Objectives, constraints, repeats and what a study says at its end, driven by hand without a cluster."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch

from models.errors import UserError
from models.registry import build_model
from orchestration.recipes import load_recipe
from orchestration.sweeping.config import sweep_key
from orchestration.sweeping.findings import conclude_search, importances, infeasible, proxy_correlations, rungs, show_trials
from orchestration.sweeping.listener import TrialListener, TrialRow
from orchestration.sweeping.loading import load_sweep
from orchestration.sweeping.plan import plan_sweep
from orchestration.sweeping.plots import write_plots
from orchestration.sweeping.proposals import StudySearch
from orchestration.sweeping.repeats import Repeated, choose_by_mean, show_repeats, with_seeds
from orchestration.sweeping.schedulers import EarlyStopping
from orchestration.sweeping.search import Search
from orchestration.sweeping.study import best_trials, full_trials, open_study, proxy_values, top_trials
from orchestration.tracking.experiment_run import ParentRun
from orchestration.tracking.tracker import Tracker
from orchestration.training.final_measures import cost_metrics
from orchestration.training.job import TrialReport
from orchestration.training.measure import MARKED_METRIC
from trainers.complaints import CLIPPED_STEPS, MOST_COMMON_ANSWER

ROBUST, CLEAN, SIZE = "validation/robust_accuracy", "validation/clean_accuracy", "model/parameters"


def run_by_hand(config, folder, outcomes):
    """Finish one trial per outcome; each is (robust, clean, parameters, proxy after epochs 4 and 8)."""
    study = open_study(config, folder)
    search = StudySearch(config, study)
    for index, (robust, clean, size, early) in enumerate(outcomes):
        name = f"t{index}"
        search.suggest(name)
        for epoch, value in early.items():
            search.on_trial_result(name, {"epoch": epoch, ROBUST: value, CLEAN: clean})
        final = {ROBUST: robust, CLEAN: clean, SIZE: size, f"{ROBUST}/T1": robust - 0.1}
        search.on_trial_complete(name, TrialReport(12, final, "", finished=True).to_result())
    return study


OUTCOMES = [
    (0.50, 0.95, 2e6, {4: 0.40, 8: 0.45}),
    (0.60, 0.85, 1e6, {4: 0.30, 8: 0.55}),
    (0.40, 0.97, 1e6, {4: 0.20, 8: 0.35}),
    (0.70, 0.80, 1e6, {4: 0.10, 8: 0.60}),
    (0.30, 0.99, 1e6, {4: 0.05, 8: 0.25}),
]


def test_infeasible_trials_never_win(tmp_path):
    config = load_sweep(
        "ctrw_bounds_digits",
        {"num_trials": 5, "constraints": [{"metric": CLEAN, "at_least": 0.9}, {"metric": SIZE, "at_most": 1.5e6}]},
    )
    study = run_by_hand(config, tmp_path, OUTCOMES)
    assert best_trials(config, study) == [2]
    assert top_trials(config, study, 3) == [2, 4]
    violated = dict(infeasible(config, full_trials(study)))
    assert set(violated) == {0, 1, 3}
    assert "parameters <= 1.5e+06 (it has 2e+06)" in violated[0]
    assert "clean_accuracy >= 0.9 (it has 0.8)" in violated[3]


def test_no_feasible_trial_is_no_winner(tmp_path):
    config = load_sweep("ctrw_bounds_digits", {"num_trials": 5, "constraints": [{"metric": CLEAN, "at_least": 0.999}]})
    study = run_by_hand(config, tmp_path, OUTCOMES)
    assert best_trials(config, study) == []
    assert top_trials(config, study, 3) == []


def test_a_front_of_feasible_trials_and_its_plots(tmp_path):
    config = load_sweep(
        "ctrw_bounds_digits",
        {
            "num_trials": 5,
            "objectives": [{"metric": ROBUST}, {"metric": SIZE, "mode": "min"}],
            "constraints": [{"metric": CLEAN, "at_least": 0.84}],
        },
    )
    study = run_by_hand(config, tmp_path, OUTCOMES)
    assert best_trials(config, study) == [1]
    shares = importances(config, full_trials(study))
    assert set(shares) == {ROBUST, SIZE}
    assert shares == importances(config, full_trials(study)), "the same study gives the same importances"
    files = write_plots(config, study, tmp_path / "plots", 1, shares)
    pictures = {"history", "parallel_coordinates", "pareto_front", "importances", "slice", "contour"}
    assert {file.name for file in files} == {*(f"{name}.png" for name in pictures), "history.svg", "pareto_front.svg", "slice.svg"}
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files if file.suffix == ".png")
    runs = {trial.user_attrs["fingerprint"] for trial in full_trials(study)}
    for file in files:
        if file.suffix == ".svg":
            linked = set(re.findall(r'xlink:href="\.\./\.\./\.\./runs/(\w+)"', file.read_text()))
            assert linked == runs, f"each point of {file.name} opens its run"


@pytest.mark.parametrize("mode", ["max", "min"])
def test_the_dimension_that_matters_is_the_important_one(tmp_path, mode):
    """Of six dimensions one decides, whichever end of the objective is the better one."""
    dimensions = ["learning_rate", "weight_decay", "momentum"]
    config = load_sweep(
        "ctrw_bounds_digits",
        {
            "num_trials": 60,
            "sampler": "random",
            "objectives": [{"metric": ROBUST, "mode": "max"} if mode == "max" else {"metric": SIZE, "mode": "min"}],
            **{f"space.training.optimizer.{name}": {"type": "float", "low": 0.01, "high": 0.9} for name in dimensions},
        },
    )
    study, deciding = open_study(config, tmp_path), "training.optimizer.weight_decay"
    search = StudySearch(config, study)
    for index in range(60):
        value = search.suggest(str(index))["values"][deciding]
        search.on_trial_complete(str(index), TrialReport(12, {ROBUST: value**2, SIZE: 1e6 * (1 - value)}, "", finished=True).to_result())
    (shares,) = importances(config, full_trials(study)).values()
    assert next(iter(shares)) == deciding
    assert shares[deciding] > 0.5
    assert sum(shares.values()) == pytest.approx(1)


def test_the_proxy_is_compared_with_the_final_measure(tmp_path):
    config = load_sweep("ctrw_bounds_digits", {"num_trials": 5, "objectives": [{"metric": f"{ROBUST}/T1"}]})
    assert config.needs_protocols
    study = run_by_hand(config, tmp_path, OUTCOMES)
    assert study.best_value == pytest.approx(0.6)
    assert proxy_values(config, study.trials[0]) == {4: 0.40, 8: 0.45}
    assert rungs(config, 12) == [4, 8, 12]
    found = {each.epoch: each for each in proxy_correlations(config, full_trials(study), 12)}
    assert set(found) == {4, 8}
    assert found[8].rho == pytest.approx(1.0)
    # Ranks after epoch 4: 5, 4, 3, 2, 1; at the end 3, 4, 2, 5, 1: sum of squared differences 4 + 0 + 1 + 9 + 0, so 1 - 6*14/120.
    assert found[4].rho == pytest.approx(0.3)
    assert found[4].num_trials == 5
    # What early stopping remembers is the proxy, not the objective.
    scheduler = EarlyStopping(config, 12, study)
    decisions = []
    for number, value in ((100, 0.25), (101, 0.15)):
        trial = SimpleNamespace(trial_id=str(number), config={"number": number})
        scheduler.on_trial_add(None, trial)
        decisions.append(scheduler.on_trial_result(None, trial, {"epoch": 4, ROBUST: value}))
    assert decisions == ["CONTINUE", "STOP"], "0.25 is below the median of the objective"


def test_a_minimized_objective_correlates_with_the_right_sign(tmp_path):
    config = load_sweep("ctrw_bounds_digits", {"num_trials": 5, "objectives": [{"metric": SIZE, "mode": "min"}]})
    sizes = [(robust, clean, 1e6 / robust, early) for robust, clean, _, early in OUTCOMES]
    study = run_by_hand(config, tmp_path, sizes)
    assert {each.epoch: each.rho for each in proxy_correlations(config, full_trials(study), 12)}[8] == pytest.approx(1.0)


def test_too_few_trials_say_nothing(tmp_path):
    config = load_sweep("ctrw_bounds_digits", {"num_trials": 3})
    study = run_by_hand(config, tmp_path, OUTCOMES[:3])
    assert importances(config, full_trials(study)) is None
    assert proxy_correlations(config, full_trials(study), 12) == []


def test_the_winner_over_seeds_is_the_best_feasible_mean():
    config = load_sweep("ctrw_bounds_digits", {"constraints": [{"metric": CLEAN, "at_least": 0.9}], "repeats": {"top": 3, "seeds": [1, 2]}})
    repeated = [
        Repeated(0, (0, 1, 2), {ROBUST: (0.9, 0.3, 0.3), CLEAN: (0.95, 0.95, 0.95)}),
        Repeated(1, (0, 1, 2), {ROBUST: (0.6, 0.6, 0.6), CLEAN: (0.95, 0.95, 0.95)}),
        Repeated(2, (0, 1, 2), {ROBUST: (0.8, 0.8, 0.8), CLEAN: (0.95, 0.85, 0.85)}),
    ]
    assert choose_by_mean(config, repeated) == 1
    assert repeated[0].mean(ROBUST) == pytest.approx(0.5)
    assert repeated[0].deviation(ROBUST) == pytest.approx(0.34641, abs=1e-5)
    assert choose_by_mean(config, repeated[2:]) is None
    seeds = with_seeds(config.experiment({}), (0, 1, 2))
    assert [experiment.seed for experiment in seeds] == [0, 1, 2]
    assert len({experiment.fingerprint for experiment in seeds}) == 3


def test_repeats_are_a_budget_and_goals_are_not():
    key = sweep_key(load_sweep("ctrw_bounds_digits"))
    assert key == "ctrw_bounds_digits-ef881917", "a sweep that was begun earlier goes on"
    assert sweep_key(load_sweep("ctrw_bounds_digits", {"repeats": {"top": 2}})) == key
    assert sweep_key(load_sweep("ctrw_bounds_digits", {"constraints": [{"metric": CLEAN, "at_least": 0.5}]})) != key


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"constraints": [{"metric": CLEAN}]}, ["at_least", "at_most"]),
        ({"constraints": [{"metric": "model/parameter", "at_most": 5}]}, ["model/parameters"]),
        ({"objectives": [{"metric": f"{ROBUST}/T9"}]}, [f"{ROBUST}/T"]),
        ({"stopping": {"metric": "model/parameters"}}, ["model/parameters", "validation/robust_accuracy"]),
        ({"recipes": ["rna_digits"]}, ["either `recipe` or `recipes`"]),
        ({"repeats": {"top": 0}}, ["repeats.top"]),
    ],
)
def test_mistakes_in_goals_are_found_before_anything_starts(change, parts):
    with pytest.raises(UserError) as caught:
        load_sweep("ctrw_bounds_digits", change)
    for part in parts:
        assert part in str(caught.value)


def test_costs_of_a_model_leave_it_as_it_was():
    model = build_model("ctrw", backbone="resnet8", num_classes=10, image_shape=(1, 8, 8))
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    metrics = cost_metrics(model, (1, 8, 8))
    assert metrics["model/parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert metrics["model/latency_ms"] > 0
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_summary_of_a_search_is_shown_and_kept(tmp_path, home, capsys, monkeypatch):
    config = load_sweep("ctrw_bounds_digits", {"num_trials": 5, "objectives": [{"metric": ROBUST}, {"metric": CLEAN}]})
    study = run_by_hand(config, tmp_path, OUTCOMES)
    tracker = Tracker(home, "rayndom")
    parent = tracker.run("sweep", {"rayndom.sweep": "x"}, "x")
    search = Search(plan_sweep(config, tmp_path, home), study, ParentRun(tracker, parent))
    show_trials(search, 3)
    found = conclude_search(search, 3)
    out = capsys.readouterr().out
    assert "Pareto front" in out
    assert "importance" in out
    assert "Spearman" in out
    assert {each["trial"] for each in found["front"]} == {0, 1, 2, 3, 4}
    names = {item.path for item in tracker.client.list_artifacts(parent, "plots")}
    assert {"plots/pareto_front.png", "plots/parallel_coordinates.png", "plots/history.png"} <= names


def test_a_trial_that_did_not_learn_is_said_to_be_one(tmp_path, home, capsys):
    config = load_sweep("ctrw_bounds_digits", {"num_trials": 2})
    study = open_study(config, tmp_path)
    search = StudySearch(config, study)
    for name, clipped in (("sound", 0.5), ("clipped", 0.95)):
        search.suggest(name)
        search.on_trial_complete(name, TrialReport(12, {ROBUST: 0.5, CLIPPED_STEPS: clipped}, "", finished=True).to_result())
    tracker = Tracker(home, "rayndom")
    finished = Search(plan_sweep(config, tmp_path, home), study, ParentRun(tracker, tracker.run("sweep", {"rayndom.sweep": "x"}, "x")))
    show_trials(finished, 0)
    assert "warning: trial 1: 95 % of the steps were clipped" in capsys.readouterr().err
    assert [each["trial"] for each in conclude_search(finished, 0)["not_learning"]] == [1]


def test_while_trials_run_each_sign_is_said_once(home, capsys):
    experiment = load_recipe("at_digits").experiment
    run = ParentRun(Tracker(home, "rayndom"), "").child("trial", experiment, "trial 0")
    writer = SimpleNamespace(later=lambda *_: None)
    listener = TrialListener("trial", "trials", [], lambda _: TrialRow("trial 0", [], run), writer, None, wanted=1)
    trial = SimpleNamespace(trial_id="a", config={})
    for epoch in (1, 2):
        report = TrialReport(epoch, {"train/loss": 1.0, MOST_COMMON_ANSWER: 1.0}, "")
        listener.on_trial_result(epoch, [], trial, report.to_result())
    assert capsys.readouterr().err.count("warning: trial 0, epoch 1: a network answers one class for all images") == 1


def test_accuracies_of_an_invalid_evaluation_carry_their_mark_in_every_table_of_a_sweep(tmp_path, home, capsys):
    config = load_sweep("ctrw_bounds_digits", {"num_trials": 2, "objectives": [{"metric": f"{ROBUST}/T1"}, {"metric": CLEAN}]})
    study = open_study(config, tmp_path)
    search = StudySearch(config, study)
    for name, marked in (("sound", 0.0), ("invalid", 1.0)):
        search.suggest(name)
        final = {f"{ROBUST}/T1": 0.5, CLEAN: 0.75, MARKED_METRIC: marked}
        search.on_trial_complete(name, TrialReport(12, final, "", finished=True).to_result())
    show_trials(Search(plan_sweep(config, tmp_path, home), study, ParentRun(Tracker(home, "rayndom"), "")), 0)
    lines = capsys.readouterr().out.splitlines()
    shown = [line for line in lines if "0.75" in line]
    assert len(shown) == 4, "two trials, in the table and on the front"
    assert sum("0.5 (!)" in line for line in shown) == 2
    assert not any("0.75 (!)" in line for line in lines), "clean accuracy of training is no number of the evaluation"

    seeds = Repeated(1, (0, 1), {f"{ROBUST}/T1": (0.5, 0.7), CLEAN: (0.75, 0.75), MARKED_METRIC: (0.0, 1.0)})
    show_repeats(config, [seeds], 1)
    assert "0.6 (!) +-" in capsys.readouterr().out
    constrained = load_sweep("ctrw_bounds_digits", {"constraints": [{"metric": MARKED_METRIC, "at_most": 0}]})
    assert constrained.needs_protocols, "a user may forbid invalid evaluations to win"
