"""What a sweep wants: objectives, constraints, early stopping, the measure of finished trials, repeats over training seeds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, model_validator

from analysis.reporting.mark import MARK
from models.configuration import Config
from orchestration.training.measure import MARKED_METRIC, PROTOCOLS, protocol_metric


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
    """Early stopping of unpromising trials."""

    scheduler: Literal["asha", "hyperband", "median", "pareto"] = Field(
        "asha",
        description="asha: the best share at each rung goes on; hyperband: several such brackets, the last without early stopping; "
        "median: what falls below the median ends; pareto: of several objectives, what is dominated at a rung ends.",
    )
    metric: str = Field(
        "validation/robust_accuracy",
        description="The metric that trials are compared by, always maximized; `pareto` compares the objectives.",
    )
    grace_epochs: int = Field(1, ge=1, le=100_000, description="No trial is stopped before this many epochs.")
    reduction_factor: float = Field(3, gt=1, le=1000, description="Of the trials at a rung, one in this many goes on.")


class WarmStartConfig(Config):
    """Points that are tried first because something is known of them."""

    sweep: str | None = Field(None, min_length=1, description="Another sweep of the home, by name or key: its best points, not its values.")
    runs: bool = Field(False, description="Finished runs of the home that are points of the space; they are not trained again.")
    top: int = Field(10, ge=1, le=1000, description="At most so many points of each.")

    @model_validator(mode="after")
    def _names_something(self) -> WarmStartConfig:
        if self.sweep is None and not self.runs:
            raise ValueError("warm_start needs `sweep`, or `runs: true`")
        return self


class RepeatsConfig(Config):
    """Training the best trials again with other seeds: the winner is the best on the mean."""

    top: int = Field(3, ge=1, le=1000, description="How many of the best full-budget trials.")
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        (1, 2), min_length=1, max_length=1000, description="Further training seeds, beside the one of the search."
    )


def format_goal(metric: str, value: float, metrics: Mapping[str, float]) -> str:
    """Return a finished trial's value of a metric for a table; accuracies of an evaluation with a failed check carry their mark.

    Args:
        metrics: all metrics of the trial.
    """
    of_evaluation = metric in {protocol_metric(protocol) for protocol in PROTOCOLS}
    return f"{value:.4g} {MARK}" if of_evaluation and metrics.get(MARKED_METRIC) else f"{value:.4g}"
