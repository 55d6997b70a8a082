"""A broken file among defences, objectives, attacks and the like is in nobody's way, and is named to whoever may have meant it."""

from __future__ import annotations

import importlib
import sys

import pytest

import analysis.attacks.registry
import analysis.quantities.quantity
import models.backbones
import models.registry
import orchestration.catalogue
import trainers.objective
from models.errors import UserError
from models.registry_files import broken_files
from tests.fuzz.command_line import complaint, rayndom

CACHED = (
    analysis.attacks.registry.attacks,
    analysis.quantities.quantity.quantities,
    models.backbones.backbone_entries,
    models.registry.defence_models,
    orchestration.catalogue.catalogue,
    trainers.objective.objectives,
)
SCANNED = {
    "models.defences": ("DEFENCE_MODELS", None),
    "models.backbones": ("BACKBONES", ["show", "at_digits", "--backbone=mine"]),
    "orchestration.defences": ("DEFENCES", None),
    "trainers.objectives": ("OBJECTIVES", ["show", "at_digits", "--training.objective=mine"]),
    "analysis.attacks": ("ATTACKS", None),
    "analysis.quantities": ("QUANTITIES", None),
}
CONTENTS = [
    "def broken(:\n",
    "import nowhere_at_all\n",
    "NAME = (Missing,)\n",
    "NAME = 5\n",
    "NAME = ('text',)\n",
    "raise SystemExit\n",
    "\0",
]


@pytest.fixture
def extra(tmp_path, monkeypatch):
    """A function that puts a file into a scanned package."""
    added = []

    def put(package: str, content: str) -> None:
        module = importlib.import_module(package)
        monkeypatch.setattr(module, "__path__", [*module.__path__, str(tmp_path)])
        (tmp_path / "zz_mine.py").write_text(content)
        added.append(f"{package}.zz_mine")

    for each in CACHED:
        each.cache_clear()
    yield put
    for each in CACHED:
        each.cache_clear()
    for name in added:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("package", SCANNED)
def test_a_broken_file(extra, package, content):
    tuple_name, asking = SCANNED[package]
    extra(package, content.replace("NAME", tuple_name))
    for words in (["show", "ctrw_digits"], ["list", "defences"], ["list", "recipes"], ["analyse", "--what", "list"]):
        outcome = rayndom(words, patience_s=60)
        assert outcome.code == 0, (words, outcome.said)
    if asking is not None:
        assert complaint(rayndom(asking), ["zz_mine.py"], refused=True) is None
    if package == "models.defences":
        with pytest.raises(UserError, match=r"zz_mine\.py"):
            models.registry.defence_model("mine")
    if package == "analysis.attacks":
        analysis.attacks.registry.attacks()
    assert any("zz_mine.py" in sentence for sentence in broken_files(package))


def test_no_file_of_this_project_is_broken():
    for each in CACHED:
        each.cache_clear()
        each()
    mine = [sentence for package in SCANNED for sentence in broken_files(package) if "zz_mine" not in sentence]
    assert not mine
