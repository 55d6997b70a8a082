"""Tables and figures of the papers as sweeps: their trials are the trainings of the rows, or one sentence says why not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from analysis.reproduction.papers import get_item, list_items
from models.errors import UserError
from orchestration.cli import main
from orchestration.recipes import load_recipe
from orchestration.sweeping.config import sweep_key
from orchestration.sweeping.item_grid import item_tree
from orchestration.sweeping.loading import check_sweep, load_sweep
from orchestration.sweeping.study import num_wanted, planned_points

# Keys of the sweep files that restated these items: what was begun with a file goes on with the item.
EARLIER_KEYS = {
    "ctrw.fig3b": "ctrw_fig3b-c51fea97",
    "ctrw.fig3d": "ctrw_fig3d-5ff8a399",
    "dcs.fig7": "dcs_fig7-606ac765",
    "dcs.table4": "dcs_table4-e407b464",
    "dcs.table9": "dcs_table9-c8ecc568",
    "rat.table1": "rat_table1-8b02f3c8",
}
EARLIER_NAMES = [*(name.replace(".", "_") for name in EARLIER_KEYS), "dcs_fig6", "dcs_table5", "rna_table4", "rna_table5"]


def grids():
    """Return name -> sweep of the items that have a grid, and name -> reason of those that have none."""
    found, refused = {}, {}
    for name in list_items():
        try:
            found[name] = check_sweep(*item_tree(name))
        except UserError as error:
            refused[name] = str(error)
    return found, refused


def fingerprint(run):
    return load_recipe(run.recipe, [f"--{override}" for override in run.overrides]).experiment.fingerprint


def test_the_trials_of_an_item_are_its_rows_and_what_is_left_out_is_said():
    found, refused = grids()
    assert set(EARLIER_KEYS) <= set(found)
    for name, config in found.items():
        item = get_item(name)
        runs = [(row, row.run_for(column)) for row in item.rows for column in item.columns]
        own = {fingerprint(run) for row, run in runs if run is not None and run.recipe == config.recipe and not row.extra}
        trials = [config.experiment(point).fingerprint for point in planned_points(config)]
        assert set(trials) == own, name
        assert len(trials) == num_wanted(config) == len(own), name
        baselines = {load_recipe(recipe).experiment.fingerprint for recipe in config.baselines}
        rest = {row.key for row, run in runs if run is not None and fingerprint(run) not in own | baselines}
        said = " ".join(config.remarks)
        assert bool(rest) == bool(said), name
        for key in rest:
            assert key in said
    for name, reason in refused.items():
        assert name in reason
        assert "\n" not in reason
        assert "no grid" in reason


def test_sweeps_that_were_files_go_on_as_items():
    assert {name: sweep_key(check_sweep(*item_tree(name))) for name in EARLIER_KEYS} == EARLIER_KEYS


@pytest.mark.parametrize("name", [*EARLIER_NAMES, "dcs.table4"])
def test_an_earlier_name_answers_with_the_command(name):
    with pytest.raises(UserError, match=r"`rayndom sweep --item (ctrw|dcs|rat|rna)\.") as caught:
        load_sweep(name)
    command = str(caught.value).partition("`")[2].partition("`")[0].split()
    assert check_sweep(*item_tree(command[-1])).space


def test_fields_of_the_sweep_change_an_items_grid_into_a_search():
    config = check_sweep(*item_tree("dcs.table4"), {"sampler": "tpe", "num_trials": 3, "settings.training.epochs": 5})
    assert num_wanted(config) == 3
    assert {config.experiment(point).training.epochs for point in planned_points(config) or [{}]} == {5}


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["sweep", "--item", "dcs.tabel4"], "'dcs.table4'"),
        (["sweep", "--item", "dcs.table8"], "no grid"),
        (["sweep", "--item", "joint"], "'joint'"),
        (["sweep", "--item"], "reproduce --list"),
        (["sweep"], "list sweeps"),
        (["submit", "--item", "dcs.table8"], "no grid"),
    ],
)
def test_mistakes_with_items(arguments, part, capsys):
    assert main(arguments) == 2
    assert part in capsys.readouterr().err


def test_an_item_with_fields_is_dry_run(capsys, home):
    """Fields behind `--item` are not taken for its name."""
    fields = {"settings.data.name": "digits", "settings.data.augmentation": "none", "settings.data.limit_train": 96}
    fields |= {"settings.backbone.name": "resnet8", "settings.training.batch_size": 32, "settings.resources.gpus_per_worker": 0}
    fields |= {"settings.training.validation.num_examples": 32, "settings.training.attack.steps": 1}
    flags = [part for name, value in fields.items() for part in (f"--{name}", str(value))]
    assert main(["sweep", "--item", "dcs.table5", "--dry-run", "--json", *flags, "--home", str(home.root)]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["trials"] == 4
    assert "num_taps" in captured.err


def test_an_item_is_submitted_with_the_users_methods(monkeypatch, tmp_path):
    sent = {}

    class Client:
        def __init__(self, address):
            pass

        def submit_job(self, *, entrypoint, runtime_env, metadata):
            folder = Path(runtime_env["working_dir"])
            sent.update(
                command=entrypoint, files=sorted(str(path.relative_to(folder)) for path in folder.rglob("*.yaml")), metadata=metadata
            )
            return "job"

    monkeypatch.setattr("orchestration.sweeping.jobs.JobSubmissionClient", Client)
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods" / "mine.yaml").write_text("extends: trades\ndescription: mine\n")
    assert main(["submit", "--item", "dcs.table4", "--num_trials", "3", "--recipes", str(tmp_path)]) == 0
    assert sent["command"] == "rayndom sweep dcs.table4 --num_trials 3 --item"
    assert sent["files"] == ["recipes/methods/mine.yaml"]
    assert sent["metadata"] == {"rayndom.sweep": "dcs_table4"}
