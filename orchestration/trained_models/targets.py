"""What a user may name as a trained model: an export folder, a run's fingerprint or folder, a recipe that was trained, an MLflow run id,
`models:/NAME@ALIAS`, a model that Rayndom did not train, once it was evaluated.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from analysis.fingerprints import weights_hash
from models.errors import UserError, nearest
from models.external.source import is_external_reference
from models.weights import CONFIG_FILE, load_pretrained, read_config
from orchestration import console
from orchestration.experiment import ExperimentConfig, read_experiment
from orchestration.home import Home
from orchestration.recipes import is_recipe, possible_names
from orchestration.run_folder import RunFolder
from orchestration.storage import fetch
from orchestration.tracking.tracker import Tracker
from orchestration.trained_models.details import check_details
from orchestration.trained_models.downloads import download_model
from orchestration.trained_models.external import KnownExternal, evaluated_as, read_external
from orchestration.trained_models.home_runs import run_of_recipe
from orchestration.trained_models.hub import SCHEME, fetch_model
from trainers.data import DataConfig

LONGEST_NAME = 255
"""Bytes of the name of a file or folder."""


@dataclass(frozen=True)
class Target:
    """A trained model on this disk.

    Attributes:
        folder: with model.safetensors and config.json; of an external model, with its external.json.
        experiment: how it was trained; None for models that were saved by hand.
        run_id: its MLflow run, where known.
        external: a model that Rayndom did not train.
    """

    folder: Path
    experiment: ExperimentConfig | None
    run_id: str | None = None
    external: KnownExternal | None = None

    @property
    def config(self) -> dict[str, Any]:
        """Content of config.json; of an external model, what is known of it."""
        if self.external is not None:
            model = self.external.model
            return {"model": {"reference": model.reference, "weights": model.weights}, "details": {}}
        return read_config(self.folder)

    @property
    def name(self) -> str:
        """How tables name it."""
        if self.external is not None:
            return self.external.model.name
        return self.experiment.name if self.experiment is not None else str(self.config["model"]["defence"])

    @property
    def shown(self) -> str:
        """How messages name it: its folder, or what an external model was named by."""
        return str(self.folder) if self.external is None else self.external.model.reference

    @property
    def defence(self) -> str | None:
        """Name of its defence; None: an external model has none that is known here."""
        return None if self.external is not None else str(self.config["model"]["defence"])

    @property
    def data(self) -> DataConfig | None:
        """Whose test images it is evaluated on: what it was trained on, or what was named; None: it does not say."""
        if self.external is not None:
            return self.external.data
        return None if self.experiment is None else self.experiment.data

    @property
    def source(self) -> Path | KnownExternal:
        """What `load_source` loads it from, in any process: hashable, and safe to pickle."""
        return self.external or self.folder

    def load(self) -> nn.Module:
        """Return the bare model in eval mode, whose draws the caller takes."""
        return load_source(self.source)

    def checkpoint(self) -> str:
        """Return the hash of its weights. Of an external model it is known, and no code of it is executed."""
        return self.external.checkpoint if self.external is not None else weights_hash(self.load())

    def records_folder(self, home: Home, checkpoint: str) -> Path:
        """Return where the records of its evaluations lie.

        Args:
            checkpoint: hash of its weights.
        """
        return self.folder if self.external is not None else home.evaluation(checkpoint[:16])


def load_source(source: Path | KnownExternal) -> nn.Module:
    """Return the bare model of a `Target.source`."""
    if isinstance(source, KnownExternal):
        return source.load()
    fetch(source)
    return load_pretrained(source, resample_on_forward=False)


def files_of(source: Path | KnownExternal) -> tuple[Path, ...]:
    """Return files of a `Target.source` that every process which loads it must see."""
    return source.model.files if isinstance(source, KnownExternal) else (source / CONFIG_FILE,)


def external_target(known: KnownExternal, home: Home) -> Target:
    """Return an external model as a target."""
    return Target(home.external(known.name), None, external=known)


def names_external(target: str, home: Home) -> bool:
    """Return whether `target` names a model that Rayndom did not train: by its code or file, or by the name that the home gave it."""
    return is_external_reference(target) or read_external(home, target) is not None


def refuse_external(target: str, home: Home, why: str) -> None:
    """Raise a `UserError` where `target` names a model that Rayndom did not train.

    Args:
        why: what cannot be done with it, and what can, as the end of a sentence.
    """
    if names_external(target, home):
        raise UserError(f"{target} is a model that Rayndom did not build: {why}")


def resolve_target(target: str, home: Home) -> Target:
    """Return the model that `target` names: what the first of the ways below finds.

    Raises:
        UserError: there is none; says where it was looked for.
    """
    if not target.strip():
        raise UserError(f"target: {target!r} names no model; `rayndom list runs` names those of this home")
    if not target.startswith(SCHEME) and any(len(os.fsencode(part)) > LONGEST_NAME for part in Path(target).parts):
        raise UserError(f"no model {target[:60]!r}...: no file has a name of more than {LONGEST_NAME} bytes")
    for way in _WAYS:
        found = way(target, home)
        if found is not None:
            return found
    close = nearest(target[:300], possible_names())
    hint = f" Did you mean the recipe {close[0]!r}?" if close else ""
    raise UserError(
        f"no model {target!r}.{hint} It is neither an exported folder, nor a finished run in {home.root / 'runs'} (16 hexadecimal digits), "
        "nor a recipe, nor an MLflow run id (32), nor models:/NAME@ALIAS, nor hf://OWNER/NAME, "
        "nor a model of your own (FILE.py:CALLABLE, timm:NAME, ...)"
    )


def _of_the_hub(target: str, home: Home) -> Target | None:
    return _target(fetch_model(target, home)) if target.startswith(SCHEME) else None


def _in_a_folder(target: str, home: Home) -> Target | None:
    """Return the model of an exported folder, or of a run's folder."""
    path = Path(target)
    if (path / CONFIG_FILE).is_file():
        if is_recipe(target):
            console.warn(f"{target} is a folder here and a recipe; the folder's model is taken")
        return _target(path)
    return _target(path / "model") if (path / "model" / CONFIG_FILE).is_file() else None


