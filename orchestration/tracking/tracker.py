"""MLflow: one writer, explicit run ids, runs found by tag, so that starting again neither duplicates runs nor metrics.

The driver process is the only writer. A sweep is a parent run, each trial a child, tagged with what identifies it; a run is looked up
by its tags before one is created. Metrics of an epoch are logged once: epochs up to the last logged one are skipped.
Every call leaves the same record when it is made twice, so that `BackgroundWriter` may try again while the store is away.
"""

from __future__ import annotations

import getpass
import itertools
import json
import math
import os
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mlflow.entities import LoggedModelOutput, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException

from models.errors import EnvironmentFailure, UserError
from orchestration.home import Home
from orchestration.tracking.store import client_of, display_uri, store_errors, store_exists

PARENT_TAG = "mlflow.parentRunId"
NAME_TAG = "mlflow.runName"
ARTIFACTS_VARIABLE = "MLFLOW_DEFAULT_ARTIFACT_ROOT"  # MLflow's own name for it
FINGERPRINT_TAG = "rayndom.fingerprint"
KIND_TAG = "rayndom.kind"
SWEEP_TAG = "rayndom.sweep"
REPLACED_TAG, REPLACES_TAG = "rayndom.replaced", "rayndom.replaces"
"""Of the run of a training that was started anew, and of the run that was made for the new one."""

MODEL_TRAINING = {"mlflow.experimentKind": "custom_model_development"}
"""Tag by which MLflow's pages show an experiment's runs and models, not the traces of language models."""

_NOT_IN_NAMES = re.compile(r"[^\w\-. /:]")
_IN_ADDRESS = re.compile(r"//[^/@\s]*@")  # a user and a password
_PARAMS_PER_CALL = 90
_PARAM_LENGTH = 5900
_METRICS_PER_CALL = 900
_AWAY_CODES = ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "BAD_GATEWAY", "GATEWAY_TIMEOUT")


