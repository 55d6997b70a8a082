"""Registering an exported folder in MLflow's model registry. What is registered is the folder itself: MLflow's default format
traces a model, which freezes its randomness without a word."""

from __future__ import annotations

import re
from pathlib import Path

from mlflow.exceptions import MlflowException, RestException

from models.errors import UserError
from models.weights import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE
from orchestration.home import Home
from orchestration.tracking.tracker import Tracker
from orchestration.trained_models.contents import digest_of
from orchestration.trained_models.origin import training_run_of
from orchestration.trained_models.targets import Target

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,199}")


def checked_registration(name: str) -> tuple[str, str]:
    """Return (name, alias or nothing) of NAME[@ALIAS].

    Raises:
        UserError: not a name that `models:/NAME@ALIAS` can be written with, or an alias that MLflow keeps for itself.
    """
    model_name, at, alias = name.partition("@")
    for what, part in (("name", model_name), *([("alias", alias)] if at else [])):
        if not _NAME.fullmatch(part):
            raise UserError(f"--register {name!r:.100}: the {what} {part!r:.100} should be letters, digits, and . - _ inside")
    if alias.lower() == "latest" or re.fullmatch(r"[vV]\d+", alias):
        raise UserError(
            f"--register {name!r:.100}: MLflow keeps the alias {alias!r} for versions; choose another, as {model_name}@champion"
        )
    return model_name, alias


def register_model(home: Home, target: Target, folder: Path, name: str) -> str:
    """Register an exported folder as a new version of NAME, with an alias if NAME@ALIAS, and return its `models:/` URI.

    Raises:
        UserError: the registry refuses.
    """
    model_name, alias = checked_registration(name)
    tracker = Tracker(home, target.experiment.tracking.experiment if target.experiment else "rayndom")
    client, digest = tracker.client, digest_of(folder)
    trained = training_run_of(target, tracker, home)
    run_id = trained or tracker.run("export", {"rayndom.export": digest}, name=f"export {folder.name}")
    # Named by what it holds: no later export or evaluation changes the files of a version.
    path = f"registered/{digest}"
    try:
        for file in (WEIGHTS_FILE, CONFIG_FILE, CARD_FILE):
            tracker.log_file(run_id, folder / file, path)
        if not client.search_registered_models(f"name = '{model_name}'"):
            client.create_registered_model(model_name)
        source = f"{client.get_run(run_id).info.artifact_uri}/{path}"
        # The same model again, as of a command that was killed before its alias, is the same version.
        known = [each for each in client.search_model_versions(f"name = '{model_name}'") if each.source == source]
        version = known[0] if known else client.create_model_version(model_name, source, run_id=run_id)
        if alias:
            client.set_registered_model_alias(model_name, alias, version.version)
    except (MlflowException, RestException) as error:
        raise UserError(f"MLflow does not register {name!r}: {error.message}") from None
    finally:
        if trained is None:
            tracker.finish(run_id)
    return f"models:/{model_name}@{alias}" if alias else f"models:/{model_name}/{version.version}"
