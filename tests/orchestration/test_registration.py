"""What is registered stays what it is: each version has its own files and the run that it came from; nothing takes another's place."""

from __future__ import annotations

import itertools
import random
import shutil
from pathlib import Path

import pytest

from models.weights import WEIGHTS_FILE
from orchestration.cli import main
from orchestration.tracking.model_format import MODEL_FOLDER
from orchestration.tracking.tracker import Tracker
from orchestration.trained_models.targets import resolve_target
from tests.orchestration.finished_runs import finish


def weights_of(folder):
    return (Path(folder) / WEIGHTS_FILE).read_bytes()


def export(home, target, to, *more):
    return main(["export", str(target), "--to", str(to), "--home", str(home.root), *more])


def test_versions_keep_their_models_in_whatever_order_folders_are_used_again(home, tmp_path):
    """Three models go through two folders and two names in a random order; then every version has the model it was made of."""
    experiments = [finish(home, "at_digits", "--seed", str(seed), kind="run", weights_seed=seed) for seed in (1, 2, 3)]
    folders = [tmp_path / "one", tmp_path / "two"]
    generator = random.Random(0)
    expected, counts, at, versions = {}, {"ctrw": 0, "at": 0}, {}, {}
    for experiment in generator.choices(experiments, k=8):
        folder, name, alias = generator.choice(folders), generator.choice(list(counts)), generator.choice(["a", "b"])
        source = weights_of(home.run(experiment.fingerprint) / "model")
        force = ["--force"] if folder.exists() and weights_of(folder) != source else []
        if force:
            assert export(home, experiment.fingerprint, folder, "--register", f"{name}@{alias}") == 2
        assert export(home, experiment.fingerprint, folder, "--register", f"{name}@{alias}", *force) == 0
        if (name, experiment.fingerprint) not in versions:  # the same model again is the same version
            versions[name, experiment.fingerprint] = counts[name] = counts[name] + 1
        number = versions[name, experiment.fingerprint]
        expected[f"models:/{name}/{number}"] = expected[f"models:/{name}@{alias}"] = (experiment, source)
        at[name, number] = experiment
    for target, (_, source) in expected.items():
        assert weights_of(resolve_target(target, home).folder) == source, target
    tracker = Tracker(home, "rayndom")
    for (name, number), experiment in at.items():
        version = tracker.client.get_model_version(name, str(number))
        assert version.run_id == tracker.find_run(experiment.fingerprint), "tied to the run that trained it"


def test_a_recipes_name_registers_under_its_own_run_and_a_folder_under_the_run_it_came_from(home, tmp_path):
    experiment = finish(home, kind="run")
    tracker = Tracker(home, "rayndom")
    trained = tracker.find_run(experiment.fingerprint)
    assert export(home, "at_digits", tmp_path / "one", "--register", "at@x") == 0
    assert export(home, tmp_path / "one", tmp_path / "two", "--register", "at@y") == 0
    for alias in ("x", "y"):
        assert tracker.client.get_model_version_by_alias("at", alias).run_id == trained


def test_an_export_of_an_earlier_training_is_not_taken_for_the_one_that_replaced_it(home, tmp_path):
    experiment = finish(home, kind="run", weights_seed=1)
    assert export(home, experiment.fingerprint, tmp_path / "earlier") == 0
    finish(home, weights_seed=2)  # the same configuration started anew
    tracker = Tracker(home, "rayndom")
    tracker.replace("run", {"rayndom.fingerprint": experiment.fingerprint})
    finish(home, kind="run", weights_seed=2)
    assert export(home, tmp_path / "earlier", tmp_path / "other", "--register", "at@old") == 0
    version = tracker.client.get_model_version("at", "1")
    assert version.run_id != tracker.find_run(experiment.fingerprint)
    assert weights_of(resolve_target("models:/at@old", home).folder) == weights_of(tmp_path / "earlier")


@pytest.mark.parametrize("name", ["champ@v1", "champ@V12", "champ@latest", "champ@LATEST", "a b", "a@b@c", "@x", "a/b", "a'b", "a\nb", ""])
def test_a_name_that_cannot_be_registered_is_refused_before_anything_is_made(tmp_path, name, capsys, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    home, to = tmp_path / "home", tmp_path / "to"
    code = main(["export", "at_digits", "--to", str(to), f"--register={name}", "--home", str(home)])
    assert code == 2
    assert "--register" in capsys.readouterr().err
    assert not home.exists() and not to.exists()


def test_an_alias_whose_artifacts_are_gone_is_one_sentence_and_no_earlier_model(home, tmp_path, capsys):
    first, second = (finish(home, "at_digits", "--seed", str(seed), kind="run", weights_seed=seed) for seed in (1, 2))
    assert export(home, first.fingerprint, tmp_path / "one", "--register", "m@best") == 0
    fetched = resolve_target("models:/m@best", home).folder
    assert weights_of(fetched) == weights_of(home.run(first.fingerprint) / "model")
    assert export(home, second.fingerprint, tmp_path / "two", "--register", "m@best") == 0
    client = Tracker(home, "rayndom").client
    gone = Path(client.get_model_version("m", "2").source.removeprefix("file://")) / MODEL_FOLDER
    for what in itertools.chain([gone / WEIGHTS_FILE], [gone]):
        what.unlink() if what.is_file() else shutil.rmtree(what)
        capsys.readouterr()
        assert export(home, "models:/m@best", tmp_path / "three") == 2
        told = capsys.readouterr().err
        assert "models:/m@best" in told and told.count("error:") == 1 and len(told.strip().splitlines()) == 1, told
    assert not (tmp_path / "three").exists()
    assert weights_of(resolve_target("models:/m/1", home).folder) == weights_of(fetched)


def test_nothing_is_left_in_downloads_but_whole_models(home, tmp_path):
    finish(home, kind="run")
    assert export(home, "at_digits", tmp_path / "one", "--register", "m@x") == 0
    (home.root / "downloads" / ".part").mkdir(parents=True)
    (home.root / "downloads" / ".part" / "half").write_bytes(b"of a killed process")
    folders = {resolve_target(target, home).folder for target in ("models:/m@x", "models:/m@x", "models:/m/1")}
    assert {path for path in (home.root / "downloads").iterdir() if path.is_dir()} == folders
    assert len(folders) == 2
