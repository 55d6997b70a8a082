"""Trained models and data sets as MLflow 3 knows them: a logged model that its run put out, metrics tied to it and to the images they
were measured on, so that one search over an experiment's models returns the best.

Like all calls of `Tracker`, those of this file leave the same record when they are made twice.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from mlflow.entities import (
    Dataset,
    DatasetInput,
    InputTag,
    LoggedModel,
    LoggedModelOutput,
    LoggedModelStatus,
    Metric,
)
from mlflow.types import Schema, TensorSpec

from models.weights import CARD_FILE, CONFIG_FILE, DIGEST, read_config
from orchestration.tracking.model_format import MODEL_FOLDER, in_mlflow_format
from orchestration.tracking.tracker import Tracker, as_metric_name, source_tags
from trainers.data.description import DataDescription

WEIGHTS_TAG = "rayndom.weights_sha256"
CONTEXT_TAG = "mlflow.data.context"  # MLflow's own name for it
_NOT_IN_MODEL_NAMES = re.compile(r"[/:.%\"'\s]+")
_SAME_RUN = 1000


@dataclass(frozen=True)
class ModelRecord:
    """What is logged of a trained model.

    Attributes:
        exported: folder of the exported model. name: how tables call it.
        step: epoch whose weights they are. metrics: of that epoch. params: what a person looks for in a list of models.
    """

    exported: Path
    name: str
    step: int
    metrics: Mapping[str, float]
    params: Mapping[str, Any]


def log_model(tracker: Tracker, run_id: str, record: ModelRecord) -> str:
    """Log an exported model as the output of a run, once, and return its id; of new weights there is a new one."""
    weights = str(read_config(record.exported).get(DIGEST))
    found = [model for model in _models_of(tracker, run_id) if model.tags.get(WEIGHTS_TAG) == weights]
    ready = next((model for model in found if model.status == LoggedModelStatus.READY), None)
    for model in found:
        if model is not ready:
            tracker.client.delete_logged_model(model.model_id)  # half written by a process that was killed
    model_id = ready.model_id if ready is not None else _write(tracker, run_id, record, weights)
    put_out(tracker, run_id, model_id, record.step)
    link_metrics(tracker, run_id, model_id, record.metrics, step=record.step)
    return model_id


def _write(tracker: Tracker, run_id: str, record: ModelRecord, weights: str) -> str:
    client = tracker.client
    name = _NOT_IN_MODEL_NAMES.sub("-", record.name).strip("-") or "model"
    params = {key: str(value)[:250] for key, value in record.params.items()}
    tags = {WEIGHTS_TAG: weights} | {tag: value for tag, value in source_tags().items() if tag.startswith("mlflow.")}
    made = client.create_logged_model(tracker.experiment_id, name, run_id, tags=tags, params=params, model_type="classifier")
    with in_mlflow_format(record.exported, made.model_id) as folder:
        client.log_model_artifacts(made.model_id, str(folder))
    client.finalize_logged_model(made.model_id, LoggedModelStatus.READY)
    return made.model_id


def logged_model_of(tracker: Tracker, run_id: str) -> LoggedModel | None:
    """Return the model that a run put out, the newest of several; None: it put out none."""
    outputs = {output.model_id for output in tracker.outputs(run_id)}
    ready = [model for model in _models_of(tracker, run_id) if model.status == LoggedModelStatus.READY]
    mine = [model for model in ready if not outputs or model.model_id in outputs]
    return max(mine, key=lambda model: model.creation_timestamp, default=None)


def _models_of(tracker: Tracker, run_id: str) -> list[LoggedModel]:
    return list(
        tracker.client.search_logged_models([tracker.experiment_id], f"source_run_id = '{run_id}'", max_results=_SAME_RUN, order_by=None)
    )


def put_out(tracker: Tracker, run_id: str, model_id: str, step: int = 0) -> None:
    """Show a model as the output of a run, once: of the one that trained it, and of a sweep whose winner it is."""
    if model_id not in {output.model_id for output in tracker.outputs(run_id)}:
        tracker.client.log_outputs(run_id, [LoggedModelOutput(model_id, step)])


def renew_card(tracker: Tracker, model_id: str, exported: Path) -> None:
    """Replace configuration and card of a logged model, which say how it was evaluated. Its weights stay."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, MODEL_FOLDER)
        folder.mkdir(parents=True)
        for name in (CONFIG_FILE, CARD_FILE):
            shutil.copyfile(exported / name, folder / name)
        tracker.client.log_model_artifacts(model_id, scratch)


def link_metrics(
    tracker: Tracker, run_id: str, model_id: str, metrics: Mapping[str, float], *, step: int = 0, data: DataDescription | None = None
) -> None:
    """Log metrics of a run that are a model's, on a data set where it is given. What is logged already with the same value is left out."""
    digest = None if data is None else data.digest
    known = {
        (metric.key, metric.dataset_digest): metric.value
        for metric in sorted(tracker.client.get_logged_model(model_id).metrics or [], key=lambda metric: metric.timestamp)
    }
    of_run = tracker.client.get_run(run_id).data.metrics
    now = int(time.time() * 1000)
    fresh = []
    for name, value in ((as_metric_name(name), float(value)) for name, value in metrics.items()):
        if known.get((name, digest)) == value:
            continue
        time_and_step = (now, step)
        if of_run.get(name) == value:  # an entry that is its double: the store keeps one of them
            last = tracker.client.get_metric_history(run_id, name)[-1]
            time_and_step = (last.timestamp, last.step)
        fresh.append(Metric(name, value, *time_and_step, model_id, None if data is None else data.name, digest))
    if fresh:
        tracker.client.log_batch(run_id, metrics=fresh)


def log_data(tracker: Tracker, run_id: str, data: DataDescription, context: str) -> None:
    """Log a data set as an input of a run, once: what was seen in `context` (`training`, `test`)."""
    profile = {f"num_{split}": size for split, size in data.sizes.items()} | {"num_classes": data.num_classes}
    images = Schema([TensorSpec(np.dtype(np.uint8), (-1, *data.image_shape))])
    labels = Schema([TensorSpec(np.dtype(np.int64), (-1,))])
    schema = {"mlflow_tensorspec": {"features": images.to_json(), "targets": labels.to_json()}}
    dataset = Dataset(
        name=data.name,
        digest=data.digest,
        source_type="code",
        source=json.dumps({"tags": {"mlflow.source.type": "LOCAL", "mlflow.source.name": f"rayndom --data.name {data.name.split()[0]}"}}),
        schema=json.dumps(schema),
        profile=json.dumps(profile),
    )
    tracker.client.log_inputs(run_id, [DatasetInput(dataset, [InputTag(CONTEXT_TAG, context)])])
