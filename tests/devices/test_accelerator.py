"""Device paths on a pretend accelerator: the CPU's numbers, no tensor left on the wrong device, and no waiting where none is needed."""

from __future__ import annotations

import functools
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest

from models.registry import build_model
from models.threat_model import Norm
from orchestration.recipes.loading import load_recipe
from orchestration.recipes.names import listed_recipes

PROJECT = Path(__file__).parents[2]
RECIPES = [str(recipe) for recipe in listed_recipes() if recipe.setting == "digits"]
QUICK_ATTACKS = ("pgd", "square")
ATTACK_LOOPS = ("trainers/attacks/", "analysis/attacks/", "models/layers/", "models/backbones/", "models/classifier.py")
TOLERANCE = 1e-5


@functools.cache
def outcomes(*arguments: str) -> dict[str, dict[str, Any]]:
    """Return what `tests.devices.conformance` printed, by case."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.devices.conformance", *arguments],
        cwd=PROJECT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found = [json.loads(line) for line in run.stdout.splitlines()]
    return {each["case"]: each for each in found}


def training(recipe: str) -> dict[str, Any]:
    """Return what became of a recipe; one process trains all of them."""
    return outcomes("training", *RECIPES)[recipe]


def total(costs: dict[str, int]) -> int:
    return sum(costs.values())


@pytest.mark.parametrize("recipe", RECIPES)
def test_training_gives_the_numbers_of_the_cpu(recipe: str) -> None:
    found = training(recipe)
    assert found["loss"][1] == pytest.approx(found["loss"][0], abs=TOLERANCE)
    assert found["resumed"][0].keys() == found["resumed"][1].keys()
    for name, expected in found["resumed"][0].items():
        assert found["resumed"][1][name] == pytest.approx(expected, abs=1e-4), name
    assert found["weights"] < TOLERANCE
    assert found["answers"] < 1e-4


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_training_step_never_waits_for_the_device(recipe: str) -> None:
    assert training(recipe)["step"]["reads"] == {}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_draw_is_one_copy_however_many_layers_are_random(recipe: str) -> None:
    experiment = load_recipe(recipe).experiment
    model = build_model(
        experiment.defence.name,
        backbone=experiment.backbone.name,
        num_classes=10,
        image_shape=(1, 16, 16),
        backbone_options=experiment.backbone.options,
        **experiment.defence.parameters.model_dump(),
    )
    members = len(getattr(model, "members", ())) or 1
    # The attack's draw and the training step's; an ensemble that trains its members in turn takes both for each.
    assert total(training(recipe)["step"]["copies"]) <= 2 * members


@pytest.mark.parametrize("recipe", RECIPES)
def test_validation_waits_once_at_its_end(recipe: str) -> None:
    assert total(training(recipe)["validation"]["reads"]) == 1


def test_evaluation_gives_the_numbers_of_the_cpu() -> None:
    (found,) = outcomes("evaluation", "ctrw", "linf", *QUICK_ATTACKS).values()
    assert_equal_rows(found)


def test_attacks_of_an_evaluation_do_not_wait_for_the_device() -> None:
    (found,) = outcomes("evaluation", "ctrw", "linf", *QUICK_ATTACKS).values()
    waiting = {line: count for line, count in found["reads"].items() if line.startswith(ATTACK_LOOPS)}
    assert waiting == {}
    sent = {line: count for line, count in found["copies"].items() if line.startswith("analysis/attacks/")}
    assert total(sent) <= 2  # Square's random windows go there together, not one by one


@pytest.mark.slow
@pytest.mark.parametrize("norm", get_args(Norm))
@pytest.mark.parametrize("case", ["at", "rna", "dcs", "red"])
def test_every_attack_and_study_gives_the_numbers_of_the_cpu(case: str, norm: str) -> None:
    (found,) = outcomes("evaluation", case, norm).values()
    assert_equal_rows(found)


def assert_equal_rows(found: dict[str, Any]) -> None:
    expected, measured = found["rows"]
    assert expected.keys() == measured.keys()
    different = {name: (expected[name], measured[name]) for name in expected if not close(expected[name], measured[name])}
    assert different == {}


def close(first: float, second: float) -> bool:
    return math.isclose(first, second, abs_tol=1e-9)
