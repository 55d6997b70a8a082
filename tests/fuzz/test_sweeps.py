"""Wrong values in every field of a sweep, in files and as flags, and searches that mean nothing: refused before anything starts."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from orchestration.sweeping.loading import load_sweep
from tests.fuzz.broken_values import Case, Section, leaf_cases, leaves, section_cases
from tests.fuzz.command_line import SEED, complaint, rayndom
from tests.fuzz.test_configurations import flag, names_of, report

FEW, MANY = 40, 1500
RATE = "training.optimizer.learning_rate"

BASE: dict[str, Any] = {
    "recipe": "rna_digits",
    "settings": {"training.epochs": 2, "data.limit_train": 64, "training.batch_size": 16},
    "space": {
        RATE: {"type": "float", "low": 0.01, "high": 0.1, "log": True},
        "training.attack.steps": {"type": "int", "low": 1, "high": 5, "step": 2},
        "defence.choice": {"type": "choice", "choices": ["per_layer", "per_network"]},
    },
    "points": [{RATE: 0.05}],
    "objectives": [{"metric": "validation/robust_accuracy"}, {"metric": "model/parameters", "mode": "min"}],
    "constraints": [{"metric": "validation/clean_accuracy", "at_least": 0.5}],
    "repeats": {"top": 2, "seeds": [1]},
    "num_trials": 4,
}


@pytest.fixture(autouse=True)
def nothing_is_trained(monkeypatch):
    """The dry run of a sweep that is in order trains a few steps; here only what comes before is of interest."""
    report = SimpleNamespace(total_seconds=0.0, to_json=dict, rows=list)
    monkeypatch.setattr("orchestration.training.dry_run.dry_run", lambda experiment, workplace: report)


def check(folder: Path, tree: Any) -> Any:
    path = folder / "mine.yaml"
    path.write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree))
    return rayndom(["sweep", str(path), "--dry-run", "--home", str(folder / "home")])


def changed(*changes: tuple[str, Any]) -> dict[str, Any]:
    """Return the base with values set at places such as `space/NAME/low`; None removes."""
    tree = copy.deepcopy(BASE)
    for place, value in changes:
        *above, last = place.split("/")
        inner: Any = tree
        for part in above:
            inner = inner[int(part) if isinstance(inner, list) else part]
        if value is None:
            del inner[last]
        else:
            inner[int(last) if isinstance(inner, list) else last] = value
    return tree


def pool(seed: int, number: int) -> list[Case]:
    """Return wrong values of every field of a sweep, and of its dimensions, objectives, constraints and points."""
    rng = random.Random(seed)
    config = load_sweep("ctrw_bounds_digits")
    found: list[Case] = []
    for each in leaves(config):
        found += section_cases(each, rng) if isinstance(each, Section) else leaf_cases(each, rng)
    for prefix, place in (("space", RATE), ("objectives", "0"), ("constraints", "0")):
        inner: Any = BASE[prefix]
        keys = list(inner[place] if isinstance(inner, dict) else inner[0])
        for key in keys:
            values = rng.sample([[], {}, [[None]], {"a": {"b": None}}, 10**40, "zz", -1e308, "\x07"], 3)
            found += [Case(f"{prefix}/{place}/{key}", value, "wrong value in a list", refused=None) for value in values]  # type: ignore[arg-type]
        found.append(Case(f"{prefix}/{place}/zz_unknown", 1, "unknown field"))
    found += [Case(f"points/0/{RATE}", value, "wrong point") for value in (True, "x", [], 5, -1, {"a": 1})]
    found += [Case("points/0/zz_unknown", 1, "unknown dimension"), Case("zz_unknown", 1, "unknown field")]
    found += [Case(f"settings/{name}", 1, "no field") for name in ("zz", "training", "training.zz", "training.epochs.zz", ".", "a..b")]
    rng.shuffle(found)
    return found[:number]


def try_files(cases: list[Case], folder: Path) -> None:
    problems = []
    for case in cases:
        place = case.field if "/" in case.field else case.field.replace(".", "/")
        tree = copy.deepcopy(BASE) | {"measure": {}, "stopping": {}}
        *above, last = place.split("/")
        inner: Any = tree
        for part in above:
            inner = inner[int(part) if isinstance(inner, list) else part]
        inner[last] = case.value
        outcome = check(folder, tree)
        problem = complaint(outcome, [*names_of(case), "mine"], refused=case.refused if case.field not in ("name", "remarks") else None)
        if problem:
            problems.append(f"{problem}: {case.field} {str(case.value)[:60]} ({case.kind}): {outcome.error[:300]}")
    assert not problems, report(problems)


def test_files(tmp_path):
    try_files(pool(SEED + 10, FEW), tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_many_files(tmp_path):
    try_files(pool(SEED + 11, MANY), tmp_path)


def test_flags(tmp_path):
    problems = []
    for case in [case for case in pool(SEED + 12, MANY) if "/" not in case.field and case.field not in ("name", "remarks")][:20]:
        outcome = rayndom(["sweep", "ctrw_bounds_digits", "--dry-run", "--home", str(tmp_path / "home"), flag(case)])
        problem = complaint(outcome, names_of(case), refused=case.refused)
        if problem:
            problems.append(f"{problem}: {flag(case)[:80]} ({case.kind}): {outcome.error[:300]}")
    assert not problems, report(problems)


def test_the_base_is_in_order(tmp_path):
    assert check(tmp_path, BASE).code == 0


CHOICE, STEPS = "space/defence.choice", "space/training.attack.steps"

MEANINGLESS: list[tuple[str, dict[str, Any], str]] = [
    ("an infinite step", changed((f"{STEPS}/step", float("inf"))), "step"),
    ("a step beyond the end", changed((f"{STEPS}/step", 3)), "steps"),
    ("ends with choices", changed((f"{CHOICE}/low", 0)), "choice"),
    ("choices with ends", changed((f"{STEPS}/choices", [1, 3])), "choices"),
    ("a choice twice", changed((f"{CHOICE}/choices", ["per_layer", "per_layer"])), "twice"),
    ("a number twice", changed(("space", {RATE: {"type": "choice", "choices": [0.1, 0.10]}}), ("points", [])), "twice"),
    ("a seed twice", changed(("repeats/seeds", [1, 1])), "twice"),
    ("the search's own seed", changed(("repeats/seeds", [0, 1])), "repeats"),
    ("a baseline twice", changed(("baselines", ["at_digits", "at_digits"])), "at_digits"),
    ("a dimension that is set", changed((f"settings/{RATE}", 0.05)), RATE),
    ("a dimension in a set section", changed(("settings/training.optimizer", {"learning_rate": 0.05})), RATE),
    ("no scientific field", changed(("space/tracking.experiment", {"type": "choice", "choices": ["a", "b"]})), "tracking"),
    ("the name", changed(("space/name", {"type": "choice", "choices": ["a", "b"]})), "name"),
    ("the number of workers", changed(("space/resources.workers", {"type": "int", "low": 1, "high": 2})), "resources"),
    ("the seed", changed(("space/seed", {"type": "int", "low": 1, "high": 2})), "seed"),
    ("the defence", changed(("space/defence", {"type": "choice", "choices": ["natural", "at"]})), "defence"),
    ("the defence's name", changed(("space/defence.name", {"type": "choice", "choices": ["natural", "at"]})), "defence"),
    ("an empty point", changed(("points", [{}])), "point"),
    ("a point twice", changed(("points", [{RATE: 0.05}, {RATE: 0.05}])), "twice"),
    (
        "max and min of one metric",
        changed(("objectives", [{"metric": "model/parameters", "mode": mode} for mode in ("max", "min")])),
        "model/parameters",
    ),
    ("the slowest", changed(("objectives", [{"metric": "model/latency_ms"}])), "model/latency_ms"),
    ("the worst", changed(("objectives", [{"metric": "validation/robust_accuracy", "mode": "min"}])), "robust_accuracy"),
    ("no such metric", changed(("objectives", [{"metric": "validation/robustness"}])), "validation/robustness"),
    ("stopping by a time", changed(("stopping", {"metric": "time/epoch_seconds"})), "time/epoch_seconds"),
    ("stopping by a loss", changed(("stopping", {"metric": "train/loss"})), "train/loss"),
    (
        "an attack it never meets",
        changed(("objectives", [{"metric": "validation/robust_accuracy/pgd_10"}]), ("settings/training.validation.steps", 10)),
        "pgd_10",
    ),
    ("per cent", changed(("constraints/0/at_least", 50)), "constraints"),
    ("a negative share", changed(("constraints/0/at_least", -0.1)), "constraints"),
    ("a prior of another defence", changed(("prior", {"ctrw": {"use": "seed"}})), "prior"),
    ("a grid over a continuum", changed(("sampler", "grid"), ("points", [])), "continuum"),
    ("a batch beyond the data", changed(("settings/training.batch_size", 65)), "batch_size"),
    (
        "a batch beyond the data, searched",
        changed(("settings/training.batch_size", None), ("space/training.batch_size", {"type": "choice", "choices": [16, 128]})),
        "batch_size",
    ),
    ("a condition that is never true", changed((f"{STEPS}/when", {"defence.choice": []})), "when"),
    ("evil", changed(("recipe", "../../evil")), "evil"),
    (
        "protocols on no images",
        changed(
            ("objectives", [{"metric": "validation/robust_accuracy/T1"}]),
            ("settings/data.validation_size", 0),
            ("settings/training.validation.select_on", "test"),
        ),
        "validation_size",
    ),
]


@pytest.mark.parametrize(("tree", "name"), [pytest.param(tree, name, id=title) for title, tree, name in MEANINGLESS])
def test_searches_without_a_meaning(tmp_path, tree, name):
    outcome = check(tmp_path, tree)
    assert complaint(outcome, [name], refused=True) is None, outcome.said


@pytest.mark.parametrize(
    ("low", "high", "refused"),
    [((300, 400), (100, 200), True), ((100, 400), (200, 300), True), ((100, 200), (300, 400), False), ((100, 300), (200, 400), False)],
)
def test_a_bound_above_another(tmp_path, low, high, refused):
    space = {
        "defence.lower_bound": {"type": "float", "low": low[0], "high": low[1]},
        "defence.upper_bound": {"type": "float", "low": high[0], "high": high[1], "above": "defence.lower_bound"},
    }
    tree = {"recipe": "ctrw_digits", "settings": {"defence.constraint": "project"}, "space": space, "num_trials": 2}
    outcome = check(tmp_path, tree)
    assert complaint(outcome, ["defence.upper_bound"], refused=refused) is None, outcome.said
    assert (outcome.code == 2) == refused


def test_even_kernels_between_odd_ends(tmp_path):
    space = {"defence.kernel_size": {"type": "int", "low": 3, "high": 7}}
    assert "4" in check(tmp_path, {"recipe": "dcs_digits", "space": space, "num_trials": 2}).error
    space["defence.kernel_size"]["step"] = 2
    assert check(tmp_path, {"recipe": "dcs_digits", "space": space, "num_trials": 2}).code == 0


@pytest.mark.parametrize("size", [10**4 + 1, 10**7, 10**9, 10**18])
def test_a_grid_without_end(tmp_path, size):
    space = {"training.validation.steps": {"type": "int", "low": 1, "high": size}}
    outcome = check(tmp_path, {"recipe": "at_digits", "space": space, "sampler": "grid"})
    assert complaint(outcome, ["grid"], refused=True) is None, outcome.said


def test_yaml_that_is_no_sweep(tmp_path):
    texts = ["", "- a", "5", "a: [", "a: 1\na: 2", "!!python/object:os.system x", "1: 2", "null: 3", "2020-01-01: x", "x: 0o17", "\x00",
             "a: " + "[" * 3000, "a: &a [*a]", json.dumps({"recipe": "at_digits" * 1000, "num_trials": 1})]  # fmt: skip
    for text in texts:
        outcome = check(tmp_path, text)
        assert complaint(outcome, ["mine", "at_digits"], refused=True) is None, (text[:50], outcome.said)
    (tmp_path / "mine.yaml").write_bytes(b"recipe: \xff\xfe")
    assert complaint(rayndom(["sweep", str(tmp_path / "mine.yaml"), "--dry-run"]), ["mine.yaml"], refused=True) is None
