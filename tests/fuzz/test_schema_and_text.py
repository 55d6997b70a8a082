"""Broken configurations that know no field by name: drawn by reflection over the schemas, and by damaging the text of shipped files."""

from __future__ import annotations

import copy
import math
import random
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest
import yaml
from pydantic import BaseModel

import orchestration
from orchestration.recipes import load_recipe
from orchestration.sweeping.config import SweepConfig
from tests.fuzz.command_line import SEED, Outcome, complaint, rayndom
from tests.fuzz.test_configurations import recipes, report
from tests.fuzz.test_sweeps import BASE

FEW, MANY = 50, 500
Leaf = tuple[tuple[str, ...], frozenset[str]]
"""Where a field stands, and the kinds of values it may hold: names of types, `choice`, `list`, `map`."""

ALWAYS: list[Any] = [math.nan, math.inf, -math.inf, 10**400, 2**63, "a\0b", "\x1b[31m", "x" * 2500, [[[None]]], {"zz": {"a": None}}, {1: 2}]
NO_NUMBER: list[Any] = [True, "zz", "", " ", "1,5", "١٢", [], [1], {}, 1e15, 10**15, 1e30, -1e15, 5e-324, "1e15", "0x1F" * 20]
NO_TEXT: list[Any] = [5, 0.5, True, ["a"], {"a": "b"}, {}]
NO_LIST: list[Any] = [5, {"a": 1}, "text", [[1e15]], [math.nan], [None], [{"zz": 1}]]
NO_MAP: list[Any] = [5, "text", [1], [["a", 1]], True]


@pytest.fixture(autouse=True)
def nothing_is_trained(monkeypatch):
    """The dry run of a sweep that is in order trains a few steps; here only what comes before is of interest."""
    monkeypatch.setattr(
        "orchestration.training.dry_run.dry_run",
        lambda experiment, workplace: SimpleNamespace(total_seconds=0.0, to_json=dict, rows=list),
    )


def kinds(annotation: Any) -> frozenset[str]:
    origin = get_origin(annotation)
    if origin is Annotated:
        return kinds(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return frozenset().union(*map(kinds, get_args(annotation)))
    if origin is Literal:
        return frozenset({"choice"})
    if origin in (tuple, list):
        return frozenset({"list"})
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return frozenset({"map"})
    return frozenset({annotation.__name__ if isinstance(annotation, type) else str(annotation)})


def leaves(record: BaseModel, place: tuple[str, ...] = ()) -> Iterator[Leaf]:
    """Yield the fields of a record, and of those inside it and in its lists; parameters of a defence stand beside its name."""
    for name, info in type(record).model_fields.items():
        value = getattr(record, name)
        below = place if name == "parameters" else (*place, name)
        if isinstance(value, BaseModel):
            yield from leaves(value, below)
        elif isinstance(value, tuple) and value and isinstance(value[0], BaseModel):
            yield from leaves(value[0], (*below, "0"))
        else:
            yield below, kinds(info.annotation)


def nonsense(leaf: Leaf, rng: random.Random) -> Any:
    """Return a value that makes no sense in a field, whatever the field means."""
    (*_, name), allowed = leaf
    # Hundreds of digits are no number in YAML here, but text.
    values = [value for value in ALWAYS if allowed & {"int", "float"} or value != 10**400]
    if allowed & {"int", "float"}:
        values += [value for value in NO_NUMBER if not (name.endswith("seed") and value in (1e15, 10**15, "1e15", "0x1F" * 20))]
        values += [rng.randrange(9) + 0.5] if "float" not in allowed else []
    elif "str" in allowed:
        values += NO_TEXT
    elif "list" in allowed:
        values += NO_LIST
    elif "map" in allowed:
        values += NO_MAP
    elif "choice" in allowed:
        values += ["zz", "", 1e15, -3, [], {}]
    elif allowed == {"bool"}:
        values += [2, -1, 0.5, "perhaps", [], {}]
    return rng.choice(values)


def put(tree: Any, place: tuple[str, ...], value: Any) -> None:
    *above, last = place
    for part in above:
        tree = tree[int(part)] if isinstance(tree, list) else tree.setdefault(part, {})
    tree[last] = value


def check_sweep(folder: Path, tree: Any) -> Outcome:
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(tree))
    return rayndom(["sweep", str(path), "--dry-run", "--home", str(folder / "home")])


