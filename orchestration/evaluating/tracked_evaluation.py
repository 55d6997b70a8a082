"""An evaluation in MLflow: its metrics, tied to the model and to the test images, what was concluded, its page and its records.

What each metric means stands in docs/metrics.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from analysis.evaluation.protocols import PROTOCOL_TITLES, ProtocolName
from analysis.reporting.conclusion import conclusion
from analysis.result import EvaluationResult, Row
from orchestration.evaluating.evaluation_run import Job
from orchestration.exporting.registration import renew_versions
from orchestration.tracking.logged_models import link_metrics, log_data, logged_model_of, renew_card
from orchestration.tracking.tracker import Tracker
from trainers.data.description import DataDescription, describe_images

HEADLINE = "test/robust_accuracy/T1"
EVERY_DRAW = ("T0", "T1", "T2")
"""Protocols that coincide for a deterministic model: its one number has all three names, so that models of both kinds share columns."""


def names_of(row: Row) -> list[str]:
    """Return the metrics that a row of a result is the value of."""
    if row.protocols >= set(PROTOCOL_TITLES):
        return [f"test/{row.attack}/{protocol}" for protocol in EVERY_DRAW]
    return [f"test/{row.attack}/{protocol_key(row.protocol)}"]


def metrics_of(result: EvaluationResult, suite: str) -> dict[str, float]:
    """Return the metrics of an evaluation: each attack under each protocol, and the worst attack under T0, T1 (with its interval) and T2.

    Args:
        suite: its name.
    """
    metrics = {name: row.estimate.value for row in result.rows for name in names_of(row)}
    if result.headline is None:
        return metrics
    worst = {"T1": result.headline.value}
    others: tuple[ProtocolName, ...] = ("T0", "T2")
    for protocol in others:
        lowest = result.lowest(protocol)
        if lowest is not None:
            # Of a deterministic model the worst attack of each image is its number under every protocol.
            worst[protocol] = result.headline.value if "T1" in lowest.protocols else lowest.estimate.value
    metrics |= {f"test/robust_accuracy/{protocol}": value for protocol, value in worst.items()}
    metrics |= {f"{HEADLINE}/low": result.headline.low, f"{HEADLINE}/high": result.headline.high}
    return metrics | {f"test/{suite}/robust_accuracy/T1": result.headline.value}


def log_evaluation(tracker: Tracker, run_id: str, job: Job, summary: Mapping[str, Any], pages: Path | None) -> None:
    """Log an evaluation to the run that trained the model, and tie it to the model.

    Args:
        summary: as it is kept. pages: folder of its page; None: it has none.
    """
    result, suite = job.result(), summary["suite"]
    metrics, data = metrics_of(result, suite), images_of(job)
    log_data(tracker, run_id, data, "test")
    model = logged_model_of(tracker, run_id)
    if model is None:
        tracker.log_metrics(run_id, metrics)
    else:
        link_metrics(tracker, run_id, model.model_id, metrics, data=data)
        renew_card(tracker, model.model_id, job.target.folder)
        tracker.client.set_logged_model_tags(model.model_id, said_of(job.name, result))
    renew_versions(tracker, run_id, job.target.folder)
    # Of the last evaluation, whose metrics replace those of the same name, and of each suite.
    for ending in ("", f".{suite}"):
        tracker.set_tags(run_id, {f"{name}{ending}": value for name, value in said_of(job.name, result).items()})
    tracker.log_json(run_id, summary, f"evaluation/{suite}.json")
    tracker.log_file(run_id, job.records_path, "evaluation")
    if pages is not None:
        tracker.log_folder(run_id, pages, f"evaluation/{suite}")


def said_of(name: str, result: EvaluationResult) -> dict[str, str]:
    """Return what was concluded, as tags."""
    return {
        "rayndom.evaluation": conclusion(name, result),
        "rayndom.marked": str(result.marked),
        "rayndom.basis": result.basis,
        "rayndom.checks_run": result.checks_run,
        "rayndom.failed_checks": ", ".join(verdict.id for verdict in result.failed) or "none",
    }


def images_of(job: Job) -> DataDescription:
    """Return the test images that a job is about."""
    assert job.settings.data is not None
    return describe_images(job.settings.data.name, "test", job.x, job.y, job.plan[0].num_classes)


def protocol_key(label: str) -> str:
    """Return a protocol's label as part of a metric's name."""
    return label.replace(" = ", "_").replace(" ", "_")
