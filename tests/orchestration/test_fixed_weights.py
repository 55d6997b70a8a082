"""All trials of a sweep begin with the same weights, however they are named and whatever happens to the name meanwhile."""

from __future__ import annotations

import json
import shutil

import pytest
from mlflow.tracking import MlflowClient

from models.errors import UserError
from orchestration.cli import main
from orchestration.home import Workplace
from orchestration.run_folder import RunFolder
from orchestration.sweeping.config import SWEEP_FILE, sweep_key
from orchestration.sweeping.loading import load_sweep
from orchestration.sweeping.plan import plan_sweep
from orchestration.sweeping.sweep import run_sweep
from orchestration.training.job import TrainingJob
from tests.orchestration.finished_runs import finish

FIELD = "training.initial_weights"


@pytest.fixture
def two(home):
    """Two trained models; the alias `best` means the first of them."""
    runs = [finish(home, "at_digits", "--seed", str(seed), kind="run", weights_seed=seed) for seed in (1, 2)]
    models = [RunFolder(home.run(run.fingerprint)).model for run in runs]
    export(home, models[0], "--register", "at@best")
    return models


def export(home, model, *flags):
    assert main(["export", str(model), "--to", str(home.root / "exports" / model.parent.name), *flags, "--home", str(home.root)]) == 0


def a_sweep(folder, place, weights, **fields):
    """A sweep that names weights in one place; its points are two of its trials."""
    tree = {"recipe": "at_digits", "space": {"training.attack.steps": {"type": "int", "low": 2, "high": 9}}, "num_trials": 2} | fields
    if place == "settings":
        tree["settings"] = {FIELD: weights}
    elif place == "a choice":
        tree["space"] |= {FIELD: {"type": "choice", "choices": [weights]}}
    elif place == "a section":
        tree["settings"] = {"training": {"initial_weights": weights, "epochs": 2}}
    path = folder / f"{tree.pop('name', 'tiny')}.yaml"
    path.write_text(json.dumps(tree))
    return load_sweep(str(path))


def planned(config, home):
    return plan_sweep(config, home.sweep(sweep_key(config)), home)


def starts_of(plan, home, place):
    """What the two trials begin with, as the process of each of them finds it, and the file's SHA-256."""
    found = []
    for steps in (2, 9):
        chosen = {FIELD: next(iter(plan.config.fixed_weights))} if place == "a choice" else {}
        experiment = plan.config.experiment({"training.attack.steps": steps} | chosen)
        job = TrainingJob.at(Workplace(home), experiment, initial=plan.initial(experiment))
        found.append((experiment.training.initial_weights, job.initial.sha256))
    return found


def begin(config, home):
    """Plan the sweep and leave what a start leaves, without training."""
    plan = planned(config, home)
    plan.folder.mkdir(parents=True)
    (plan.folder / SWEEP_FILE).write_text(json.dumps(plan.config.model_dump(mode="json")))
    return plan


def test_an_alias_means_the_version_of_the_beginning_whatever_it_means_later(home, two, tmp_path):
    places = ("settings", "a choice", "a section")
    configs = {place: a_sweep(tmp_path, place, "models:/at@best", name=place, baselines=["natural_digits"]) for place in places}
    plans = {place: begin(config, home) for place, config in configs.items()}
    before = {place: starts_of(plans[place], home, place) for place in places}
    assert len({start for starts in before.values() for start in starts}) == 1 and before["settings"][0][0] == "models:/at/1"
    export(home, two[1], "--register", "at@best")
    for place, config in configs.items():
        assert sweep_key(plans[place].config) == sweep_key(config), "the same command goes on with it"
        assert starts_of(plans[place], home, place) == before[place], "amid the sweep"
        again = planned(config, home)
        assert starts_of(again, home, place) == before[place], "and when it goes on"
        assert again.listed_baselines() == plans[place].listed_baselines(), "beside them the same"
    assert [each.initial.sha256 for each in plans["settings"].listed_baselines()] == [before["settings"][0][1]]
    fresh = planned(a_sweep(tmp_path, "settings", "models:/at@best", name="other"), home)
    assert [each.name for each in fresh.config.fixed_weights.values()] == ["models:/at/2"], "another sweep begins with what it means now"
    MlflowClient(tracking_uri=home.tracking_uri).delete_registered_model_alias("at", "best")
    assert starts_of(planned(configs["settings"], home), home, "settings") == before["settings"], "it is asked for no more"


def test_a_name_that_came_to_mean_other_weights_is_refused(home, two, tmp_path):
    first, second = two
    copies = {kind: tmp_path / kind for kind in ("file", "folder", "fingerprint")}
    copies["fingerprint"] = first
    for kind in ("file", "folder"):
        shutil.copytree(first, copies[kind])
    names = {
        "file": str(copies["file"] / "model.safetensors"),
        "folder": str(copies["folder"]),
        "fingerprint": first.parent.name,
        "version": "models:/at/1",
    }
    configs = {kind: a_sweep(tmp_path, "settings", name, name=kind) for kind, name in names.items()}
    before = {}
    for kind, config in configs.items():
        before[kind] = starts_of(begin(config, home), home, "settings")
        assert starts_of(planned(config, home), home, "settings") == before[kind]
        assert before[kind][0][0] == names[kind], "names that last stay as they are"
    for folder in copies.values():
        shutil.copytree(second, folder, dirs_exist_ok=True)
    text = (first / "config.json").read_text()
    (first / "config.json").write_text(text.replace(second.parent.name, first.parent.name))  # a model says whose it is
    for kind in copies:
        with pytest.raises(UserError, match="is not what the sweep has begun with"):
            planned(configs[kind], home)
    assert starts_of(planned(configs["version"], home), home, "settings") == before["version"]


def test_a_sweep_that_an_earlier_version_began_keeps_its_names(home, tmp_path):
    finish(home, "at_digits", "--seed", "1")
    export(home, next(home.root.glob("runs/*/model")), "--register", "at@best")
    config = a_sweep(tmp_path, "settings", "models:/at@best")
    begin(config, home)
    path = home.sweep(sweep_key(config)) / SWEEP_FILE
    content = json.loads(path.read_text())
    del content["fixed_weights"]
    path.write_text(json.dumps(content))
    again = planned(config, home)
    assert again.config == config and list(again.weights) == ["models:/at@best"], "its trials are found by fingerprints with them"


@pytest.mark.slow
def test_a_sweep_that_goes_on_after_its_alias_moved_begins_where_it_began(home, two, tmp_path, ray_cluster):
    settings = {"data.image_size": 8, "data.limit_train": 64, "data.validation_size": 32, "data.limit_test": 40, "training.epochs": 1}
    settings |= {"training.batch_size": 32, "training.validation.steps": 2, FIELD: "models:/at@best"}
    for trials in (1, 2):
        config = a_sweep(tmp_path, None, None, settings=settings, num_trials=trials)
        summary = run_sweep(config, Workplace(home), evaluate=False)
        export(home, two[1], "--register", "at@best")
    reports = [json.loads(path.read_text()) for path in home.root.glob("runs/*/initial_weights.json")]
    assert summary["trials"] == 2
    assert [report["source"] for report in reports] == ["models:/at/1"] * 2 and len({report["sha256"] for report in reports}) == 1