def try_experiments(seed: int, number: int, folder: Path) -> None:
    rng, problems = random.Random(seed), []
    fields = [(recipe, leaf) for recipe in recipes() for leaf in leaves(load_recipe(recipe).experiment)]
    for recipe, leaf in (rng.choice(fields) for _ in range(number)):
        tree, value = {"extends": recipe}, nonsense(leaf, rng)
        put(tree, leaf[0], value)
        path = folder / "mine.yaml"
        path.write_text(yaml.safe_dump(tree))
        problem = complaint(rayndom(["show", str(path)]), [*leaf[0][-2:], *(["mine.yaml"] if value == {1: 2} else [])], refused=True)
        if problem:
            problems.append(f"{problem}: {recipe} {'.'.join(leaf[0])} = {value!r:.60}")
    assert not problems, report(problems)


def try_sweeps(seed: int, number: int, folder: Path) -> None:
    rng, problems = random.Random(seed), []
    fields = list(leaves(SweepConfig(**BASE)))
    for leaf in (rng.choice(fields) for _ in range(number)):
        tree, value = copy.deepcopy(BASE), nonsense(leaf, rng)
        put(tree, leaf[0], value)
        # Nothing is an empty map of settings or priors; everything else is nonsense.
        problem = complaint(check_sweep(folder, tree), ["mine"], refused=value not in ([], {}))
        if problem:
            problems.append(f"{problem}: {'.'.join(leaf[0])} = {value!r:.60}")
    assert not problems, report(problems)


LINES = ["1: 2", "null: 1", "true: 1", "2020-01-01: 3", "? [a, b]\n: c", "? {a: b}\n: c", ".nan: 1", "'': 1", "<<: {a: 1}", "<<: *x",
         "<<: 5",
         "a: &a [*a]", "b: &b {c: *b}", "z: [[[[", "z: {a: {b: ", "z: " + "[" * 500 + "]" * 500, "z: " + "{a: " * 300 + "1" + "}" * 300,
         "--- \na: 1", "%YAML 9.9", "%TAG ! x", "\\", "!!binary aGk=: 1", "x: &x {a: 1}\n<<: *x", "extends: mine", "\tz: 1"]  # fmt: skip
ENDS = ["'", '"', "[", "{", "}", "]", ", ,", "|", ">", "#", "@", "`", "%", "\0", "\x07", "\x85", "\u2028", "\x1b[31m", " &a *a", ":", " - "]
TAGS = ["!!int", "!!binary", "!!set", "!!timestamp", "!foo", "!!python/name:os.system", "!!omap", "!!float", "!!bool", "!!null"]
VALUES = ["2020-01-01", "2020-13-45", "12:30:45", "0o17", "1_000", "yes", "~", ".nan", "=", "<<", "9" * 5000, "1e400", "0x" + "f" * 400,
          "1" + "_0" * 3000, "1:" * 900 + "1"]  # fmt: skip


