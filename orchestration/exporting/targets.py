"""What a user may name as a trained model: an export folder, a run's fingerprint or folder, a recipe that was trained, an MLflow run id,
`models:/NAME@ALIAS`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.errors import UserError, nearest
from models.weights import CONFIG_FILE, read_config
from orchestration import console
from orchestration.experiment import ExperimentConfig, read_experiment
from orchestration.exporting.details import check_details
from orchestration.exporting.downloads import download_model
from orchestration.exporting.home_runs import run_of_recipe
from orchestration.home import Home
from orchestration.recipes import is_recipe, possible_names
from orchestration.run_folder import RunFolder
from orchestration.tracking.tracker import Tracker


@dataclass(frozen=True)
class Target:
    """A trained model on this disk.

    Attributes:
        folder: with model.safetensors and config.json.
        experiment: how it was trained; None for models that were saved by hand.
        run_id: its MLflow run, where known.
    """

    folder: Path
    experiment: ExperimentConfig | None
    run_id: str | None = None

    @property
    def config(self) -> dict[str, Any]:
        """Content of config.json."""
        return read_config(self.folder)


def resolve_target(target: str, home: Home) -> Target:
    """Return the model that `target` names.

    Raises:
        UserError: there is none; says where it was looked for.
    """
    path = Path(target)
    if (path / CONFIG_FILE).is_file():
        if is_recipe(target):
            console.warn(f"{target} is a folder here and a recipe; the folder's model is taken")
        return _target(path)
    if (path / "model" / CONFIG_FILE).is_file():
        return _target(path / "model")
    if re.fullmatch(r"[0-9a-f]{16}", target):
        folder = RunFolder(home.run(target))
        if folder.result() is not None:
            return _target(folder.model)
        if folder.has_state:
            raise UserError(f"run {target} is not finished; the same `rayndom train` command goes on with it")
    if path.is_dir():
        raise UserError(f"{target} is a folder without {CONFIG_FILE}: not an exported model")
    if target.startswith("models:/") or re.fullmatch(r"[0-9a-f]{32}", target):
        tracked = _local_run(target, home)
        if tracked is not None:
            return tracked
        return _target(download_model(home, target), None if target.startswith("models:/") else target)
    if is_recipe(target) or target.endswith((".yaml", ".yml")):
        return _target(RunFolder(home.run(run_of_recipe(target, home))).model)
    close = nearest(target[:300], possible_names())
    hint = f" Did you mean the recipe {close[0]!r}?" if close else ""
    raise UserError(
        f"no model {target!r}.{hint} It is neither an exported folder, nor a finished run in {home.root / 'runs'} (16 hexadecimal digits), "
        "nor a recipe, nor an MLflow run id (32), nor models:/NAME@ALIAS"
    )


def _local_run(run_id: str, home: Home) -> Target | None:
    """Return the run's own folder where this home has it: no second copy is fetched."""
    if run_id.startswith("models:/"):
        return None
    tracker = Tracker.existing(home, "rayndom")
    fingerprint = None if tracker is None else tracker.fingerprint_of(run_id)
    if fingerprint is None:
        return None
    folder = RunFolder(home.run(fingerprint))
    return _target(folder.model, run_id) if folder.result() is not None else None


def _target(folder: Path, run_id: str | None = None) -> Target:
    details = read_config(folder)["details"]
    source = f"{folder / CONFIG_FILE}: details"
    check_details(details, source)
    experiment = details.get("experiment")
    return Target(folder, None if experiment is None else read_experiment(experiment, f"{source}.experiment"), run_id)
