"""What an export takes for its own folder, and what it leaves alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from models import build_model
from models.errors import UserError
from models.weights import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE, save_pretrained
from orchestration.exporting.export import export_target
from orchestration.trained_models.targets import Target


@pytest.fixture
def target(tmp_path: Path) -> Target:
    return Target(save_pretrained(build_model("at", backbone="resnet8", image_shape=(1, 8, 8)), tmp_path / "run"), None)


def test_an_export_that_was_killed_before_its_end_is_made_again(target: Target, tmp_path: Path) -> None:
    destination = tmp_path / "export"
    destination.mkdir()
    (destination / WEIGHTS_FILE).write_bytes(b"the first file of three")
    (destination / f".{CONFIG_FILE}.0123456789abcdef.part").write_bytes(b"{")
    export_target(target, destination)
    assert sorted(path.name for path in destination.iterdir()) == sorted([CARD_FILE, CONFIG_FILE, WEIGHTS_FILE])
    assert (destination / WEIGHTS_FILE).read_bytes() == (target.folder / WEIGHTS_FILE).read_bytes()


@pytest.mark.parametrize("name", [CARD_FILE, "thesis.tex"])
def test_a_folder_that_holds_something_else_is_left_alone(target: Target, tmp_path: Path, name: str) -> None:
    destination = tmp_path / "mine"
    destination.mkdir()
    (destination / name).write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        export_target(target, destination)
    assert [path.name for path in destination.iterdir()] == [name] and (destination / name).read_text() == "mine"
