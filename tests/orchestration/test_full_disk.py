"""A disk that is full: the message says so, the exit code is 3, what was finished stays, the same command goes on."""

from __future__ import annotations

import random
import shutil

import pytest

from orchestration.cli import main
from orchestration.home import Home
from orchestration.run_folder import RunFolder
from tests.orchestration.earlier_homes.contents import TINY
from tests.orchestration.places import fill, small_disk
from tests.orchestration.sweep_process import runs_of
from tests.orchestration.test_single_process import tiny

FIELDS = [word for name, value in TINY.items() for word in (f"--{name}", value)]
FULL = ("No space left on device", "disk is full")


def words(home, epochs=2):
    return ["train", "at_digits", *FIELDS, "--training.epochs", str(epochs), "--home", str(home.root)]


@pytest.mark.timeout(600)
def test_a_training_on_a_disk_of_any_room_ends_with_the_reason_and_goes_on(tmp_path, migrated_store, capsys, monkeypatch):
    """Rooms from nothing to almost enough; a store that cannot be written is not waited for so long here."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(
        "orchestration.tracking.background_writer.BackgroundWriter.__init__.__kwdefaults__",
        {"retry_s": 0.1, "patience_s": 0.5},
        raising=False,
    )
    generator = random.Random(0)
    refused = 0
    for case, room in enumerate([0, *(generator.randrange(4096, 400_000) for _ in range(3))]):
        with small_disk(tmp_path / f"disk{case}", 16) as disk:
            home = Home.locate(disk / "home")
            shutil.copy(migrated_store, home.root / "mlflow.db")
            filler = fill(disk, leave=room)
            code = main(words(home))
            told = capsys.readouterr()
            if code:
                refused += 1
                assert code == 3, (room, told.err)
                assert any(reason in told.err for reason in FULL), (room, told.err)
                assert "Traceback" not in told.err and "[SQL" not in told.err
            kept = RunFolder(home.run(tiny(2).fingerprint)).history()
            filler.unlink()
            assert main(words(home)) == 0, capsys.readouterr().err
            assert RunFolder(home.run(tiny(2).fingerprint)).history()[: len(kept)] == kept
            (run,) = runs_of(home, "run")
            assert run.info.status == "FINISHED"
    assert refused >= 2
