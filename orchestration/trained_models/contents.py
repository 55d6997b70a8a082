"""What a folder with a model holds: whether two hold the same weights, a name for all of it, and the home's `downloads`, where models that
were fetched lie under such names, so that none stands for another."""

from __future__ import annotations

import filecmp
import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

from models.files import put_folder_in_place
from models.weights import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE
from orchestration.home import Home
from orchestration.single_process import only_process
from orchestration.storage import keep


def same_weights(one: Path, other: Path) -> bool:
    """Return whether two folders of models hold the same weights, byte by byte."""
    files = (one / WEIGHTS_FILE, other / WEIGHTS_FILE)
    return all(file.is_file() for file in files) and filecmp.cmp(*files, shallow=False)


def digest_of(folder: Path) -> str:
    """Return 16 hexadecimal digits of what a folder with a model holds: weights, configuration, card."""
    digest = hashlib.blake2b(digest_size=8)
    for name in (WEIGHTS_FILE, CONFIG_FILE, CARD_FILE):
        path = folder / name
        if path.is_file():
            digest.update(name.encode() + hashlib.blake2b(path.read_bytes()).digest())
    return digest.hexdigest()


def lacking(folder: Path) -> list[str]:
    """Return the files that a folder with a model should hold and does not."""
    return [name for name in (WEIGHTS_FILE, CONFIG_FILE) if not (folder / name).is_file()]


def downloaded(home: Home, what: str, name: str, fill: Callable[[Path], Path]) -> Path:
    """Put a model that is fetched from elsewhere into the home's `downloads`, where other nodes find it too, and return its folder.

    Args:
        what: is fetched, for whoever waits meanwhile. name: how its folder's name begins.
        fill: fetches it into an empty folder, and returns where in it the model lies.
    """
    downloads = home.root / "downloads"
    part = downloads / ".part"
    with only_process(downloads / ".lock", f"the download of {what}", patience_s=None):
        shutil.rmtree(part, ignore_errors=True)  # of a process that was killed: whoever holds the lock is the only one
        try:
            part.mkdir()
            fetched = fill(part)
            folder = downloads / f"{name}-{digest_of(fetched)}"
            if not folder.is_dir():
                put_folder_in_place(fetched, folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    keep(folder)
    return folder
