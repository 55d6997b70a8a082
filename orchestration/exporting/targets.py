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
from orchestration.exporting.downloads import download_model
from orchestration.home import Home
from orchestration.recipes import is_recipe, load_recipe, possible_names
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
        return _target(RunFolder(home.run(_run_of_recipe(target, home))).model)
    close = nearest(target[:300], possible_names())
    hint = f" Did you mean the recipe {close[0]!r}?" if close else ""
    raise UserError(
        f"no model {target!r}.{hint} It is neither an exported folder, nor a finished run in {home.root / 'runs'} (16 hexadecimal digits), "
        "nor a recipe, nor an MLflow run id (32), nor models:/NAME@ALIAS"
    )


def _run_of_recipe(name: str, home: Home) -> str:
    """Return the fingerprint of a recipe's finished run: the one with the recipe's own values, or the only one."""
    own = load_recipe(name).experiment
    fingerprint = own.fingerprint
    if RunFolder(home.run(fingerprint)).result() is not None:
        return fingerprint
    stem = Path(name).stem
    found = [folder.path.name for folder in map(RunFolder, sorted((home.root / "runs").glob("*"))) if _is_run_of(folder, stem)]
    if len(found) == 1:
        return found[0]
    if found:
        runs = "\n".join(f"  {run}  {_differences(RunFolder(home.run(run)).read_config(), own)}" for run in found)
        raise UserError(f"recipe {stem} has {len(found)} finished runs, none with its own values; name one:\n{runs}")
    raise UserError(f"recipe {stem} has no finished run in {home.root / 'runs'}; `rayndom train {name}` trains it")


def _differences(experiment: ExperimentConfig, own: ExperimentConfig) -> str:
    """Return the fields in which a run differs from its recipe, with its values."""
    usual = own.flatten()
    operational = ("name", "description", "resources.", "tracking.")
    differing = {key: value for key, value in experiment.flatten().items() if usual.get(key) != value and not key.startswith(operational)}
    return ", ".join(f"{key}={value}" for key, value in differing.items())


def _is_run_of(folder: RunFolder, recipe: str) -> bool:
    """Return whether a folder holds a finished run of a recipe; one that cannot be read is skipped with a warning."""
    try:
        return folder.result() is not None and folder.read_config().name == recipe
    except UserError as error:
        console.warn(f"skipped: {error}")
        return False


def _local_run(run_id: str, home: Home) -> Target | None:
    """Return the run's own folder where this home has it: no second copy is fetched."""
    if run_id.startswith("models:/"):
        return None
    fingerprint = Tracker(home, "rayndom").fingerprint_of(run_id)
    if fingerprint is None:
        return None
    folder = RunFolder(home.run(fingerprint))
    return _target(folder.model, run_id) if folder.result() is not None else None


def _target(folder: Path, run_id: str | None = None) -> Target:
    experiment = read_config(folder)["details"].get("experiment")
    source = f"{folder / CONFIG_FILE}: details.experiment"
    return Target(folder, None if experiment is None else read_experiment(experiment, source), run_id)
