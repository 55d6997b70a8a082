"""Settings and methods of the user's own, and recipe files: where they are found, how they compose, what is refused."""

from __future__ import annotations

import json
import os
import random
from itertools import product

import pytest
import yaml

from models.errors import UserError
from orchestration.cli import main
from orchestration.experiment import ExperimentConfig
from orchestration.recipes import list_recipes, load_recipe, parse_overrides, split_name
from orchestration.recipes.library import VARIABLE, method_files, setting_files, using_folder
from orchestration.recipes.matrix import matrix_lines
from orchestration.sweeping.loading import load_sweep

SETTING = "description: my screws\nextends: digits\ndata: {image_size: 8}\ntraining: {epochs: 2}\n"
METHOD = """
description: TRADES, my way
extends: trades
training: {objective: {beta: 3}}
settings: [screws, digits]
where:
  screws, digits: {training: {epochs: 3}}
  screws: {seed: 7}
variants:
  strong: {training: {objective: {beta: 9}}, settings: [screws]}
"""


@pytest.fixture
def folder(tmp_path):
    """A folder with the setting `screws` and the method `mine`."""
    for kind, name, text in (("settings", "screws", SETTING), ("methods", "mine", METHOD)):
        (tmp_path / "own" / kind).mkdir(parents=True)
        (tmp_path / "own" / kind / f"{name}.yaml").write_text(text)
    return tmp_path / "own"


@pytest.fixture
def used(folder, monkeypatch):
    """The same, in use."""
    monkeypatch.setenv(VARIABLE, str(folder))
    return folder


def test_own_and_shipped_parts_combine(used):
    names = [*(f"{method}_screws" for method in method_files()), *(f"mine_{setting}" for setting in setting_files())]
    for name in names:
        assert load_recipe(name).experiment.name == name
    mine = load_recipe("mine_screws", ["--training.batch_size", "16"])
    assert mine.experiment.defence.name == "trades"
    assert mine.experiment.training.objective.beta == 3
    assert (mine.experiment.training.epochs, mine.experiment.seed, mine.experiment.data.image_size) == (3, 7, 8)
    assert mine.experiment.description == "TRADES, my way, on my screws"
    wanted = {
        "training.objective.beta": "method",
        "training.epochs": "exception",
        "data.image_size": "setting",
        "training.batch_size": "flag",
    }
    assert {field: mine.origins[field] for field in wanted} == wanted
    assert load_recipe("mine_screws_strong").origins["training.objective.beta"] == "variant"
    assert {"mine_screws", "mine_digits", "mine_screws_strong"} <= set(list_recipes())
    assert max(map(len, matrix_lines())) < 80
    assert "no paper used" in load_recipe("at_screws").experiment.description
    # A worker gets the experiment, not its name: it needs no folder.
    with using_folder(str(used)):
        dumped = load_recipe("mine_screws").experiment.model_dump(mode="json")
    os.environ.pop(VARIABLE)
    assert ExperimentConfig(**json.loads(json.dumps(dumped))).training.objective.beta == 3
    with pytest.raises(UserError, match=r"neither a method nor a setting|no method"):
        load_recipe("mine_screws")


