"""MLflow: one writer, explicit run ids, runs found by tag, so that starting again neither duplicates runs nor metrics.

The driver process is the only writer. A sweep is a parent run, each trial a child, tagged with what identifies it; a run is looked up
by its tags before one is created. Metrics of an epoch are logged once: epochs up to the last logged one are skipped.
Every call leaves the same record when it is made twice, so that `BackgroundWriter` may try again while the store is away.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import socket
import sqlite3
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

# With MLflow's own seven tries a call to a server that is away takes minutes. It must fail sooner, to be told and tried again.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
# MLflow prints a link when a run ends, with the user and password that the address may hold; `Tracker.link` shows it without.
os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"

import mlflow
from alembic.util import CommandError
from mlflow.entities import Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from sqlalchemy.exc import SQLAlchemyError

from models.errors import UserError
from orchestration.home import Home
from orchestration.tracking.local_store import prepare_store

PARENT_TAG = "mlflow.parentRunId"
NAME_TAG = "mlflow.runName"
ARTIFACTS_VARIABLE = "MLFLOW_DEFAULT_ARTIFACT_ROOT"  # MLflow's own name for it
FINGERPRINT_TAG = "rayndom.fingerprint"
KIND_TAG = "rayndom.kind"
SWEEP_TAG = "rayndom.sweep"
REPLACED_TAG, REPLACES_TAG = "rayndom.replaced", "rayndom.replaces"
"""Of the run of a training that was started anew, and of the run that was made for the new one."""

_NOT_IN_NAMES = re.compile(r"[^\w\-. /:]")
_PARAMS_PER_CALL = 90
_PARAM_LENGTH = 5900
_METRICS_PER_CALL = 900
_AWAY_CODES = ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "BAD_GATEWAY", "GATEWAY_TIMEOUT")


class StoreAway(RuntimeError):
    """The MLflow store stayed away; nothing that was trained is lost."""


def is_away(error: BaseException) -> bool:
    """Return whether an error says that the store cannot be reached or cannot work now, rather than that it refuses what was asked."""
    if isinstance(error, MlflowException):
        return error.error_code in _AWAY_CODES
    if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError | PermissionError):
        return False  # what was to be stored is not there, or may not be read
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(status, int):
        return status >= 500 or status in (408, 429)
    # Sockets, disks and `requests` raise OSError; the S3 client, which may not be installed, has its own family.
    return isinstance(error, OSError) or (type(error).__module__.startswith("botocore") and "Connect" in type(error).__name__)


class Tracker:
    """The one writer to an MLflow store.

    Args:
        home: gives the store's URI and, for the SQLite store, the folder of artifacts.
        experiment: name of the MLflow experiment; created if missing.

    Raises:
        UserError: the store cannot be reached or opened.
    """

    def __init__(self, home: Home, experiment: str) -> None:
        self.uri = home.tracking_uri
        _check_reachable(self.uri)
        _quiet()
        prepare_store(home)
        self.client = MlflowClient(tracking_uri=self.uri)
        try:
            self.experiment_id = self._experiment(experiment, home)
        except MlflowException as error:
            raise UserError(f"cannot use the MLflow store {display_uri(self.uri)}: {_first_line(error.message)}") from None
        # A database that is cut, of another kind or of another version: SQLAlchemy's and Alembic's errors quote whole statements.
        except (SQLAlchemyError, CommandError, sqlite3.Error) as error:
            cause = getattr(error, "orig", None) or error
            raise UserError(
                f"cannot use the MLflow store {display_uri(self.uri)}: {_first_line(str(cause))}. It is damaged, or not one."
            ) from None
        except ImportError as error:
            raise UserError(
                f"the MLflow store {display_uri(self.uri)} needs the package {error.name}: `make setup EXTRAS=server` installs it"
            ) from None
        self._last_step: dict[str, int] = {}

    def _experiment(self, name: str, home: Home) -> str:
        """Return the id of an experiment, created if there is none; another process may create it at the same time."""
        found = self.client.get_experiment_by_name(name)
        if found is None:
            try:
                return self.client.create_experiment(name, artifact_location=_artifact_location(self.uri, home))
            except MlflowException:
                found = self.client.get_experiment_by_name(name)
                if found is None:  # it was not another process that was faster
                    raise
        if found.lifecycle_stage == "deleted":
            raise UserError(f"the MLflow experiment {name!r} was deleted; restore it or choose another name")
        return found.experiment_id

    def run(self, kind: str, identity: Mapping[str, str], name: str, parent: str | None = None) -> str:
        """Return the id of the run with these identifying tags, created if there is none. It is set to RUNNING.

        Args:
            kind: `run`, `sweep` or `trial`.
            identity: tags that together identify it, e.g. its fingerprint.
            name: shown name.
            parent: id of the parent run.
        """
        tags = _identifying(kind, identity, parent)
        found = self._newest_first(tags)
        current = next((run for run in found if REPLACED_TAG not in run.data.tags), None)
        if current is not None:
            self.client.update_run(current.info.run_id, status="RUNNING")
            return current.info.run_id
        replaces = {REPLACES_TAG: found[0].info.run_id} if found else {}
        return self.client.create_run(self.experiment_id, tags=tags | replaces | {NAME_TAG: name}, run_name=name).info.run_id

    def replace(self, kind: str, identity: Mapping[str, str], parent: str | None = None) -> None:
        """Mark the runs with these identifying tags as replaced: they stay as they are, and `run` makes a new one that names the last."""
        for run in self._newest_first(_identifying(kind, identity, parent)):
            if REPLACED_TAG not in run.data.tags:
                self.client.set_tag(run.info.run_id, REPLACED_TAG, "true")

    def _newest_first(self, tags: Mapping[str, str]) -> list[Run]:
        clauses = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
        return list(self.client.search_runs([self.experiment_id], clauses, max_results=1000, order_by=["attributes.start_time DESC"]))

    def find_run(self, fingerprint: str) -> str | None:
        """Return the id of a run (not of a trial) with this fingerprint, if there is one."""
        found = self._newest_first({FINGERPRINT_TAG: fingerprint})
        return next((run.info.run_id for run in found if REPLACED_TAG not in run.data.tags), None)

    def children(self, parent: str, kind: str) -> list[Run]:
        """Return the runs of a kind below a parent run."""
        clauses = f"tags.`{PARENT_TAG}` = '{parent}' and tags.`{KIND_TAG}` = '{kind}'"
        found: list[Run] = []
        token = None
        while True:
            page = self.client.search_runs([self.experiment_id], clauses, max_results=1000, page_token=token)
            found += page
            token = page.token
            if not token:
                return found

    def fingerprint_of(self, run_id: str) -> str | None:
        """Return the fingerprint that a run is tagged with.

        Raises:
            UserError: there is no such run.
        """
        try:
            return self.client.get_run(run_id).data.tags.get(FINGERPRINT_TAG)
        except MlflowException:
            raise UserError(f"no run {run_id} in the MLflow store {display_uri(self.uri)}") from None

    def log_params(self, run_id: str, params: Mapping[str, Any]) -> None:
        """Log parameters that are not logged yet, in chunks. Long values are cut; the artifact `config.json` holds them whole."""
        known = self.client.get_run(run_id).data.params
        fresh = [Param(key, str(value)[:_PARAM_LENGTH]) for key, value in params.items() if key not in known]
        for start in range(0, len(fresh), _PARAMS_PER_CALL):
            self.client.log_batch(run_id, params=fresh[start : start + _PARAMS_PER_CALL])

    def set_tags(self, run_id: str, tags: Mapping[str, Any]) -> None:
        """Set tags."""
        self.client.log_batch(run_id, tags=[RunTag(key, str(value)[:_PARAM_LENGTH]) for key, value in tags.items()])

    def log_epoch(self, run_id: str, epoch: int, metrics: Mapping[str, float]) -> None:
        """Log an epoch's metrics once. An epoch that the run already has is skipped."""
        if epoch <= self._logged_until(run_id):
            return
        # Until the store has answered it is unknown whether it has this epoch: a second try asks first.
        del self._last_step[run_id]
        self._log_batches(run_id, metrics, epoch)
        self._last_step[run_id] = epoch

    def _log_batches(self, run_id: str, metrics: Mapping[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        entries = [Metric(key, float(value), now, step) for key, value in metrics.items()]
        for start in range(0, len(entries), _METRICS_PER_CALL):
            self.client.log_batch(run_id, metrics=entries[start : start + _METRICS_PER_CALL])

    def log_metrics(self, run_id: str, metrics: Mapping[str, float]) -> None:
        """Log final metrics, replacing nothing: those already logged with the same value are left out."""
        known = self.client.get_run(run_id).data.metrics
        metrics = {_NOT_IN_NAMES.sub(".", key): value for key, value in metrics.items()}
        fresh = {key: value for key, value in metrics.items() if key not in known or not _same(known[key], value)}
        if fresh:
            self._log_batches(run_id, fresh, 0)

    def log_json(self, run_id: str, content: Any, path: str) -> None:
        """Store a JSON artifact."""
        self.client.log_text(run_id, json.dumps(content, indent=2, default=str), path)

    def log_folder(self, run_id: str, folder: Path, path: str) -> None:
        """Store a folder of files as artifacts."""
        self.client.log_artifacts(run_id, str(folder), path)

    def log_file(self, run_id: str, file: Path, path: str | None = None) -> None:
        """Store one file as an artifact."""
        self.client.log_artifact(run_id, str(file), path)

    def has_folder(self, run_id: str, folder: Path, path: str) -> bool:
        """Return whether a run has every file of a folder as an artifact below `path`."""
        stored = {Path(item.path).name for item in self.client.list_artifacts(run_id, path)}
        return {entry.name for entry in folder.iterdir()} <= stored

    def finish(self, run_id: str, status: str = "FINISHED") -> None:
        """End a run: `FINISHED`, `FAILED` or `KILLED`."""
        self.client.set_terminated(run_id, status)

    def _logged_until(self, run_id: str) -> int:
        if run_id not in self._last_step:
            history = self.client.get_metric_history(run_id, "train/loss")
            self._last_step[run_id] = max((metric.step for metric in history), default=0)
        return self._last_step[run_id]

    def link(self, run_id: str) -> str:
        """Return where a person finds the run."""
        if self.uri.startswith("http"):
            return f"{display_uri(self.uri)}/#/experiments/{self.experiment_id}/runs/{run_id}"
        return f"run {run_id} (`rayndom ui` opens MLflow)"


def _first_line(text: str) -> str:
    """Return the first line of an error, without the statement that a database library appends."""
    return (text.strip().splitlines() or ["no reason given"])[0][:300]


def _identifying(kind: str, identity: Mapping[str, str], parent: str | None) -> dict[str, str]:
    return {KIND_TAG: kind, **identity} | ({PARENT_TAG: parent} if parent else {})


def _artifact_location(uri: str, home: Home) -> str | None:
    """Return where a new experiment keeps its artifacts: a server decides for itself, a database is told."""
    if urlsplit(uri).scheme.split("+")[0] not in ("sqlite", "postgresql", "mysql", "mssql"):
        return None
    return os.environ.get(ARTIFACTS_VARIABLE) or home.artifacts.as_uri()


def _same(known: float, value: float) -> bool:
    return known == value or (math.isnan(known) and math.isnan(value))


def download_model(home: Home, target: str, destination: Path) -> Path:
    """Fetch the exported model of an MLflow run id (of a sweep: its winner) or `models:/NAME@ALIAS` to `destination`; return its folder.

    Raises:
        UserError: no such run or model, or it holds no exported model.
    """
    _check_reachable(home.tracking_uri)
    _quiet()
    prepare_store(home)
    mlflow.set_tracking_uri(home.tracking_uri)
    try:
        uri = target if target.startswith("models:/") else _model_uri(target)
        return Path(mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=str(destination)))
    except MlflowException as error:
        raise UserError(f"no exported model at {target!r} in {display_uri(home.tracking_uri)}: {error.message}") from None
    except (OSError, ImportError) as error:
        raise UserError(f"cannot fetch the model of {target!r}: {error}") from None


def _model_uri(run_id: str) -> str:
    """Return where a run keeps its exported model: a training run its own, a sweep its winner's."""
    folders = {item.path for item in MlflowClient().list_artifacts(run_id) if item.is_dir}
    return f"runs:/{run_id}/{'winner' if 'winner' in folders and 'model' not in folders else 'model'}"


def display_uri(uri: str) -> str:
    """Return a URI without user name and password."""
    parts = urlsplit(uri)
    if parts.password or parts.username:
        return uri.replace(parts.netloc, (parts.hostname or "") + (f":{parts.port}" if parts.port else ""))
    return uri


def _check_reachable(uri: str) -> None:
    parts = urlsplit(uri)
    if parts.scheme not in ("http", "https"):
        return
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname or "", port), timeout=5).close()
    except OSError as error:
        raise UserError(
            f"the MLflow server {display_uri(uri)} cannot be reached: {error}. Start it, or unset MLFLOW_TRACKING_URI to use the "
            "SQLite store of the home folder."
        ) from None


def _quiet() -> None:
    for name in ("mlflow.store.db.utils", "alembic", "mlflow.tracking"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # a line for each try; what follows says it once
