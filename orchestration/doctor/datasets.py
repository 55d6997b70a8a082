"""Checks of the data sets: which are there, and where they were looked for."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from models.errors import UserError
from orchestration.doctor.check import Check
from trainers.data.location import candidate_folders, data_root, locate
from trainers.data.sets import DATASETS, DatasetInfo


def check_datasets(root: Path | None) -> list[Check]:
    """Return one finding for each data set that Rayndom knows by name. Nothing is read or unpacked."""
    folder = data_root(root)
    # `image_folder` has no place of its own: each experiment names one.
    return [check_dataset(info, folder) for name, info in DATASETS.items() if name != "image_folder"]


def check_dataset(info: DatasetInfo, root: Path) -> Check:
    """Look for the files of one data set below the data root and where system packages put them."""
    name = f"data set {info.name}"
    if not info.files:
        if importlib.util.find_spec("sklearn") is None:
            return Check(name, "fail", "scikit-learn, which brings it, is not installed", "run `make setup`")
        return Check(name, "ok", "inside scikit-learn")
    try:
        return Check(name, "ok", str(locate(info, root)))
    except UserError:
        searched = ", ".join(str(folder) for folder in candidate_folders(info, root))
        return Check(name, "warn", f"not in {searched}", info.how_to_obtain.format(root=root))
