"""Models fetched from an MLflow store into the home's `downloads`."""

from __future__ import annotations

import re
from pathlib import Path

import mlflow

from models.errors import UserError
from orchestration.home import Home
from orchestration.tracking.model_format import MODEL_FOLDER
from orchestration.tracking.store import client_of, display_uri
from orchestration.trained_models.contents import downloaded, lacking


def download_model(home: Home, target: str) -> Path:
    """Fetch the exported model of an MLflow run id (of a sweep: its winner) or `models:/NAME@ALIAS`; return its folder.

    Raises:
        UserError: no such run or model, or it holds no exported model, or none any more.
    """
    client = client_of(home)
    shown = f"{target!r} in {display_uri(home.tracking_uri)}"

    def fetch(folder: Path) -> Path:
        try:
            if target.startswith("models:/"):
                uri = _within(_version_uri(client, target), home)
            else:
                uri = _uri_of_run(client, target, home)
            # Not by MLflow's own default of a store: it would stay in the environment, and stand above every home from then on.
            found = mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=str(folder), tracking_uri=home.tracking_uri)
            fetched = Path(found)
        except mlflow.MlflowException as error:
            raise UserError(f"no exported model at {shown}: {_one_line(error.message)}") from None
        except (OSError, ImportError) as error:
            raise UserError(f"cannot fetch the model of {shown}: {_one_line(str(error))}") from None
        missing = lacking(fetched)
        if missing:
            raise UserError(f"no exported model at {shown}: {', '.join(missing)} is not there, or not any more")
        return fetched

    return downloaded(home, target, re.sub(r"[^A-Za-z0-9]+", "-", target), fetch)


def version_named(home: Home, target: str) -> str:
    """Return `models:/NAME/VERSION` for `models:/NAME@ALIAS`: the model that the alias means now, also when it means another one later.

    Raises:
        UserError: there is no such model or alias.
    """
    try:
        return "models:/{}/{}".format(*_version(client_of(home), target))
    except mlflow.MlflowException as error:
        raise UserError(f"no exported model at {target!r} in {display_uri(home.tracking_uri)}: {_one_line(error.message)}") from None


def _one_line(text: str) -> str:
    """Return what MLflow says of each file that it could not fetch, as a part of a sentence."""
    return " ".join(text.replace("#", " ").split())


def _version_uri(client: mlflow.MlflowClient, target: str) -> str:
    """Return where the files of `models:/NAME@ALIAS`, `models:/NAME/VERSION` or of a logged model, `models:/m-ID`, lie."""
    if re.fullmatch(r"models:/m-[0-9a-f]{32}", target):
        return client.get_logged_model(target.removeprefix("models:/")).artifact_location
    return client.get_model_version_download_uri(*_version(client, target))


def _version(client: mlflow.MlflowClient, target: str) -> tuple[str, str]:
    """Return name and number of the version that `models:/NAME@ALIAS` or `models:/NAME/VERSION` means."""
    name, at, alias = target.removeprefix("models:/").partition("@")
    if at:
        return name, str(client.get_model_version_by_alias(name, alias).version)
    name, _, number = name.partition("/")
    return name, number


def _uri_of_run(client: mlflow.MlflowClient, run_id: str, home: Home) -> str:
    """Return where the model of a run lies: what it put out last; of runs of earlier versions, an artifact of its own."""
    run = client.get_run(run_id)
    outputs = run.outputs.model_outputs if run.outputs else []
    if outputs:
        models = [client.get_logged_model(output.model_id) for output in outputs]
        newest = max(models, key=lambda model: model.creation_timestamp)
        return _within(newest.artifact_location, home)
    folders = {item.path for item in client.list_artifacts(run_id) if item.is_dir}
    return f"{run.info.artifact_uri}/{'winner' if 'winner' in folders and 'model' not in folders else 'model'}"


def _within(uri: str, home: Home) -> str:
    """Return where in a folder of artifacts the exported model lies: earlier versions kept it without MLflow's own files around it."""
    names = {item.path.rpartition("/")[2] for item in mlflow.artifacts.list_artifacts(artifact_uri=uri, tracking_uri=home.tracking_uri)}
    return f"{uri}/{MODEL_FOLDER}" if "MLmodel" in names else uri