def test_three_ways_to_name_the_folder(folder, capsys, monkeypatch, tmp_path):
    assert main(["show", "mine_screws", "--json"]) == 2
    assert main(["show", "mine_screws", "--json", "--recipes", str(folder)]) == 0
    assert VARIABLE not in os.environ, "the flag holds for its command alone"
    monkeypatch.setenv(VARIABLE, str(folder))
    assert main(["show", "mine_screws", "--json"]) == 0
    monkeypatch.delenv(VARIABLE)
    folder.rename(tmp_path / "recipes")
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert main(["show", "mine_screws", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["method"], shown["setting"], shown["origins"]["seed"]) == ("mine", "screws", "exception")
    assert main(["list", "settings", "--json"]) == 0
    assert "screws" in {entry["name"] for entry in json.loads(capsys.readouterr().out)}
    assert main(["list", "recipes"]) == 0
    assert "mine" in capsys.readouterr().out
    assert main(["list", "recipes", "--recipes", str(tmp_path / "nothing")]) == 2
    assert "nothing" in capsys.readouterr().err


def test_own_recipes_train_and_sweep(used, capsys, home):
    where = ["--home", str(home.root)]
    tiny = ["--data.limit_train", "64", "--training.batch_size", "32", "--training.attack.steps", "1", "--training.validation.steps", "1"]
    assert main(["train", "mine_screws", "--dry-run", "--json", *tiny, *where]) == 0
    capsys.readouterr()
    sweep = load_sweep("mine_screws", {"num_trials": 2})
    assert sweep.baselines == ("natural_screws", "at_screws")
    assert {sweep.baseline_experiment(name).data.image_size for name in sweep.baselines} == {8}
    mine = used / "my_sweep.yaml"
    mine.write_text("recipe: mine_screws\nnum_trials: 2\nspace: {training.objective.beta: {type: float, low: 1, high: 9}}\n")
    assert load_sweep(str(mine)).experiment({"training.objective.beta": 2.0}).training.objective.beta == 2


@pytest.mark.parametrize(
    ("kind", "name", "text", "parts"),
    [
        ("methods", "b", "- 1\n", ["b.yaml", "mapping"]),
        ("methods", "b", "defence: at\nsettings: [digitz]\n", ["b.yaml", "'digitz'", "'digits'"]),
        ("methods", "b", "defence: at\nsettings: digits\n", ["b.yaml", "settings", "list"]),
        ("methods", "b", "defence: at\nwhere: {digitz: {seed: 1}}\n", ["b.yaml", "where", "'digits'"]),
        ("methods", "b", "defence: at\nwhere: {digits: 3}\n", ["b.yaml", "where.digits", "mapping"]),
        ("methods", "b", "defence: at\nuses: {digits: digitz}\n", ["b.yaml", "uses", "'digits'"]),
        ("methods", "b", "defence: at\nvariants: {v: 1}\n", ["b.yaml", "variants.v"]),
        ("methods", "b", "defence: at\nvariants: {v: {without_exceptions: maybe}}\n", ["without_exceptions"]),
        ("methods", "b", "extends: b\n", ["b.yaml", "extends itself", "b -> b"]),
        ("methods", "b", "extends: 3\n", ["b.yaml", "extends", "text"]),
        ("methods", "b", "extends: tradez\n", ["b.yaml", "'tradez'", "'trades'"]),
        ("methods", "b", "description: [1]\ndefence: at\n", ["b.yaml", "description"]),
        ("methods", "b", "defence: at\ntraining: {epoch: 3}\n", ["method b", "'training.epoch'", "'epochs'"]),
        ("methods", "b", "defence: at\ntraining: {epochs: 1, epochs: 2}\n", ["b.yaml line 2", "'epochs'", "twice"]),
        ("methods", "b", "defence: at\ntraining: 3\n", ["method b", "training"]),
        ("methods", "b", "defence: {nme: at}\n", ["method b", "defence"]),
        ("methods", "b", "defence: [at]\n", ["method b", "defence"]),
        ("methods", "b", "defence: {name: 3}\n", ["b", "defence"]),
        ("methods", "b", "defence: at\nbackbone: {name: null}\n", ["method b", "backbone"]),
        ("methods", "b", "defence: at\ntraining: {objective: {name: null}}\n", ["method b", "objective"]),
        ("methods", "b", "defence: at\ntraining: {objective: 3}\n", ["method b", "objective"]),
        ("methods", "b", "defence: at\nsurprise: 1\n", ["method b", "'surprise'"]),
        ("methods", "b", "", ["b.yaml", "empty"]),
        ("settings", "c", "extends: d\n", ["c.yaml", "'d'"]),
    ],
)  # fmt: skip
def test_a_broken_part_is_one_message_that_names_its_file(used, kind, name, text, parts):
    (used / kind / f"{name}.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        load_recipe("b_digits" if kind == "methods" else "at_c")
    for part in parts:
        assert part in str(caught.value)
    assert load_recipe("mine_screws").experiment.name == "mine_screws", "what is broken does not break the rest"
    assert "mine_screws" in list_recipes()
    with pytest.raises(UserError, match=r"'ctrw_digits'"):
        load_recipe("ctrw_digit")


def test_files_that_cannot_be_used_are_said_where_recipes_are_listed(used, capsys):
    (used / "methods" / "My Method.yaml").write_text("defence: at\n")
    (used / "methods" / "ctrw.yaml").write_text("defence: at\n")
    (used / "settings" / "c.yaml").write_text("extends: [\n")
    (used / "methods" / "d.yaml").write_text("defence: at\nsettings: [c, digits]\n")
    assert main(["list", "recipes", "--json"]) == 0
    captured = capsys.readouterr()
    assert {"mine_screws", "at_digits"} <= {entry["name"] for entry in json.loads(captured.out)}
    for part in ("My Method.yaml: a name is small letters", "ctrw.yaml: 'ctrw' is shipped already", "c.yaml line 2: not valid YAML"):
        assert part in captured.err
    with pytest.raises(UserError, match=r"'ctrw' is shipped already"):
        load_recipe("ctrw_digits")
    assert main(["list", "methods"]) == main(["list", "settings"]) == 0


def test_files_that_extend_one_another(tmp_path, used):
    for name, text in {
        "a": "extends: b\n", "b": "extends: c.yaml\n", "c": "extends: a\n", "own": "extends: mine_screws_strong\ndescription: x\n",
        "list": "extends: [a]\n", "none": "extends: nothing\n", "setting": "extends: screws\ndefence: at\n",
    }.items():  # fmt: skip
        (tmp_path / f"{name}.yaml").write_text(text)
    with pytest.raises(UserError, match=r"a.yaml extends itself: a.yaml -> b.yaml -> c.yaml -> a.yaml"):
        load_recipe(str(tmp_path / "a.yaml"))
    loaded = load_recipe(str(tmp_path / "own.yaml"))
    assert (loaded.experiment.training.objective.beta, loaded.experiment.name, loaded.parts) == (9, "own", None)
    assert load_recipe(str(tmp_path / "setting.yaml")).experiment.data.image_size == 8
    for name in ("list", "none"):
        with pytest.raises(UserError, match="extends"):
            load_recipe(str(tmp_path / f"{name}.yaml"))
    for path in (tmp_path / "absent.yaml", f"{'x' * 5000}.yaml", "nu\0ll.yaml", str(tmp_path / "folder.yaml")):
        with pytest.raises(UserError, match="no recipe file"):
            load_recipe(str(path))


def test_a_name_is_split_at_the_longest_setting_and_two_ways_are_refused(used):
    for kind, name, text in (
        ("settings", "screws_big", "extends: screws\n"), ("methods", "mine_screws", "extends: at\n"),
        ("settings", "big_screws", "extends: screws\n"), ("methods", "mine_big", "extends: at\n"),
    ):  # fmt: skip
        (used / kind / f"{name}.yaml").write_text(text)
    assert split_name("at_screws_big").setting == "screws_big"
    assert split_name("mine_screws_digits").method == "mine_screws"
    assert split_name("mine_big_screws").setting == "big_screws"
    (used / "methods" / "mine.yaml").write_text(METHOD.replace("strong", "big"))
    assert split_name("mine_screws_big").setting == "screws_big", "not the setting screws with the variant big"
    (used / "settings" / "ab_cd.yaml").write_text("extends: screws\n")
    (used / "settings" / "cd_ef.yaml").write_text("extends: screws\n")
    (used / "methods" / "m.yaml").write_text("extends: at\nvariants: {ef: {seed: 1}}\n")
    (used / "methods" / "m_ab.yaml").write_text("extends: at\n")
    with pytest.raises(UserError, match=r"2 ways.*method m, setting ab_cd, variant ef.*method m_ab, setting cd_ef"):
        split_name("m_ab_cd_ef")


@pytest.mark.parametrize("seed", range(8))
def test_generated_names_of_own_parts_are_split_where_they_were_joined(seed, tmp_path):
    rng = random.Random(seed)

    def name():
        return "_".join(rng.choice(["a", "b", "net", "18", "mine"]) + rng.choice(["", "x", "7"]) for _ in range(rng.randrange(1, 4)))

    methods, settings = {name() for _ in range(4)}, {name() for _ in range(4)}
    for kind, names, text in (("methods", methods, "extends: at\n"), ("settings", settings, "extends: digits\n")):
        (tmp_path / kind).mkdir()
        for each in names:
            (tmp_path / kind / f"{each}.yaml").write_text(text)
    with using_folder(str(tmp_path)):
        for method, setting in product(methods, settings):
            joined = f"{method}_{setting}"
            ways = [
                (joined[: -len(each) - 1], each) for each in settings if joined.endswith(f"_{each}") and joined[: -len(each) - 1] in methods
            ]
            parts = split_name(joined)
            assert (parts.method, parts.setting) == max(ways, key=lambda way: len(way[1]))


FIELDS = [
    "training.epochs", "training.objective", "training.objective.name", "training.attack", "training", "defence", "defence.preset", "seed",
    "defence.lower_bound", "backbone", "backbone.name", "backbone.options", "data", "data.name", "threat_model.epsilon", "resources",
    "training.schedule.milestones", "tracking.tags", "training.epochs.x", "training..epochs", "", ".", "x", "name", "description",
    "data.folder", "training.optimizer", "training.optimizer.name", "training.validation", "training.validation.select",
]  # fmt: skip
VALUES = [
    None, True, -1, 0, 3, 1e308, float("inf"), float("nan"), 10**30, "", "x", "\0", "8/0", "1/255", [], [1], [[None]], {}, {"name": None},
    {"name": "at"}, {"name": ["x"]}, {"a": {"b": 1}}, "ctrw", "natural", {"select": "last"}, "../../evil", "x" * 3000,
]  # fmt: skip


@pytest.mark.parametrize("seed", range(12))
def test_any_configuration_is_an_experiment_or_one_error(seed, tmp_path):
    """Whatever a file or flags say: no other exception than a UserError, whose text is not a page long."""
    rng = random.Random(seed)
    for _ in range(40):
        tree: dict = {"extends": rng.choice(["digits", "ctrw_digits", "red_digits", "adp_digits"])}
        for field in rng.sample(FIELDS, rng.randrange(1, 4)):
            inner, *parts = tree, *field.split(".")
            for part in parts[:-1]:
                inner = inner.setdefault(part, {})
                if not isinstance(inner, dict):
                    break
            else:
                inner[parts[-1]] = rng.choice(VALUES)
        path = tmp_path / "generated.yaml"
        path.write_text(yaml.safe_dump(tree))
        flags = [
            f"--{rng.choice(FIELDS)}={yaml.safe_dump(rng.choice(VALUES), default_flow_style=True).strip()}" for _ in range(rng.randrange(3))
        ]
        found, message = "", ""
        try:
            found = load_recipe(str(path), flags).experiment.fingerprint
        except UserError as error:
            message = str(error)
        assert len(found) == 16 or 0 < len(message) < 4000, (tree, flags)


def test_flags_go_through_the_same_door():
    assert parse_overrides(["--a", "1:30", "--b=yes", "--c", "[1, x]"]) == {"a": "1:30", "b": "yes", "c": [1, "x"]}
    assert parse_overrides(["--a", "[1"]) == {"a": "[1"}, "what is no YAML is text"
    for flags in (["--seed", "010"], ["--data", "{name: x, name: y}"], ["--x" * 200, "1"], ["--", "1"]):
        with pytest.raises(UserError):
            parse_overrides(flags)
