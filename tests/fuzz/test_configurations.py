"""Wrong values in every field of an experiment, as flags and in files: each is refused in one message that names the field or the file."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestration.recipes import load_recipe
from orchestration.recipes.library import method_files
from tests.fuzz.broken_values import Case, cases_of
from tests.fuzz.command_line import SEED, complaint, rayndom

FEW, MANY = 90, 3000


def pool(seed: int, number: int) -> list[tuple[str, Case]]:
    """Return so many wrong values of fields of all methods' recipes."""
    rng = random.Random(seed)
    found = [(recipe, case) for recipe in recipes() for case in cases_of(load_recipe(recipe).experiment, rng)]
    rng.shuffle(found)
    return found[:number]


def recipes() -> list[str]:
    return [f"{method}_digits" for method in sorted(method_files())]


def flag(case: Case) -> str:
    text = yaml.safe_dump(case.value, default_flow_style=True, width=10**9).removesuffix("\n").removesuffix("\n...")
    return f"--{case.field}={text}"


def as_tree(case: Case) -> dict[str, Any]:
    tree: Any = case.value
    for part in reversed(case.field.split(".")):
        tree = {part: tree}
    return tree


def names_of(case: Case) -> list[str]:
    """Return what a message about a case may call its field: in full, or within the defence or the objective, which it names."""
    parts = case.field.split(".")
    below = [".".join(parts[start:end]) for end in (len(parts), len(parts) - 1) for start in range(end)]
    return [name for name in below if name]


def report(problems: list[str]) -> str:
    return f"{len(problems)} with seed {SEED}:\n" + "\n".join(problems[:20])


def try_flags(cases: list[tuple[str, Case]]) -> None:
    problems = []
    for recipe, case in cases:
        outcome = rayndom(["show", recipe, flag(case)])
        problem = complaint(outcome, names_of(case), refused=case.refused)
        if problem:
            problems.append(f"{problem}: {recipe} {flag(case)[:100]} ({case.kind}): {outcome.error[:200]}")
    assert not problems, report(problems)


def try_files(cases: list[tuple[str, Case]], folder: Path, kind: str) -> None:
    """Put each wrong value into a recipe file, or into a method or a setting of the user's own."""
    problems = []
    for recipe, case in cases:
        method, tree = recipe.removesuffix("_digits"), as_tree(case)
        own = folder / "own"
        for each in ("settings", "methods"):
            (own / each).mkdir(parents=True, exist_ok=True)
        for old in own.glob("*/*.yaml"):
            old.unlink()
        if kind == "recipe":
            path, words = folder / "mine.yaml", ["show", str(folder / "mine.yaml")]
            tree = {"extends": recipe, **tree}
        elif kind == "method":
            path, words = own / "methods" / "mine.yaml", ["show", "mine_digits", "--recipes", str(own)]
            tree = {"extends": method, **tree}
        else:
            path, words = own / "settings" / "mine.yaml", ["show", f"{method}_mine", "--recipes", str(own)]
            tree = {"extends": "digits", **tree}
        path.write_text(yaml.safe_dump(tree))
        outcome = rayndom(words)
        # What a method needs on digits stands above its own fields, and those above the setting's: either may replace what is wrong.
        own_key = case.field.split(".")[0] in ("name", "description", "settings", "extends")
        refused = case.refused if kind == "recipe" and not own_key else None
        problem = complaint(outcome, [*names_of(case), path.name], refused=refused)
        if problem:
            problems.append(f"{problem}: {kind} {recipe} {str(tree)[:150]} ({case.kind}): {outcome.error[:200]}")
    assert not problems, report(problems)


def test_flags():
    try_flags(pool(SEED, FEW))


@pytest.mark.parametrize("kind", ["recipe", "method", "setting"])
def test_files(tmp_path, kind):
    try_files(pool(SEED + 1, FEW // 3), tmp_path, kind)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_many_flags():
    try_flags(pool(SEED + 2, MANY))


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", ["recipe", "method", "setting"])
def test_many_files(tmp_path, kind):
    try_files(pool(SEED + 3, MANY // 3), tmp_path, kind)


@pytest.mark.parametrize(
    ("recipe", "flags", "names"),
    [
        ("at_digits", ["--training.attack.steps=1", "--training.attack.step_size=3.5"], "step_size"),
        ("at_digits", ["--training.attack.steps=0", "--training.attack.step_size=1e9"], "step_size"),
        ("at_digits", ["--threat_model.epsilon=TRUE"], "epsilon"),
        ("at_digits", ["--training.optimizer.nesterov=true", "--training.optimizer.momentum=0"], "nesterov"),
        ("at_digits", ["--training.batch_size=1400"], "batch_size"),
        ("at_digits", ["--data.limit_train=64", "--training.batch_size=65"], "batch_size"),
        ("at_digits", ["--data.validation_size=0"], "validation_size"),
        ("adp_digits", ["--defence.num_members=10"], "num_members"),
        ("rna_ctrw_digits", ["--defence.defences=[{name: rna}, {name: stacked}]"], "stack"),
        ("rna_ctrw_digits", ["--defence.defences=[{name: rna}, {name: red}]"], "red"),
        ("at_digits", ["--tracking.tags={mlflow.user: me}"], "mlflow.user"),
        ("at_digits", ["--tracking.tags={rayndom.kind: run}"], "rayndom.kind"),
        ("at_digits", ["--tracking.tags={a/../b: x}"], "a/../b"),
        ("at_digits", ["--tracking.experiment="], "experiment"),
        ("at_digits", ["--tracking.experiment= "], "experiment"),
        ("at_digits", ["--name=../../evil"], "evil"),
        ("at_digits", ["--name=..."], "name"),
        *(("at_digits", [f"--backbone.options.{name}=3"], name) for name in ("num_classes", "generator", "name", "image_shape")),
        ("at_cifar10_resnet18", ["--backbone.options.stem=5"], "stem"),
        ("at_digits", ["--training.epochs.x=1"], "epochs"),
        ("at_digits", ["--backbone.name=timm:resnet18", "--backbone.options.checkpoint_path=x.pth"], "checkpoint_path"),
    ],
)
def test_what_has_no_meaning(recipe, flags, names):
    outcome = rayndom(["show", recipe, *flags])
    assert complaint(outcome, [names], refused=True) is None, outcome.said
    assert len(outcome.error) < 800
