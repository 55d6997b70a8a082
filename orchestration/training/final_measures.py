"""What is measured on a finished model beside the metrics of its epochs: what it costs, and robust accuracy under named protocols.

The latter on validation images: what a sweep improves when it asks for more than the cheap attack that epochs report.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from analysis.theory.cost import count_parameters
from models.accelerator import device_for, wait_for
from models.errors import UserError
from models.files import write_text
from models.json_text import read_json
from models.modes import mode
from models.randomness import resample
from models.weights import load_pretrained
from orchestration.run_folder import RunFolder
from orchestration.training.job import TrainingJob
from orchestration.training.measure import MARKED_METRIC, PROTOCOLS, MeasureConfig, protocol_metric
from trainers.data import evaluation_batches, load_data
from trainers.reporting import are_metrics
from trainers.validation import limited

if TYPE_CHECKING:
    from analysis.result import EvaluationResult


def protocol_metrics(job: TrainingJob, measure: MeasureConfig) -> dict[str, float]:
    """Attack the model of a finished job on validation images and return its robust accuracy under each protocol of the suite.

    The blocks are kept in the run folder: an interrupted measurement goes on, a finished one is reused.

    Raises:
        UserError: the suite does not fit the model.
    """
    kept = kept_protocol_metrics(job.folder, measure)
    if kept is not None:
        return kept
    from analysis.evaluate import evaluate

    experiment, path = job.experiment, _path(job.folder, measure)
    device = device_for(experiment.resources.gpus_per_worker)
    model = load_pretrained(job.folder.model, resample_on_forward=False).to(device).to(memory_format=torch.channels_last)
    batches = list(evaluation_batches(limited(load_data(experiment.data, job.data_root).validation, measure.num_examples), 256))
    result = evaluate(
        model,
        torch.cat([x for x, _ in batches]),
        torch.cat([y for _, y in batches]),
        measure.suite,
        defence=experiment.defence.name,
        threat_model=experiment.threat_model,
        num_draws=measure.num_draws,
        num_samples=measure.num_examples,
        records=path.with_suffix(".jsonl"),
    )
    metrics = accuracies_by_protocol(result)
    write_text(path, json.dumps(metrics, indent=2))
    return metrics


def kept_protocol_metrics(folder: RunFolder, measure: MeasureConfig) -> dict[str, float] | None:
    """Return what an earlier measurement of the run found, None if there was none.

    Raises:
        UserError: the file is damaged.
    """
    path = _path(folder, measure)
    if not os.path.lexists(path):
        return None
    metrics = read_json(path)
    if not are_metrics(metrics):
        raise UserError(f"{path} is damaged: it should hold numbers by name; delete it to measure again")
    return metrics


def _path(folder: RunFolder, measure: MeasureConfig) -> Path:
    key = hashlib.blake2b(json.dumps(measure.model_dump(mode="json"), sort_keys=True).encode(), digest_size=4).hexdigest()
    return folder.path / f"protocols-{key}.json"


def accuracies_by_protocol(result: EvaluationResult) -> dict[str, float]:
    """Return the lowest accuracy of a single attack under each protocol, under T1 of the worst attack of each sample; and the mark."""
    metrics: dict[str, float] = {}
    for protocol in PROTOCOLS:
        rows = [row for row in result.rows if row.attack != "clean" and row.in_threat_model]
        values = [row.estimate.value for row in rows if protocol in row.protocols]
        if protocol == "T1" and result.headline is not None:
            values = [result.headline.value]
        if values:
            metrics[protocol_metric(protocol)] = min(values)
    if metrics:
        metrics[MARKED_METRIC] = float(result.marked)
    return metrics


LATENCY_BATCH_SIZE = 32
_ROUNDS = 5


def cost_metrics(model: nn.Module, image_shape: tuple[int, int, int]) -> dict[str, float]:
    """Return `model/parameters` and `model/latency_ms`.

    The latency is the median time in milliseconds of one batch of 32 images with a new draw, in eval mode, on the device and with the
    threads that the model was trained with. Other trials on the same machine disturb it.
    """
    device = next(model.parameters()).device
    x_BCHW = torch.full((LATENCY_BATCH_SIZE, *image_shape), 0.5, device=device)
    generator = torch.Generator().manual_seed(0)
    seconds = []
    with mode(model, "eval"), torch.no_grad():
        for _ in range(_ROUNDS + 1):
            wait_for(device)
            started = time.perf_counter()
            resample(model, generator)
            model(x_BCHW)
            wait_for(device)
            seconds.append(time.perf_counter() - started)
    return {
        "model/parameters": float(count_parameters(model)),
        "model/latency_ms": 1000 * statistics.median(seconds[1:]),  # the first call warms up
    }
