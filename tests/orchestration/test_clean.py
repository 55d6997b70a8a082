"""`rayndom clean`: what it says it frees is what goes, and what a home can do afterwards is what it could before."""

from __future__ import annotations

import json

import pytest

from orchestration.cleaning import LEFTOVERS, OWN_FILES, STATES, removable
from orchestration.cli import main
from orchestration.home import Home, Workplace
from orchestration.recipes import load_recipe
from orchestration.run_folder import RunFolder
from orchestration.training.job import TrainingJob
from orchestration.training.training_run import train_here
from trainers.checkpoint import STATE_FILE

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
    assert {kind: len(items) for kind, items in said["items"].items()} == {STATES: 1, OWN_FILES: 3, LEFTOVERS: 1}
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
