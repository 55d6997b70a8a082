"""Weights that runs keep on the way, and `rayndom clean`: what it says it frees is what goes, and what a home can do afterwards is what it
could before."""

from __future__ import annotations

import json

import pytest

from models.weights import load_pretrained
from orchestration.cleaning import CHECKPOINTS, LEFTOVERS, OWN_FILES, STATES, removable
from orchestration.cli import main
from orchestration.home import Home, Workplace
from orchestration.recipes import load_recipe
from orchestration.run_folder import RunFolder
from orchestration.trained_models.targets import resolve_target
from orchestration.training.job import TrainingJob
from orchestration.training.training_run import train_here
from trainers.checkpoint import STATE_FILE, read_state

TINY = [
    "--data.limit_train", "64", "--data.validation_size", "16", "--data.limit_test", "16", "--data.image_size", "8",
    "--training.epochs", "2", "--training.batch_size", "16", "--training.attack.steps", "1", "--training.validation.steps", "1",
]  # fmt: skip


class Stop(BaseException):
    """Ends a training."""


@pytest.fixture
def home(tmp_path):
    """One finished run, one that was interrupted, files of Tune's, a leftover of a killed process."""
    home = Home.locate(tmp_path / "home")
    train_here(TrainingJob.at(Workplace(home), load_recipe("at_digits", TINY).experiment))

    def interrupt(report):
        raise Stop

    with pytest.raises(Stop):
        train_here(TrainingJob.at(Workplace(home), load_recipe("natural_digits", TINY).experiment), on_epoch=interrupt)
    for name in ("sweeps/s-1/tune/start-1/x.json", "sweeps/s-1/train/y", "tune/z", "exports/e/.config.json.1.part"):
        path = home.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x" * 100)
    return home


def files_of(home):
    return {path.relative_to(home.root).as_posix() for path in home.root.rglob("*") if path.is_file()}


def test_it_says_what_would_go_and_only_then_does_it(home, capsys):
    before = files_of(home)
    assert main(["clean", "--home", str(home.root), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert files_of(home) == before
    assert said["removed_bytes"] == 0
    assert {each["what"]: len(each["paths"]) for each in said["items"]} == {STATES: 1, OWN_FILES: 3, LEFTOVERS: 1}
    assert main(["clean", "--home", str(home.root), "--yes", "--json"]) == 0
    done = json.loads(capsys.readouterr().out)
    assert done["removed_bytes"] == said["bytes"] > 400
    finished = RunFolder(home.run(load_recipe("at_digits", TINY).experiment.fingerprint))
    gone = before - files_of(home)
    assert gone == {
        f"runs/{finished.path.name}/{STATE_FILE}", "sweeps/s-1/tune/start-1/x.json", "sweeps/s-1/train/y", "tune/z",
        "exports/e/.config.json.1.part",
    }  # fmt: skip
    assert main(["clean", "--home", str(home.root), "--yes"]) == 0
    assert "nothing in" in capsys.readouterr().out


def test_what_is_left_is_reused_and_resumed_as_before(home):
    assert main(["clean", "--home", str(home.root), "--yes"]) == 0
    finished = train_here(TrainingJob.at(Workplace(home), load_recipe("at_digits", TINY).experiment))
    assert finished.reused
    epochs = []
    train_here(TrainingJob.at(Workplace(home), load_recipe("natural_digits", TINY).experiment), on_epoch=lambda r: epochs.append(r.epoch))
    assert epochs == [1, 2]


def test_states_stay_on_request_and_where_a_process_trains(home):
    assert STATES not in removable(home, keep_last=True)
    finished = RunFolder(home.run(load_recipe("at_digits", TINY).experiment.fingerprint))
    with finished.locked():
        assert STATES not in removable(home, keep_last=False)
    (home.root / "sweeps/s-1/lock").touch()
    from orchestration.single_process import only_process

    with only_process(home.root / "sweeps/s-1/lock", "the sweep s"):
        assert set(removable(home, keep_last=False)) == {STATES}


@pytest.mark.parametrize("averaging", ["none", "ema"])
def test_weights_of_every_second_epoch_stay_as_models_through_an_interruption(tmp_path, averaging):
    flags = [*TINY, "--training.epochs", "5", "--training.averaging.name", averaging]
    plain, keeping = (load_recipe("natural_digits", [*flags, *more]).experiment for more in ([], ["--checkpoints.every", "2"]))
    assert plain.fingerprint == keeping.fingerprint
    home = Home.locate(tmp_path / "home")
    folder, weights = RunFolder(home.run(keeping.fingerprint)), {}

    def interrupt(report):
        weights[report.epoch] = read_state(folder.path)["weights"]
        if report.epoch == 3 and not folder.checkpoint(4).exists():
            raise Stop

    with pytest.raises(Stop):
        train_here(TrainingJob.at(Workplace(home), keeping), on_epoch=interrupt)
    first = (folder.checkpoint(2) / "model.safetensors").read_bytes()
    train_here(TrainingJob.at(Workplace(home), keeping), on_epoch=lambda r: weights.update({r.epoch: read_state(folder.path)["weights"]}))
    assert list(folder.checkpoints()) == [2, 4]
    assert (folder.checkpoint(2) / "model.safetensors").read_bytes() == first, "what was kept is not written again"
    target = resolve_target(str(folder.checkpoint(4)), home)
    assert target.experiment == keeping
    kept = load_pretrained(target.folder, resample_on_forward=False).state_dict()
    assert kept.keys() == weights[4].keys() and all(bool((kept[name] == weights[4][name]).all()) for name in kept)
    card = (folder.checkpoint(4) / "README.md").read_text()
    assert "those of epoch 4, kept on the way" in card and "the average" not in card
    assert "selected on validation images" in (folder.model / "README.md").read_text()


def test_weights_kept_on_the_way_go_only_when_that_is_asked_for(tmp_path, capsys):
    home = Home.locate(tmp_path / "home")
    keeping = load_recipe("natural_digits", [*TINY, "--training.epochs", "4", "--checkpoints.every", "1"]).experiment
    train_here(TrainingJob.at(Workplace(home), keeping))
    folder = RunFolder(home.run(keeping.fingerprint))
    assert CHECKPOINTS not in removable(home, keep_last=False)
    assert main(["clean", "--home", str(home.root), "--yes"]) == 0
    assert "kept on the way" in capsys.readouterr().out and list(folder.checkpoints()) == [1, 2, 3, 4]
    with folder.locked():
        assert CHECKPOINTS not in removable(home, keep_last=False, keep_every=0)
    said = removable(home, keep_last=False, keep_every=2)[CHECKPOINTS]
    assert [each.path for each in said] == [folder.checkpoint(1), folder.checkpoint(3)]
    assert main(["clean", "--home", str(home.root), "--keep-every", "2", "--yes", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["removed_bytes"] == sum(each.size for each in said) > 0
    assert list(folder.checkpoints()) == [2, 4]
    assert main(["clean", "--home", str(home.root), "--keep-every", "0", "--yes"]) == 0
    assert folder.checkpoints() == {} and folder.result() is not None
