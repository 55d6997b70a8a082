"""`rayndom new defence NAME`: a folder with a defence of one's own that works as it is, and its test."""

from __future__ import annotations

import argparse
import keyword
import os
import re
from pathlib import Path

from models.errors import EnvironmentProblem, UserError
from models.file_content import folder_here
from orchestration import console
from orchestration.commands.command import Command

TEMPLATES = Path(__file__).resolve().parent.parent / "templates" / "defence"
_NAME = re.compile(r"[a-z][a-z0-9]*(?:_[a-z0-9]+)*")


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("kind", choices=("defence",), help="what to begin")
    parser.add_argument("name", help="of the defence, as users will type it: small letters, digits, single underscores")
    parser.add_argument("--to", help="folder to write (default: ./NAME)")


def _run(arguments: argparse.Namespace) -> None:
    name = arguments.name
    if not _NAME.fullmatch(name) or keyword.iskeyword(name) or len(name) > 60:
        raise UserError(f"{name!r:.100} is no name of a defence: small letters and digits, joined by single underscores, as `my_noise`")
    from models.registry import list_defences

    if name in list_defences():
        raise UserError(f"there is a defence {name!r} already; choose another name")
    folder = folder_here(arguments.to or name, "--to")
    if os.path.lexists(folder):
        raise UserError(f"{folder} is there already; name another folder with --to")
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise EnvironmentProblem(f"--to: cannot make the folder {str(folder)[:300]}: {error.strerror}") from None
    words = {"NAME": name, "MODULE": f"rayndom_{name}", "CLASS": "".join(part.capitalize() for part in name.split("_"))}
    for template in sorted(TEMPLATES.rglob("*.txt")):
        path = folder / _filled(template.relative_to(TEMPLATES).as_posix().removesuffix(".txt"), words)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_filled(template.read_text(), words))
    console.result({"folder": str(folder), "name": name})
    console.say(
        f"{folder}: network.py is its random layer, search.py what sweeps search, recipes/ how it is trained, tests/ its conformance test"
    )
    console.say(f"next:  rayndom train {name}_digits --plugin {folder}")
    console.say(f"       pip install --editable {folder}     then every command knows it, and `pytest {folder / 'tests'}` tests it")


def _filled(text: str, words: dict[str, str]) -> str:
    for word, value in words.items():
        text = text.replace(f"@{word}@", value)
    return text


NEW = Command(
    "new",
    "write the folder of a defence of your own, which works as it is, with its test",
    ("rayndom new defence my_noise", "rayndom new defence my_noise --to packages/my_noise"),
    _add,
    _run,
)
