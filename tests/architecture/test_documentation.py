"""The documentation says what is there: links lead somewhere, commands exist with their flags, generated parts are current."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from models.errors import UserError
from orchestration.cli import build_parser
from orchestration.commands import COMMANDS
from orchestration.recipes.names import is_recipe
from orchestration.sweeping.named import list_sweeps
from tests.architecture.documented_parameters import PAGES, documented_parameters, page_path, parts
from tests.architecture.source import ROOT

DOCS = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")])
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
COMMAND = re.compile(r"^(?:\$ )?(rayndom (?:[a-z]+)(?: .*)?)$", re.MULTILINE)
BLOCK = re.compile(r"^```[a-z]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
NAMES_OF_RECIPES = ("train", "show")


def identified(path: Path) -> str:
    return str(path.relative_to(ROOT))


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and the site make them."""
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", DOCS, ids=identified)
def test_links_lead_somewhere(page: Path) -> None:
    wrong = []
    for target in LINK.findall(BLOCK.sub("", page.read_text(encoding="utf-8"))):
        if target.startswith(("http:", "https:", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        leaves_the_site = page.is_relative_to(ROOT / "docs") and not file.is_relative_to(ROOT / "docs")
        if leaves_the_site or not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            wrong.append(target)
    assert wrong == []


def commands(page: Path) -> list[str]:
    """Return the `rayndom` lines of a page's code blocks, without remarks."""
    found = [line for block in BLOCK.findall(page.read_text(encoding="utf-8")) for line in COMMAND.findall(block)]
    return [shlex.join(shlex.split(line, comments=True)) for line in found if "..." not in line and "'" not in line]


WRITTEN = [
    pytest.param(line, id=f"{identified(page)}: {line[:60]}") for page in DOCS if page.name != "CHANGELOG.md" for line in commands(page)
]


@pytest.mark.parametrize("line", WRITTEN)
def test_commands_exist_with_their_flags(line: str) -> None:
    words = shlex.split(line)[1:]
    try:
        arguments, fields = build_parser().parse_known_args(words)
    except UserError as error:
        raise AssertionError(f"{line}: {error}") from None
    assert arguments.command in {command.name for command in COMMANDS}
    assert arguments.takes_fields or not fields, f"{line}: unknown {fields}"
    if arguments.takes_fields:
        strange = [field for field in fields if field.startswith("--") and "." not in field and not known_field(arguments.command, field)]
        assert strange == [], f"{line}: unknown {strange}"
    named = words[1] if len(words) > 1 else ""
    if arguments.command in NAMES_OF_RECIPES and re.fullmatch(r"[a-z0-9_]+", named) and "feature_noise" not in named:
        assert is_recipe(named) or named in list_sweeps(), f"{line}: no such recipe"


def known_field(command: str, flag: str) -> bool:
    """Return whether a flag without a dot is a field that a command takes: of a sweep, or of an experiment itself."""
    from orchestration.experiment import ExperimentConfig
    from orchestration.sweeping.config import SweepConfig

    name = flag.removeprefix("--").partition("=")[0]
    return name in ExperimentConfig.model_fields or (command in ("sweep", "submit") and name in SweepConfig.model_fields)


@pytest.mark.parametrize("page", PAGES)
def test_pages_of_defences_show_the_parameters_of_the_code(page: str) -> None:
    assert parts(page_path(page).read_text(encoding="utf-8"))[1] == documented_parameters(page), (
        "python -m tests.architecture.documented_parameters"
    )


def test_the_site_has_every_page() -> None:
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    named = set(re.findall(r"[\w/]+\.md", str(nav)))
    there = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    assert named == there


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    page = (tmp_path / "site" / "api.html").read_text(encoding="utf-8")
    assert "Take one new draw at every random site" in page
