"""MLflow: one writer, explicit run ids, runs found by tag, so that starting again neither duplicates runs nor metrics.

The driver process is the only writer. A sweep is a parent run, each trial a child, tagged with what identifies it; a run is looked up
by its tags before one is created. Metrics of an epoch are logged once: epochs up to the last logged one are skipped.
A store that is away for a while does not stop training: what could not be logged is kept and sent with the next epoch.
"""

from __future__ import annotations

import json
import logging
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import mlflow
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from models.errors import UserError
from orchestration.home import Home

logger = logging.getLogger(__name__)

PARENT_TAG = "mlflow.parentRunId"
NAME_TAG = "mlflow.runName"
FINGERPRINT_TAG = "rayndom.fingerprint"
KIND_TAG = "rayndom.kind"
SWEEP_TAG = "rayndom.sweep"

_PARAMS_PER_CALL = 90
_PARAM_LENGTH = 5900


@dataclass
class _Pending:
    """Metrics that the store has not taken yet."""

    metrics: list[Metric] = field(default_factory=list)


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
        self.client = MlflowClient(tracking_uri=self.uri)
        try:
            found = self.client.get_experiment_by_name(experiment)
            if found is None:
                location = home.artifacts.as_uri() if self.uri.startswith("sqlite:") else None
                self.experiment_id = self.client.create_experiment(experiment, artifact_location=location)
            elif found.lifecycle_stage == "deleted":
                raise UserError(f"the MLflow experiment {experiment!r} was deleted; restore it or choose another name")
            else:
                self.experiment_id = found.experiment_id
        except MlflowException as error:
            raise UserError(f"cannot use the MLflow store {display_uri(self.uri)}: {error.message}") from None
        self._pending: dict[str, _Pending] = {}
        self._last_step: dict[str, int] = {}

    def run(self, kind: str, identity: Mapping[str, str], name: str, parent: str | None = None) -> str:
        """Return the id of the run with these identifying tags, created if there is none. It is set to RUNNING.

        Args:
            kind: `run`, `sweep` or `trial`.
            identity: tags that together identify it, e.g. its fingerprint.
            name: shown name.
            parent: id of the parent run.
        """
        tags = {KIND_TAG: kind, **identity} | ({PARENT_TAG: parent} if parent else {})
        clauses = [f"tags.`{key}` = '{value}'" for key, value in tags.items()]
        found = self.client.search_runs([self.experiment_id], filter_string=" and ".join(clauses), max_results=1)
        if found:
            run_id = found[0].info.run_id
            self.client.update_run(run_id, status="RUNNING")
            return run_id
        return self.client.create_run(self.experiment_id, tags=tags | {NAME_TAG: name}, run_name=name).info.run_id

    def find_run(self, fingerprint: str) -> str | None:
        """Return the id of a run (not of a trial) with this fingerprint, if there is one."""
        clause = f"tags.`{FINGERPRINT_TAG}` = '{fingerprint}'"
        found = self.client.search_runs([self.experiment_id], filter_string=clause, max_results=1)
        return found[0].info.run_id if found else None

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
        """Log an epoch's metrics once. An epoch that the run already has is skipped; a store that is away is tried again later."""
        if epoch <= self._logged_until(run_id):
            return
        self._last_step[run_id] = epoch
        now = int(time.time() * 1000)
        pending = self._pending.setdefault(run_id, _Pending())
        pending.metrics += [Metric(key, float(value), now, epoch) for key, value in metrics.items()]
        self._send(run_id)

    def _send(self, run_id: str) -> bool:
        pending = self._pending.get(run_id)
        if not pending or not pending.metrics:
            return True
        try:
            for start in range(0, len(pending.metrics), 900):
                self.client.log_batch(run_id, metrics=pending.metrics[start : start + 900])
        except (MlflowException, OSError) as error:
            logger.warning("the MLflow store is away (%s); %d metrics wait", error, len(pending.metrics))
            return False
        pending.metrics.clear()
        return True

    def log_metrics(self, run_id: str, metrics: Mapping[str, float]) -> None:
        """Log final metrics, replacing nothing: those already logged with the same value are left out."""
        known = self.client.get_run(run_id).data.metrics
        fresh = [Metric(key, float(value), int(time.time() * 1000), 0) for key, value in metrics.items() if known.get(key) != value]
        if fresh:
            self.client.log_batch(run_id, metrics=fresh)

    def log_json(self, run_id: str, content: Any, path: str) -> None:
        """Store a JSON artifact."""
        self.client.log_text(run_id, json.dumps(content, indent=2, default=str), path)

    def log_folder(self, run_id: str, folder: Path, path: str) -> None:
        """Store a folder of files as artifacts."""
        self.client.log_artifacts(run_id, str(folder), path)

    def log_file(self, run_id: str, file: Path, path: str | None = None) -> None:
        """Store one file as an artifact."""
        self.client.log_artifact(run_id, str(file), path)

    def finish(self, run_id: str, status: str = "FINISHED", *, patience_s: float = 60) -> None:
        """End a run: `FINISHED`, `FAILED` or `KILLED`. Metrics that wait are sent first, for at most `patience_s` seconds.

        Raises:
            RuntimeError: the store stayed away.
        """
        deadline = time.monotonic() + patience_s
        while not self._send(run_id):
            if time.monotonic() > deadline:
                raise RuntimeError(f"the MLflow store {display_uri(self.uri)} stayed away; start the same command again to log the rest")
            time.sleep(2)
        self.client.set_terminated(run_id, status)

    def _logged_until(self, run_id: str) -> int:
        if run_id not in self._last_step:
            history = self.client.get_metric_history(run_id, "train/loss")
            self._last_step[run_id] = max((metric.step for metric in history), default=0)
        return self._last_step[run_id]

    def link(self, run_id: str) -> str:
        """Return where a person finds the run."""
        if self.uri.startswith("http"):
            return f"{self.uri}/#/experiments/{self.experiment_id}/runs/{run_id}"
        return f"run {run_id} (`rayndom ui` opens MLflow)"


def download_model(home: Home, target: str, destination: Path) -> Path:
    """Fetch the exported model of an MLflow run id or `models:/NAME@ALIAS` to `destination` and return its folder.

    Raises:
        UserError: no such run or model, or it holds no exported model.
    """
    _check_reachable(home.tracking_uri)
    _quiet()
    mlflow.set_tracking_uri(home.tracking_uri)
    uri = target if target.startswith("models:/") else f"runs:/{target}/model"
    try:
        return Path(mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=str(destination)))
    except MlflowException as error:
        raise UserError(f"no exported model at {target!r} in {display_uri(home.tracking_uri)}: {error.message}") from None
    except OSError as error:
        raise UserError(f"cannot fetch the model of {target!r}: {error}") from None


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
