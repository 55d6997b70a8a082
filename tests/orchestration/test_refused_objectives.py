"""What an objective refuses, it refuses before its run is opened: generated values of every field of every objective, on every defence."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

import pytest

from models.errors import UserError
from orchestration.home import Home, Workplace
from orchestration.recipes import load_recipe
from orchestration.recipes.library import method_files
from orchestration.training.job import TrainingJob
from orchestration.training.training_run import train_here
from tests.fuzz.broken_values import Section, arms, bare, leaves
from tests.fuzz.command_line import SEED
from tests.orchestration.earlier_homes.contents import TINY
from trainers.objective import ObjectiveConfig, objective_entry, objectives

FEW = 12
SMALLER = {"data.limit_train": "40", "data.validation_size": "8", "training.batch_size": "16", "training.epochs": "1"}
FIELDS = [f"--{name}={value}" for name, value in (TINY | SMALLER).items()]


class Goes(Exception):
    """The second step was reached."""


def values_of(leaf: Any, rng: random.Random) -> list[Any]:
    """Return values that the schema of a field allows, at the ends of what it allows."""
    kinds = arms(leaf.annotation)
    found: list[Any] = [each for arm in kinds if get_origin(arm) is Literal for each in get_args(arm)]
    if bool in kinds:
        found += [True, False]
    if kinds & {int, float}:
        bounds = leaf.bounds
        found += [bounds[name] for name in ("ge", "le") if name in bounds and bounds[name] <= 100]
        found += [rng.randint(30, 60)]
    if str in kinds:
        found += ["/nowhere/at/all"]
    if any(get_origin(arm) is tuple and bare(get_args(arm)[0]) is str for arm in kinds):
        found += [["/nowhere/at/all"], ["/dev/null"], ["/"], [__file__, __file__], ["a"] * 7]
    return found


def cases() -> Iterator[tuple[str, list[str]]]:
    """Yield recipes with flags: each objective with each value, on defences that may carry it, or not."""
    rng = random.Random(SEED)
    recipes = [f"{method}_digits" for method in sorted(method_files())]
    for name, entry in sorted(objectives().items()):
        config: ObjectiveConfig = entry.config(name=name)
        own = [recipe for recipe in recipes if load_recipe(recipe).experiment.training.objective.name == name]
        for leaf in leaves(config):
            if isinstance(leaf, Section) or leaf.field == "name":
                continue
            for value in values_of(leaf, rng):
                recipe = rng.choice(own * 2 + recipes)
                objective = {"name": name, leaf.field: value} if "." not in leaf.field else {"name": name}
                flags = [f"--training.objective={objective}".replace("True", "true").replace("False", "false").replace("None", "null")]
                if "." in leaf.field:
                    flags.append(f"--training.objective.{leaf.field}={value}".replace("True", "true").replace("False", "false"))
                yield recipe, flags


def outcome(recipe: str, flags: list[str], home: Home) -> str:
    """Return `refused` if a training was refused before it began, `goes` if it took two steps; what it refused later is raised."""
    try:
        experiment = load_recipe(recipe, [*FIELDS, *flags]).experiment
    except UserError:
        return "refused"
    ready = []

    def on_step(step: int, number: int) -> None:
        if step == 2:
            raise Goes

    try:
        train_here(TrainingJob.at(Workplace(home), experiment), on_step=on_step, on_ready=lambda: ready.append(1))
    except UserError:
        if ready:
            raise
        return "refused"
    except Goes:
        assert ready
    return "goes"


def try_cases(chosen: list[tuple[str, list[str]]], home: Home) -> None:
    problems, outcomes = [], {"refused": 0, "goes": 0}
    for recipe, flags in chosen:
        try:
            outcomes[outcome(recipe, flags, home)] += 1
        except Exception as error:
            problems.append(f"{type(error).__name__}: {str(error)[:200]}: {recipe} {flags}")
    assert not problems, f"{len(problems)} of {len(chosen)} with seed {SEED}:\n" + "\n".join(problems)
    assert min(outcomes.values()) > 0, "a test that tries one kind proves nothing"


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_an_objective_refuses_is_refused_before_its_run_is_opened(tmp_path):
    every = list(cases())
    random.Random(SEED).shuffle(every)
    try_cases(every[:FEW], Home.locate(tmp_path))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_any_objective_refuses_is_refused_before_its_run_is_opened(tmp_path):
    every = list(cases())
    assert {objective_entry(name).name for name in objectives()} >= {"dverge", "rat_taylor"}
    try_cases(every, Home.locate(tmp_path))