def damaged(text: str, rng: random.Random) -> tuple[str, bytes]:
    """Return how the text of a file was damaged, and the file."""
    lines = text.splitlines()
    index = rng.randrange(len(lines))
    line, key = lines[index], lines[index].split(":")[0]
    ways = {
        "without a line": [*lines[:index], *lines[index + 1 :]],
        "a line twice": [*lines[: index + 1], *lines[index:]],
        "indented": [*lines[:index], "  " + line, *lines[index + 1 :]],
        "not indented": [*lines[:index], line.lstrip(), *lines[index + 1 :]],
        "a tab": [*lines[:index], "\t" + line, *lines[index + 1 :]],
        "an end": [*lines[:index], line + rng.choice(ENDS), *lines[index + 1 :]],
        "a tag": [*lines[:index], line.replace(": ", f": {rng.choice(TAGS)} ", 1), *lines[index + 1 :]],
        "a value": [*lines[:index], f"{key}: {rng.choice(VALUES)}", *lines[index + 1 :]],
        "no colon": [*lines[:index], line.replace(":", "", 1), *lines[index + 1 :]],
        "one line more": [*lines, rng.choice(LINES)],
        "two documents": [*lines[:index], "---", *lines[index:]],
        "shuffled": rng.sample(lines, len(lines)),
    }
    way = rng.choice([*ways, "bytes", "utf-16", "cut"])
    content = "\n".join(ways.get(way, lines)).encode()
    if way == "bytes":
        return way, content[:60] + rng.randbytes(20)
    return way, {"utf-16": text.encode("utf-16"), "cut": content[: rng.randrange(len(content))]}.get(way, content)


def try_texts(seed: int, number: int, folder: Path) -> None:
    """Damaged text may still mean something; what is refused is refused in a message that names the file."""
    rng, problems = random.Random(seed), []
    root = Path(orchestration.__file__).parent
    files = sorted([*root.glob("sweeps/*.yaml"), *root.glob("recipes/methods/*.yaml"), *root.glob("recipes/settings/*.yaml")])
    own = folder / "own"
    for kind in ("methods", "settings"):
        (own / kind).mkdir(parents=True)
    for source in (rng.choice(files) for _ in range(number)):
        way, content = damaged(source.read_text(), rng)
        kind = source.parent.name
        path = folder / "mine.yaml" if kind == "sweeps" else own / kind / "mine.yaml"
        path.write_bytes(content)
        words = {
            "sweeps": ["sweep", str(path), "--dry-run", "--home", str(folder / "home")],
            "methods": ["show", "mine_digits", "--recipes", str(own)],
            "settings": ["show", "at_mine", "--recipes", str(own)],
        }[kind]
        problem = complaint(rayndom(words), ["mine"], refused=None)
        path.unlink()
        if problem:
            problems.append(f"{problem}: {source.name} {way}: {content[:300]!r}")
    assert not problems, report(problems)


TRIALS = {"experiments": try_experiments, "sweeps": try_sweeps, "texts": try_texts}


@pytest.mark.parametrize("kind", TRIALS)
def test_some(tmp_path, kind):
    TRIALS[kind](SEED + 20, FEW, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", TRIALS)
def test_many(tmp_path, kind):
    TRIALS[kind](SEED + 21, MANY, tmp_path)


def test_a_seed_of_the_search_is_one_that_samplers_take(tmp_path):
    assert complaint(check_sweep(tmp_path, BASE | {"seed": 2**32}), ["seed"], refused=True) is None


@pytest.mark.parametrize("method", ["adp", "gal", "dverge", "trs"])
def test_one_member_has_no_other_to_differ_from(method):
    assert complaint(rayndom(["show", f"{method}_digits", "--defence.num_members=1"]), ["num_members"], refused=True) is None
    assert rayndom(["show", f"{method}_digits", "--defence.num_members=2"]).code == 0


@pytest.mark.parametrize("objective", ["adp", "gal", "dverge", "trs", "red", "ensemble_adversarial"])
def test_an_ensemble_s_objective_needs_an_ensemble(objective):
    outcome = rayndom(["show", "at_digits", f"--training.objective={objective}"])
    assert complaint(outcome, ["training.objective"], refused=True) is None, outcome.said


def test_a_section_by_a_bare_name_is_blamed_on_the_file_that_names_it(tmp_path):
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods" / "mine.yaml").write_text("extends: at\ntraining: {optimizer: zz}\n")
    outcome = rayndom(["show", "mine_digits", "--recipes", str(tmp_path)])
    assert complaint(outcome, ["method mine"], refused=True) is None, outcome.said
