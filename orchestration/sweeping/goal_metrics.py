"""Which metrics a sweep may name as its goals, and which way they get better."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from analysis.evaluation.suites import load_suite
from analysis.statistics import wilson_interval
from orchestration.experiment import ExperimentConfig
from orchestration.sweeping.config import SweepConfig
from orchestration.training.measure import MARKED_METRIC, PROTOCOLS, protocol_metric
from trainers.data import DATASETS
from trainers.data.split import derived_validation_size
from trainers.validation import attack_name

COST_METRICS = ("model/parameters", "model/latency_ms")
AVERAGED = tuple(f"validation/{copy}/{kind}_accuracy" for copy in ("average", "latest") for kind in ("clean", "robust"))
"""Accuracies of the averaged weights and of the latest ones; `validation/robust_accuracy` is that of the better copy."""
RATES = ("time/examples_per_second",)
"""Metrics of which more is better, accuracies apart."""


def is_accuracy(metric: str) -> bool:
    """Return whether a metric is an accuracy: a share in [0,1] of which more is better."""
    return metric.startswith("validation/") and metric != MARKED_METRIC


def epoch_metrics(experiment: ExperimentConfig) -> list[str]:
    """Return the metrics that a run of `experiment` reports after epochs."""
    validation = experiment.training.validation
    attacks = sorted({attack_name(validation, randomized=randomized) for randomized in (False, True)})
    return [
        "train/loss",
        "validation/clean_accuracy",
        "validation/robust_accuracy",
        *(f"validation/robust_accuracy/{attack}" for attack in attacks),
        *(AVERAGED if experiment.training.averaging.name != "none" else ()),
        "time/epoch_seconds",
        "time/examples_per_second",
    ]


def final_metrics(experiment: ExperimentConfig, suite: str) -> list[str]:
    """Return the metrics that a finished trial reports beside those of its selected epoch."""
    attacks = load_suite(suite, experiment.defence.name).attacks
    protocols = {protocol for attack in attacks for protocol in attack.protocols}
    return [*COST_METRICS, *(protocol_metric(protocol) for protocol in PROTOCOLS if protocol in protocols), MARKED_METRIC]


def goal_interval(config: SweepConfig, values: Mapping[str, Any], metric: str, value: float) -> tuple[float, float] | None:
    """Return the 95 % interval (Wilson) of a trial's accuracy, over validation images alone: draws and seeds add to it. None: no accuracy.

    Args:
        values: of the trial's dimensions. metric, value: of an objective.
    """
    if not is_accuracy(metric) or not 0 <= value <= 1:
        return None
    experiment = config.experiment(dict(values))
    images, info = experiment.data.validation_size, DATASETS[experiment.data.name]
    if info.num_train is not None:
        images = derived_validation_size(info.num_train, images)
    measured = config.measure.num_examples if metric in {protocol_metric(each) for each in PROTOCOLS} else None
    if measured is None:
        measured = experiment.training.validation.num_examples
    number = images if measured is None else measured if images is None else min(images, measured)
    if not number:
        return None
    return wilson_interval(round(value * number), number)