def _external(target: str, home: Home) -> Target | None:
    """Return a model that Rayndom did not train, by its code or file or by the name that the home gave it."""
    known = evaluated_as(target, home) if is_external_reference(target) else read_external(home, target)
    return None if known is None else external_target(known, home)


def _run_of_this_home(target: str, home: Home) -> Target | None:
    if not re.fullmatch(r"[0-9a-f]{16}", target):
        return None
    folder = RunFolder(home.run(target))
    if folder.result() is not None:
        return _target(folder.model)
    if folder.has_state:
        raise UserError(f"run {target} is not finished; the same `rayndom train` command goes on with it")
    return None


def _no_other_folder(target: str, home: Home) -> None:
    if Path(target).is_dir():
        raise UserError(f"{target} is a folder without {CONFIG_FILE}: not an exported model")


def _in_mlflow(target: str, home: Home) -> Target | None:
    """Return the model of a registered version, a logged model or a run of MLflow; of this home's own runs no second copy is fetched."""
    if target.startswith("models:/"):
        return _target(download_model(home, target))
    if not re.fullmatch(r"[0-9a-f]{32}", target):
        return None
    tracker = Tracker.existing(home, "rayndom")
    fingerprint = None if tracker is None else tracker.fingerprint_of(target)
    folder = None if fingerprint is None else RunFolder(home.run(fingerprint))
    if folder is not None and folder.result() is not None:
        return _target(folder.model, target)
    return _target(download_model(home, target), target)


def _of_a_recipe(target: str, home: Home) -> Target | None:
    if not (is_recipe(target) or target.endswith((".yaml", ".yml"))):
        return None
    return _target(RunFolder(home.run(run_of_recipe(target, home))).model)


_WAYS: tuple[Callable[[str, Home], Target | None], ...] = (
    _of_the_hub,
    _in_a_folder,
    _external,
    _run_of_this_home,
    _no_other_folder,
    _in_mlflow,
    _of_a_recipe,
)
"""Ways to name a model, the first that finds one wins: each returns None where the name is none of its own."""


def _target(folder: Path, run_id: str | None = None) -> Target:
    fetch(folder)
    details = read_config(folder)["details"]
    source = f"{folder / CONFIG_FILE}: details"
    check_details(details, source)
    experiment = details.get("experiment")
    return Target(folder, None if experiment is None else read_experiment(experiment, f"{source}.experiment"), run_id)
