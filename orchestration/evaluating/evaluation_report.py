"""Showing an evaluation, and keeping it: in the terminal, in MLflow, in the card of the exported model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from analysis.evaluation.protocols import ProtocolName
from analysis.reporting import tables
from analysis.reporting.conclusion import conclusion, headline_note, to_markdown
from analysis.reporting.report import write_report
from analysis.result import EvaluationResult
from orchestration import console
from orchestration.evaluating.evaluation_run import Job
from orchestration.evaluating.stored_evaluation import as_kept, write_kept
from orchestration.evaluating.tracked_evaluation import log_evaluation
from orchestration.exporting.export import record_evaluation
from orchestration.home import Home, Workplace
from orchestration.tracking.tracker import Tracker
from orchestration.trained_models.origin import training_run_of


def show(job: Job) -> EvaluationResult:
    """Print table, headline, verdicts and a conclusion."""
    result = job.result()
    rows = [
        (
            row.attack + ("" if row.in_threat_model else " (outside the threat model)"),
            row.protocol,
            tables.format_estimate(row.estimate, marked=result.marked) + ("" if row.finished else " unfinished"),
            row.caption,
        )
        for row in result.rows
    ]
    console.table(f"{job.name}: accuracy on test images", ["attack", "protocol", "accuracy [95 %]", "how"], rows)
    if result.headline is not None:
        console.say(f"worst attack per sample, unknown draw (T1): {tables.format_estimate(result.headline, marked=result.marked)}")
        if note := headline_note(result):
            console.say(note)
    for remark in result.remarks:
        console.say(remark)
    console.table(
        "checks",
        ["check", "verdict", "seen", "what to do"],
        [(f"{v.id} {v.title}", v.status.value, v.explanation, v.advice or "") for v in result.verdicts],
    )
    console.say(conclusion(job.name, result))
    return result


def finish(job: Job, result: EvaluationResult, suite: str, workplace: Workplace, beside: Mapping[str, Any] | None = None) -> None:
    """Keep a result with its page, and say where they are: what ends a command.

    Args:
        beside: what was found out beside the evaluation, as JSON types, for the result that is printed.
    """
    summary, pages = keep_at_its_run(job, result, suite, workplace.home)
    console.result({**summary, **(beside or {})})
    console.say(f"records {job.records_path}")
    if job.points is not None:
        console.say(f"points {job.points.folder}")
    console.say(f"report {pages / 'report.html'}")


def keep_at_its_run(job: Job, result: EvaluationResult, suite: str, home: Home) -> tuple[dict[str, Any], Path]:
    """Keep a result at the MLflow run that trained the model, where that is known; return what `keep` does."""
    tracker, run_id = None, None
    if job.target.experiment is not None:
        tracker = Tracker(home, job.target.experiment.tracking.experiment)
        run_id = training_run_of(job.target, tracker, home)
    return keep(job, result, tracker, run_id, suite)


def keep(job: Job, result: EvaluationResult, tracker: Tracker | None, run_id: str | None, suite: str) -> tuple[dict[str, Any], Path]:
    """Write the result and its page beside its records, into the exported model's card, and to MLflow; return its summary and the folder
    of its page."""
    summary = as_kept(job, summarize(result, suite))
    write_kept(job.records_path.parent, summary)
    if job.target.external is None:  # what lies beside the records of an external model is all that it has
        record_evaluation(job.target.folder, job.target, summary)
    pages = job.records_path.with_name(f"report-{suite_name(suite)}")
    experiment = job.target.experiment
    write_report(job.name, result, pages, images=job.x, points=job.kept_points(), description=experiment.description if experiment else "")
    if tracker is not None and run_id is not None:
        log_evaluation(tracker, run_id, job, summary, pages)
    return summary, pages


def summarize(result: EvaluationResult, suite: str) -> dict[str, Any]:
    """Return an evaluation as JSON types."""
    return {
        "suite": suite_name(suite),
        "finished": result.finished,
        "marked": result.marked,
        "basis": result.basis,
        "headline": None if result.headline is None else _estimate(result.headline),
        "remarks": list(result.remarks),
        "rows": result.frame(),
        "verdicts": [
            {"id": v.id, "title": v.title, "verdict": v.status.value, "seen": v.explanation, "advice": v.advice} for v in result.verdicts
        ],
        "markdown": to_markdown(result),
    }


def compare(jobs: Sequence[Job]) -> None:
    """Print one table over several models: clean, T0, T1, T2, and what the numbers license."""
    rows = []
    for job in jobs:
        result = job.result()
        cells = [job.name, "" if result.clean is None else tables.format_estimate(result.clean, marked=result.marked)]
        shown: tuple[ProtocolName, ...] = ("T0", "T1", "T2")
        cells += [_worst(result, protocol) for protocol in shown]
        rows.append([*cells, result.basis])
    console.table(
        "test images, worst single attack on all of them under each protocol, 95 % intervals; sentences: worst attack of each image",
        ["model", "clean", "T0 paper", "T1 unknown draw (EOT)", "T2 known draw", "basis"],
        rows,
    )


def _worst(result: EvaluationResult, protocol: ProtocolName) -> str:
    row = result.lowest(protocol)
    return "" if row is None else tables.format_estimate(row.estimate, marked=result.marked)


def suite_name(suite: str) -> str:
    """Return a suite's name, also of one given by a file."""
    return suite.rsplit("/", 1)[-1].removesuffix(".yaml").removesuffix(".yml")


def _estimate(estimate: Any) -> dict[str, Any]:
    return {
        "accuracy": estimate.value,
        "low": estimate.low,
        "high": estimate.high,
        "num_samples": estimate.num_samples,
        "num_draws": estimate.num_draws,
        "shortage": estimate.shortage or None,
        "needed_draws": estimate.needed_draws,
        "needed_samples": estimate.needed_samples,
    }
