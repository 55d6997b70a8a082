"""What a recipe's name means where several of its runs are there, and how a person finds out which runs there are."""

from __future__ import annotations

import json
import random

import pytest

from models.errors import UserError
from orchestration.cli import main
from orchestration.run_folder import RunFolder
from orchestration.trained_models.targets import resolve_target
from tests.orchestration.finished_runs import finish

KINDS = ("trial", "baseline", "repeat", "row")


def run_of(target, home):
    return resolve_target(target, home).folder.parent.name


def test_runs_to_choose_from_are_told_apart_by_what_they_changed(home):
    runs = {
        finish(home, "at_digits", "--training.epochs", "3", "--resources.cpus_per_worker", "1").fingerprint: "training.epochs=3",
        finish(home, "at_digits", "--seed", "5", "--training.attack.steps", "7").fingerprint: "training.attack.steps=7, seed=5",
    }
    with pytest.raises(UserError) as refused:
        resolve_target("at_digits", home)
    lines = str(refused.value).splitlines()[1:]
    assert {tuple(line.split(maxsplit=1)) for line in lines} == set(runs.items())


def test_readmes_sequence_a_sweep_then_a_run_with_one_field_changed(home, capsys):
    """After `make demo` (trials and baselines) the one run of `rayndom train ctrw_digits --training.epochs 20` is what the name means."""
    for bound in (0.1, 0.2, 0.4):
        finish(home, "ctrw_digits", "--training.epochs", "8", "--defence.upper_bound", str(1000 * bound), kind="trial")
    finish(home, "at_digits", "--training.epochs", "8", kind="baseline")
    with pytest.raises(UserError, match=r"not trained by itself.*rayndom train ctrw_digits") as refused:
        resolve_target("ctrw_digits", home)
    assert str(refused.value).count("defence.upper_bound=") == 3
    wanted = finish(home, "ctrw_digits", "--training.epochs", "20", kind="run")
    capsys.readouterr()
    assert run_of("ctrw_digits", home) == wanted.fingerprint
    assert "with training.epochs=20" in capsys.readouterr().out, "a run that is not the recipe's own is said"
    own = finish(home, "ctrw_digits", kind="trial")
    assert run_of("ctrw_digits", home) == own.fingerprint, "one with the recipe's own values is the recipe's, whoever trained it"


def test_a_name_means_what_was_trained_by_itself_in_any_mixture(home):
    """Generated homes: the recipe's own values first, then the only run of `train`, else a refusal that lists what there is."""
    generator = random.Random(0)
    for case in range(6):
        seeds = generator.sample(range(100 * case + 1, 100 * case + 90), generator.randint(1, 4))
        recipe = generator.choice(["at_digits", "natural_digits"])
        for path in (home.root / "runs").glob("*"):
            (path / "result.json").unlink(missing_ok=True)
        kinds = {}
        for seed in seeds:
            kind = generator.choice(["run", None, *KINDS])
            kinds[finish(home, recipe, "--seed", str(seed), kind=kind).fingerprint] = kind
            if kind == "trial" and generator.random() < 0.5:  # reused by `rayndom train` afterwards
                kinds[finish(home, recipe, "--seed", str(seed), kind="run").fingerprint] = "run"
        meant = [run for run, kind in kinds.items() if kind not in KINDS]
        if len(meant) == 1:
            assert run_of(recipe, home) == meant[0], kinds
            continue
        with pytest.raises(UserError) as refused:
            resolve_target(recipe, home)
        listed = {line.split()[0] for line in str(refused.value).splitlines()[1:]}
        assert listed == set(meant or kinds), kinds


def test_runs_are_listed_with_what_they_changed_how_far_they_are_and_their_t1(home, capsys):
    evaluated = finish(home, "at_digits", "--seed", "3", kind="run")
    trial = finish(home, "ctrw_digits", kind="trial")
    interrupted = finish(home, "natural_digits", "--training.epochs", "7")
    RunFolder(home.run(interrupted.fingerprint)).path.joinpath("result.json").unlink()
    RunFolder(home.run("feedfeedfeedfeed")).path.mkdir()
    config = home.run(evaluated.fingerprint) / "model" / "config.json"
    content = json.loads(config.read_text())
    headline = {"accuracy": 0.75, "low": 0.7, "high": 0.8}
    whole = {"suite": "quick", "finished": True, "marked": False, "rows": [], "verdicts": []}
    content["details"]["evaluation"] = whole | {"headline": headline | {"num_samples": 10, "num_draws": 1}}
    config.write_text(json.dumps(content))
    assert main(["list", "runs", "--home", str(home.root), "--json"]) == 0
    told = capsys.readouterr()
    assert "feedfeedfeedfeed" in told.err, "what cannot be read is named and skipped"
    rows = {row["run"]: row for row in json.loads(told.out)}
    assert set(rows) == {evaluated.fingerprint, trial.fingerprint, interrupted.fingerprint}
    assert rows[evaluated.fingerprint]["differs_from_its_recipe_in"] == {"seed": 3}
    assert rows[evaluated.fingerprint]["T1"] == {**headline, "suite": "quick"}
    assert rows[trial.fingerprint]["differs_from_its_recipe_in"] == {}
    assert (rows[trial.fingerprint]["trained_as"], rows[trial.fingerprint]["T1"]) == (["trial"], None)
    assert (rows[interrupted.fingerprint]["state"], rows[interrupted.fingerprint]["epochs"]) == ("interrupted", 0)
    assert main(["list", "runs", "--home", str(home.root)]) == 0
    shown = capsys.readouterr().out
    assert "seed=3" in shown and "75.0 %" in shown and "0/7 interrupted" in shown


def test_a_folder_of_a_recipes_name_is_said_where_it_is_made_and_where_it_is_taken(home, tmp_path, monkeypatch, capsys):
    experiment = finish(home, kind="run")
    monkeypatch.chdir(tmp_path)
    assert main(["export", experiment.fingerprint, "--to", "at_digits", "--home", str(home.root)]) == 0
    assert "at_digits is a recipe too" in capsys.readouterr().err
    assert resolve_target("at_digits", home).folder.name == "at_digits"
    assert "the folder's model is taken" in capsys.readouterr().err


def test_a_training_suggests_a_folder_that_no_recipe_is_hidden_by(home, tmp_path, monkeypatch, capsys):
    experiment = finish(home, kind="run")
    monkeypatch.chdir(tmp_path)
    assert main(["train", "at_digits", "--home", "home"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "rayndom export" in line)
    command = line.split("rayndom ", 1)[1].split()
    assert main(command) == 0
    assert run_of("at_digits", home) == experiment.fingerprint
    assert "folder" not in capsys.readouterr().err