class StoreAway(EnvironmentFailure):
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
        self.home, self.uri = home, home.tracking_uri
        self.client = client_of(home)
        self._marked = True
        with store_errors(self.uri):
            self.experiment_id = self._experiment(experiment, home)
        self._last_step: dict[str, int] = {}

    @classmethod
    def existing(cls, home: Home, experiment: str) -> Tracker | None:
        """Return the tracker of an experiment that the store has; None where it has none: nothing is made.

        Raises:
            UserError: as above.
        """
        if not store_exists(home):
            return None
        client = client_of(home)
        with store_errors(home.tracking_uri):
            known = client.get_experiment_by_name(experiment)
        return cls(home, experiment) if known is not None else None

    def _experiment(self, name: str, home: Home) -> str:
        """Return the id of an experiment, created if there is none; another process may create it at the same time."""
        found = self.client.get_experiment_by_name(name)
        if found is None:
            try:
                return self.client.create_experiment(name, artifact_location=_artifact_location(self.uri, home), tags=MODEL_TRAINING)
            except MlflowException:
                found = self.client.get_experiment_by_name(name)
                if found is None:  # it was not another process that was faster
                    raise
        if found.lifecycle_stage == "deleted":
            raise UserError(f"the MLflow experiment {name!r} was deleted; restore it or choose another name")
        self._marked = MODEL_TRAINING.items() <= found.tags.items()
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
        if not self._marked:  # made by an earlier version
            for key, value in MODEL_TRAINING.items():
                self.client.set_experiment_tag(self.experiment_id, key, value)
            self._marked = True
        # The end of the chain, whatever the clock said when its runs were made.
        named = {run.data.tags.get(REPLACES_TAG) for run in found}
        replaces = next(({REPLACES_TAG: run.info.run_id} for run in found if run.info.run_id not in named), {})
        tags |= replaces | source_tags() | {NAME_TAG: name}
        return self.client.create_run(self.experiment_id, tags=tags, run_name=name).info.run_id

    def replace(self, kind: str, identity: Mapping[str, str], parent: str | None = None) -> None:
        """Mark the runs with these identifying tags as replaced: they stay as they are, and `run` makes a new one that names the last."""
        for run in self._newest_first(_identifying(kind, identity, parent)):
            if REPLACED_TAG not in run.data.tags:
                self.client.set_tag(run.info.run_id, REPLACED_TAG, "true")

    def _newest_first(self, tags: Mapping[str, str]) -> list[Run]:
        clauses = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
        return list(self.client.search_runs([self.experiment_id], clauses, max_results=1000, order_by=["attributes.start_time DESC"]))

    def find_run(self, fingerprint: str, below: str | None = None) -> str | None:
        """Return the id of the run that trained this fingerprint, if there is one: below a parent run, else one of its own, else any."""
        found = [run for run in self._newest_first({FINGERPRINT_TAG: fingerprint}) if REPLACED_TAG not in run.data.tags]
        found.sort(key=lambda run: (run.data.tags.get(PARENT_TAG) != below, run.data.tags.get(KIND_TAG) != "run"))
        return found[0].info.run_id if found else None

    def kinds(self, fingerprint: str) -> frozenset[str]:
        """Return the kinds of the runs with this fingerprint: how it came to be trained."""
        return frozenset(run.data.tags[KIND_TAG] for run in self._newest_first({FINGERPRINT_TAG: fingerprint}) if KIND_TAG in run.data.tags)

    def children(self, parent: str, kind: str, fingerprint: str | None = None, *, running: bool = False) -> list[Run]:
        """Return the runs of a kind below a parent run; those of one fingerprint, or those that run, where that is asked for.

        A store of thousands of runs takes milliseconds for each that it returns.
        """
        clauses = f"tags.`{PARENT_TAG}` = '{parent}' and tags.`{KIND_TAG}` = '{kind}'"
        clauses += f" and tags.`{FINGERPRINT_TAG}` = '{fingerprint}'" if fingerprint else ""
        clauses += " and attributes.status = 'RUNNING'" if running else ""
        found: list[Run] = []
        token = None
        while True:
            page = self.client.search_runs([self.experiment_id], clauses, max_results=1000, page_token=token)
            found += page
            token = page.token
            if not token:
                return found

    def fingerprint_of(self, run_id: str) -> str | None:
        """Return the fingerprint that a run is tagged with; None: it has none, or its training was started anew.

        Raises:
            UserError: there is no such run.
        """
        try:
            tags = self.client.get_run(run_id).data.tags
            return None if REPLACED_TAG in tags else tags.get(FINGERPRINT_TAG)
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
        entries = [RunTag(key, str(value)[:_PARAM_LENGTH]) for key, value in tags.items()]
        for start in range(0, len(entries), _PARAMS_PER_CALL):
            self.client.log_batch(run_id, tags=entries[start : start + _PARAMS_PER_CALL])

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

    def log_metrics(self, run_id: str, metrics: Mapping[str, float], step: int = 0) -> None:
        """Log final metrics, replacing nothing: those already logged with the same value are left out."""
        known = self.client.get_run(run_id).data.metrics
        metrics = {as_metric_name(key): value for key, value in metrics.items()}
        fresh = {key: value for key, value in metrics.items() if key not in known or not _same(known[key], value)}
        if fresh:
            self._log_batches(run_id, fresh, step)

    def outputs(self, run_id: str) -> list[LoggedModelOutput]:
        """Return the models that a run put out."""
        outputs = self.client.get_run(run_id).outputs
        return list(outputs.model_outputs) if outputs else []

    def log_json(self, run_id: str, content: Any, path: str) -> None:
        """Store a JSON artifact."""
        self.client.log_text(run_id, json.dumps(content, indent=2, default=str), path)

    def log_folder(self, run_id: str, folder: Path, path: str) -> None:
        """Store a folder of files as artifacts."""
        self.client.log_artifacts(run_id, str(folder), path)

    def log_file(self, run_id: str, file: Path, path: str | None = None) -> None:
        """Store one file as an artifact."""
        self.client.log_artifact(run_id, str(file), path)

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


def as_metric_name(name: str) -> str:
    """Return a name as MLflow takes it."""
    return _NOT_IN_NAMES.sub(".", name)


def source_tags() -> dict[str, str]:
    """Return the tags of MLflow's columns `Source` and `Created by`, the command without its flags and whose it was, and the whole command.

    MLflow shows of a source what follows its last slash: of a command with flags nothing but the end of a path, or `255`.
    """
    started = Path(sys.argv[0])
    program = {"cli.py": "rayndom", "__main__.py": started.parent.name}.get(started.name, started.name or "python")
    words = list(itertools.takewhile(lambda word: not word.startswith("-"), sys.argv[1:]))
    source, command = (_IN_ADDRESS.sub("//", " ".join([program, *each]))[:_PARAM_LENGTH] for each in (words, sys.argv[1:]))
    return {
        "mlflow.source.type": "LOCAL",
        "mlflow.source.name": source,
        "rayndom.command": command,
        "mlflow.user": _user(),
    }


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user may have no name
        return str(os.getuid())


def _identifying(kind: str, identity: Mapping[str, str], parent: str | None) -> dict[str, str]:
    return {KIND_TAG: kind, **identity} | ({PARENT_TAG: parent} if parent else {})


def _artifact_location(uri: str, home: Home) -> str | None:
    """Return where a new experiment keeps its artifacts: a server decides for itself, a database is told."""
    if urlsplit(uri).scheme.split("+")[0] not in ("sqlite", "postgresql", "mysql", "mssql"):
        return None
    return os.environ.get(ARTIFACTS_VARIABLE) or home.artifacts.as_uri()


def _same(known: float, value: float) -> bool:
    return known == value or (math.isnan(known) and math.isnan(value))
