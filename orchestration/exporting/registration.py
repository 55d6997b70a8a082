"""Registering an exported folder in MLflow's model registry, in MLflow's own format: `mlflow.pyfunc.load_model("models:/NAME@ALIAS")`
loads it, still random. A version says in its tags how robust it was measured to be; the alias `champion` is the best under T1."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException, RestException

from models.errors import UserError
from models.weights import read_config
from orchestration import console
from orchestration.home import Home
from orchestration.tracking.logged_models import logged_model_of
from orchestration.tracking.model_format import in_mlflow_format
from orchestration.tracking.tracker import Tracker
from orchestration.trained_models.contents import digest_of
from orchestration.trained_models.origin import training_run_of
from orchestration.trained_models.targets import Target

CHAMPION = "champion"
T1_TAG, MARKED_TAG = "rayndom.T1", "rayndom.marked"
COMPARABLE = ("rayndom.data", "rayndom.norm", "rayndom.epsilon", "rayndom.suite", "rayndom.num_samples")
"""Tags in which two versions must agree for their T1 to be held against one another."""
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

    The version's tags say T1 and whether it is marked. Without an alias it becomes `champion` if its T1 is the best: see `crown`.

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
        source = f"{client.get_run(run_id).info.artifact_uri}/{path}"
        if not client.search_registered_models(f"name = '{model_name}'"):
            client.create_registered_model(model_name)
        # The same model again, as of a command that was killed before its alias, is the same version.
        known = [each for each in client.search_model_versions(f"name = '{model_name}'") if each.source == source]
        if known:
            version = known[0]
        else:
            with in_mlflow_format(folder) as formatted:
                tracker.log_folder(run_id, formatted, path)
            logged = logged_model_of(tracker, run_id)
            version = client.create_model_version(
                model_name, source, run_id=run_id, tags=tags_of(folder), model_id=None if logged is None else logged.model_id
            )
        if alias:
            client.set_registered_model_alias(model_name, alias, version.version)
        else:
            crown(tracker, model_name, version)
    except (MlflowException, RestException) as error:
        raise UserError(f"MLflow does not register {name!r}: {error.message}") from None
    finally:
        if trained is None:
            tracker.finish(run_id)
    return f"models:/{model_name}@{alias}" if alias else f"models:/{model_name}/{version.version}"


def tags_of(folder: Path) -> dict[str, str]:
    """Return how robust an exported model was measured to be, by its last evaluation, as tags of a version; none: it was not."""
    evaluation: Mapping[str, Any] = read_config(folder)["details"].get("evaluation") or {}
    headline = evaluation.get("headline")
    if not headline:
        return {}
    asked = evaluation.get("settings", {})  # earlier versions do not have them
    threat_model, data = asked.get("threat_model") or {}, asked.get("data") or {}
    tags = {
        T1_TAG: headline["accuracy"],
        "rayndom.T1.low": headline["low"],
        "rayndom.T1.high": headline["high"],
        "rayndom.num_samples": headline["num_samples"],
        MARKED_TAG: evaluation.get("marked"),
        "rayndom.basis": evaluation.get("basis"),
        "rayndom.suite": evaluation.get("suite"),
        "rayndom.data": data.get("name"),
        "rayndom.norm": threat_model.get("norm"),
        "rayndom.epsilon": threat_model.get("epsilon"),
    }
    return {key: str(value) for key, value in tags.items() if value is not None}


def renew_versions(tracker: Tracker, run_id: str, folder: Path) -> None:
    """Bring the tags of a run's registered versions up to its last evaluation, which `folder` with its model says. Files stay."""
    for version in tracker.client.search_model_versions(f"run_id = '{run_id}'"):
        for key, value in tags_of(folder).items():
            tracker.client.set_model_version_tag(version.name, version.version, key, value)
        crown(tracker, version.name, tracker.client.get_model_version(version.name, version.version))


def crown(tracker: Tracker, name: str, version: ModelVersion) -> None:
    """Make a version the `champion` of its name if no other that was measured alike has a better T1.

    A version whose numbers are marked, or that was not evaluated, never becomes it; one that a person made champion, and that says nothing
    of its T1 or was measured otherwise, stays it.
    """
    if T1_TAG not in version.tags or version.tags.get(MARKED_TAG) != "False":
        return
    current = next(
        (each for each in tracker.client.search_model_versions(f"name = '{name}'") if CHAMPION in _aliases(tracker, name, each)), None
    )
    if current is not None and current.version != version.version:
        alike = T1_TAG in current.tags and all(current.tags.get(tag) == version.tags.get(tag) for tag in COMPARABLE)
        if not alike:
            console.say(f"{name}@{CHAMPION} stays version {current.version}: its T1 was not measured as that of version {version.version}")
            return
        if float(current.tags[T1_TAG]) >= float(version.tags[T1_TAG]):
            return
    tracker.client.set_registered_model_alias(name, CHAMPION, version.version)
    console.say(f"{name}@{CHAMPION} is version {version.version}: T1 {100 * float(version.tags[T1_TAG]):.1f} %, the best so far")


def _aliases(tracker: Tracker, name: str, version: ModelVersion) -> list[str]:
    return list(tracker.client.get_model_version(name, version.version).aliases)
