"""Recipes and flags: what is shipped validates; a mistake gives one clear message."""

from __future__ import annotations

import pickle

import pytest
import yaml

from models.errors import UserError
from orchestration.commands.command import field_rows
from orchestration.experiment import ExperimentConfig
from orchestration.recipes import load_recipe
from orchestration.sweeping.loading import load_sweep
from orchestration.sweeping.named import list_sweeps


@pytest.mark.parametrize("name", list(list_sweeps()))
def test_every_shipped_sweep_validates(name):
    sweep = load_sweep(name)
    assert sweep.description
    for recipe in sweep.baselines:
        assert sweep.baseline_experiment(recipe).fingerprint


def test_flags_override_the_recipe_and_origins_say_where_values_come_from():
    loaded = load_recipe("ctrw_digits", ["--training.epochs", "3", "--threat_model.epsilon=16/255", "--seed", "5"])
    assert loaded.experiment.training.epochs == 3
    assert loaded.experiment.threat_model.epsilon == 16 / 255
    assert loaded.experiment.seed == 5
    assert loaded.origins["training.epochs"] == "flag"
    assert loaded.origins["backbone.name"] == "setting"
    assert loaded.origins["training.redraw"] == "default"


def test_fingerprint_ignores_operational_sections_and_spelled_out_defaults():
    base = load_recipe("ctrw_digits").experiment
    same = load_recipe(
        "ctrw_digits", ["--resources.workers", "2", "--tracking.experiment", "other", "--defence.constraint", "floor"]
    ).experiment
    assert same.fingerprint == base.fingerprint
    assert load_recipe("ctrw_digits", ["--defence.lower_bound", "2047"]).experiment.fingerprint != base.fingerprint
    assert load_recipe("ctrw_digits", ["--seed", "1"]).experiment.fingerprint != base.fingerprint


def test_epsilon_is_kept_as_papers_write_it():
    experiment = load_recipe("ctrw_cifar10_resnet18").experiment
    assert experiment.model_dump(mode="json")["threat_model"]["epsilon"] == "8/255"
    again = ExperimentConfig(**yaml.safe_load(yaml.safe_dump(experiment.model_dump(mode="json"))))
    assert again == experiment
    assert pickle.loads(pickle.dumps(experiment)) == experiment


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--threat_model.epsilon", "8"], ["threat_model", "pixels are in [0,1]", "8/255"]),
        (["--training.epoch", "3"], ["'training.epoch'", "'epochs'", "batch_size"]),
        (["--defence.lower", "3"], ["'lower'", "'lower_bound'"]),
        (["--training.optimizer.name", "sdg"], ["training.optimizer.name", "'sgd'", "adam"]),
        (["--training.objective.name", "adversial"], ["objective", "'adversarial'"]),
        (["--training.objective.weight_pertubation", "null"], ["weight_pertubation", "'weight_perturbation'"]),
        (["--backbone.name", "resnet19"], ["backbone", "'resnet18'"]),
        (["--data.name", "cifar"], ["data", "'cifar10'"]),
        (["--training.batch_size", "many"], ["training.batch_size", "'many'"]),
        (["--training.attack.step_size", "0.5"], ["step_size", "epsilon"]),
        (["--resources.workers", "3"], ["batch_size", "3"]),
        (["--defence.name", "rna"], ["the recipe chooses the defence"]),
        (["--training.epochs"], ["needs a value"]),
        (["epochs=3"], ["unexpected argument"]),
        (["--training.schedule.milestones", "[5, 3]"], ["milestones", "rise"]),
    ],
)
def test_a_mistake_names_field_problem_and_remedy(flags, parts):
    with pytest.raises(UserError) as caught:
        load_recipe("ctrw_digits", flags)
    message = str(caught.value)
    for part in parts:
        assert part in message
    assert "pydantic" not in message


def test_unknown_recipe_and_broken_files(tmp_path):
    with pytest.raises(UserError, match="'ctrw_digits'"):
        load_recipe("ctrw_digit")
    with pytest.raises(UserError, match="no recipe file"):
        load_recipe(str(tmp_path / "absent.yaml"))
    broken = tmp_path / "broken.yaml"
    broken.write_text("defence: [ctrw\n")
    with pytest.raises(UserError, match=r"broken\.yaml line \d"):
        load_recipe(str(broken))
    broken.write_text("extends: digits\n")
    with pytest.raises(UserError, match="'defence' is missing"):
        load_recipe(str(broken))


def test_a_recipe_file_may_extend_a_shipped_one(tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("extends: ctrw_digits\ndescription: mine\ntraining: {epochs: 4}\n")
    experiment = load_recipe(str(mine)).experiment
    assert experiment.training.epochs == 4
    assert experiment.defence.name == "ctrw"
    assert experiment.name == "mine"


def test_off_is_a_word_and_not_a_boolean():
    assert load_recipe("dcs_digits", ["--defence.gsat", "off"]).experiment.defence.parameters.gsat == "off"
    assert load_recipe("dcs_digits", ["--training.attack.random_start", "false"]).experiment.training.attack.random_start is False


def test_presets_stand_for_parameters_and_flags_override_them():
    paper = load_recipe("ctrw_digits", ["--defence.preset", "paper"]).experiment.defence.parameters
    assert (paper.constraint, paper.lower_bound, paper.upper_bound) == ("project", 1000.0, 2400.0)
    changed = load_recipe("ctrw_digits", ["--defence.preset", "paper", "--defence.lower_bound", "900"]).experiment
    assert changed.defence.parameters.lower_bound == 900
    assert "preset" not in changed.model_dump(mode="json")["defence"]
    with pytest.raises(UserError, match="'official'"):
        load_recipe("ctrw_digits", ["--defence.preset", "oficial"])


def test_help_lists_every_field_with_a_description():
    rows = field_rows(load_recipe("ctrw_digits").experiment)
    flags = {flag for flag, _, _ in rows}
    assert {"--defence.lower_bound", "--training.attack.steps", "--threat_model.epsilon", "--seed"} <= flags
    assert all(description for _, _, description in rows)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"space": {"defence.lower_bound": {"type": "float", "low": -5, "high": 10}}}, ["lower_bound at -5.0", "greater than"]),
        ({"space": {"defence.lowr_bound": {"type": "float", "low": 5, "high": 10}}}, ["lowr_bound", "'defence.lower_bound'"]),
        ({"space": {"training.epochs": {"type": "int", "low": 9, "high": 3}}}, ["low 9", "below high 3"]),
        ({"space": {"training.epochs": {"type": "int", "low": 1, "high": 3, "above": "nothing"}}}, ["nothing", "not a dimension"]),
        ({"space": {"training.redraw": {"type": "choice", "choices": ["each_batch", "each_moon"]}}}, ["each_moon", "each_batch"]),
        ({"num_trial": 3}, ["num_trial", "'num_trials'"]),
        ({"recipe": "ctrw_digit"}, ["'ctrw_digits'"]),
        ({"num_trials": 0}, ["num_trials"]),
        ({"objectives": [{"metric": "validation/robust_acuracy"}]}, ["validation/robust_accuracy"]),
        ({"stopping": {"metric": "nothing"}}, ["validation/robust_accuracy"]),
        ({"suite": "quik"}, ["'quick'"]),
    ],
)
def test_a_sweep_is_checked_before_anything_starts(change, parts):
    with pytest.raises(UserError) as caught:
        load_sweep("ctrw_bounds_digits", change)
    for part in parts:
        assert part in str(caught.value)
