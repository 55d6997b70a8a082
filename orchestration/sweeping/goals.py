"""What a sweep wants: objectives, constraints, early stopping, the measure of finished trials, repeats over training seeds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, model_validator

from analysis.evaluation.suites import load_suite
from analysis.reporting.tables import MARK
from models.configuration import Config
from orchestration.experiment import ExperimentConfig
from orchestration.training.final_measures import MARKED_METRIC, PROTOCOLS, protocol_metric
from trainers.validation import attack_name

COST_METRICS = ("model/parameters", "model/latency_ms")
AVERAGED = tuple(f"validation/{copy}/{kind}_accuracy" for copy in ("average", "latest") for kind in ("clean", "robust"))
"""Accuracies of the averaged weights and of the latest ones; `validation/robust_accuracy` is that of the better copy."""
RATES = ("time/examples_per_second",)
"""Metrics of which more is better, accuracies apart."""


def is_accuracy(metric: str) -> bool:
    """Return whether a metric is an accuracy: a share in [0,1] of which more is better."""
    return metric.startswith("validation/") and metric != MARKED_METRIC


class SweepObjective(Config):
    """What a sweep improves."""

    metric: str = Field(
        description="Name of a metric of training, e.g. `validation/robust_accuracy`; or of a finished trial: `model/parameters`, "
        "`model/latency_ms`, or robust accuracy under a named protocol, e.g. `validation/robust_accuracy/T1`."
    )
    mode: Literal["max", "min"] = Field("max", description="Whether more or less is better.")


class Constraint(Config):
    """What a trial must satisfy to win."""

    metric: str = Field(description="Name of a metric, as in `objectives`.")
    at_least: float | None = Field(None, description="Smallest allowed value.")
    at_most: float | None = Field(None, description="Largest allowed value.")

    @model_validator(mode="after")
    def _has_one_bound(self) -> Constraint:
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError(f"constraint on {self.metric}: give either `at_least` or `at_most`")
        return self

    @property
    def key(self) -> str:
        """Name under which Optuna keeps it."""
        return f"{self.metric} {'>=' if self.at_most is None else '<='} {self.at_least if self.at_most is None else self.at_most:g}"

    def violation(self, value: float) -> float:
        """Return by how much `value` is out of bounds: positive if it is, zero or negative if not."""
        if self.at_least is not None:
            return self.at_least - value
        assert self.at_most is not None
        return value - self.at_most


class StoppingConfig(Config):
    """Early stopping of unpromising trials by asynchronous successive halving (ASHA)."""

    metric: str = Field("validation/robust_accuracy", description="The metric that trials are compared by, always maximized.")
    grace_epochs: int = Field(1, ge=1, le=100_000, description="No trial is stopped before this many epochs.")
    reduction_factor: float = Field(3, gt=1, le=1000, description="Of the trials at a rung, one in this many goes on.")


class RepeatsConfig(Config):
    """Training the best trials again with other seeds: the winner is the best on the mean."""

    top: int = Field(3, ge=1, le=1000, description="How many of the best full-budget trials.")
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        (1, 2), min_length=1, max_length=1000, description="Further training seeds, beside the one of the search."
    )


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


def format_goal(metric: str, value: float, metrics: Mapping[str, float]) -> str:
    """Return a finished trial's value of a metric for a table; accuracies of an evaluation with a failed check carry their mark.

    Args:
        metrics: all metrics of the trial.
    """
    of_evaluation = metric in {protocol_metric(protocol) for protocol in PROTOCOLS}
    return f"{value:.4g} {MARK}" if of_evaluation and metrics.get(MARKED_METRIC) else f"{value:.4g}"
