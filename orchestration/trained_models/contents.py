"""What a folder with a model holds: whether two hold the same weights, and a name for all of it."""

from __future__ import annotations

import filecmp
import hashlib
from pathlib import Path

from models.weights import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE


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
