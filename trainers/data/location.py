"""Where data files are looked for, and what to tell the user who does not have them."""

from __future__ import annotations

import os
from pathlib import Path

from models.errors import UserError
from models.file_content import expanded, folder_here
from trainers.data.download import PUBLISHED
from trainers.data.sets import DatasetInfo

ROOT_VARIABLE = "RAYNDOM_DATA"
DEFAULT_ROOT = Path("data")


def data_root(root: Path | str | None = None) -> Path:
    """Return the absolute folder of the data sets: `root`, else the environment variable RAYNDOM_DATA, else ./data.

    Raises:
        UserError: it is no folder of this machine.
    """
    chosen = root if root is not None else os.environ.get(ROOT_VARIABLE) or DEFAULT_ROOT
    return folder_here(chosen, "the data root")


def candidate_folders(info: DatasetInfo, root: Path, folder: str | None = None) -> list[Path]:
    """Return the folders in which the files of a data set may lie, in the order of search."""
    if folder is not None:
        return [root / expanded(folder)]  # An absolute folder replaces the root.
    return [root if name == "." else root / name for name in info.folders] + [Path(name) for name in info.system_folders]


def locate(info: DatasetInfo, root: Path, folder: str | None = None) -> Path:
    """Return the first candidate folder that holds all files of the data set.

    Raises UserError, naming every folder searched, what belongs there and how to obtain it, if there is none.
    """
    candidates = candidate_folders(info, root, folder)
    incomplete = []
    for candidate in candidates:
        missing = [name for name in info.files if existing_file(candidate, name, info.compressed_suffix) is None]
        if not missing:
            return candidate
        if len(missing) < len(info.files):
            incomplete.append(f"{candidate} lacks {', '.join(missing)}")
    raise UserError(_missing_message(info, root, candidates, incomplete))


def existing_file(folder: Path, name: str, compressed_suffix: str = "") -> Path | None:
    """Return the path of a file or folder, plain or with the compressed suffix, or None if neither exists."""
    for candidate in (folder / name, folder / f"{name}{compressed_suffix}"):
        if candidate.exists():
            return candidate
    return None


def _missing_message(info: DatasetInfo, root: Path, candidates: list[Path], incomplete: list[str]) -> str:
    alternative = f" (plain or {info.compressed_suffix})" if info.compressed_suffix else ""
    lines = [
        f"the files of data set {info.name!r} are not there, and nothing is downloaded unasked.",
        f"Needed{alternative}: {', '.join(info.files)}",
        f"in {'one of these folders' if len(candidates) > 1 else 'this folder'}:",
        *(f"  {candidate}" for candidate in candidates),
        *(f"Incomplete: {line}." for line in incomplete),
        *([f"`rayndom data get {info.name}` fetches them from their authors."] if info.name in PUBLISHED else []),
        info.how_to_obtain.format(root=root),
        f"The data root is {root}; the environment variable {ROOT_VARIABLE} chooses another one.",
    ]
    return "\n".join(lines)
