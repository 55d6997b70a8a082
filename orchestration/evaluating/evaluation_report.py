"""Showing an evaluation, and keeping it: in the terminal, in MLflow, in the card of the exported model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from analysis.reporting import tables
from analysis.reporting.conclusion import conclusion, headline_note, to_markdown
from analysis.reporting.report import write_report
from analysis.result import EvaluationResult
from models.weights import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE
from orchestration import console
from orchestration.evaluating.evaluation_run import Job
from orchestration.evaluating.stored_evaluation import as_kept, write_kept
from orchestration.exporting.export import record_evaluation
from orchestration.home import Workplace
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
    """Keep a result, write its page, and say where they are: what ends a command.

    Args:
        beside: what was found out beside the evaluation, as JSON types, for the result that is printed.
    """
    tracker, run_id = None, None
    if job.target.experiment is not None:
        tracker = Tracker(workplace.home, job.target.experiment.tracking.experiment)
        run_id = training_run_of(job.target, tracker, workplace.home)
    summary = keep(job, result, tracker, run_id, suite)
    pages = job.records_path.with_name(f"report-{suite_name(suite)}")
    experiment = job.target.experiment
    write_report(job.name, result, pages, images=job.x, points=job.kept_points(), description=experiment.description if experiment else "")
    if tracker is not None and run_id is not None:
        tracker.log_folder(run_id, pages, f"evaluation/{suite_name(suite)}")
    console.result({**summary, **(beside or {})})
    console.say(f"records {job.records_path}")
    if job.points is not None:
        console.say(f"points {job.points.folder}")
    console.say(f"report {pages / 'report.html'}")


def keep(job: Job, result: EvaluationResult, tracker: Tracker | None, run_id: str | None, suite: str) -> dict[str, Any]:
    """Write the result beside its records, into the exported model's card, and to MLflow; return its summary."""
    summary = as_kept(job, summarize(result, suite))
    write_kept(job.records_path.parent, summary)
    if job.target.external is None:  # what lies beside the records of an external model is all that it has
        record_evaluation(job.target.folder, job.target, summary)
    if tracker is not None and run_id is not None:
        metrics = {f"test/{row.attack}/{protocol_key(row.protocol)}": row.estimate.value for row in result.rows}
        if result.headline is not None:
            metrics |= {
                "test/robust_accuracy/T1": result.headline.value,
                "test/robust_accuracy/T1/low": result.headline.low,
                "test/robust_accuracy/T1/high": result.headline.high,
                f"test/{suite_name(suite)}/robust_accuracy/T1": result.headline.value,
            }
        tracker.log_metrics(run_id, metrics)
        kept = suite_name(suite)
        said = {"evaluation": conclusion(job.name, result), "marked": result.marked}
        said |= {"basis": result.basis, "checks_run": result.checks_run}
        said["failed_checks"] = ", ".join(verdict.id for verdict in result.failed) or "none"
        # Of the last evaluation, whose metrics replace those of the same name, and of each suite.
        for ending in ("", f".{kept}"):
            tracker.set_tags(run_id, {f"rayndom.{name}{ending}": value for name, value in said.items()})
        tracker.log_json(run_id, summary, f"evaluation/{suite_name(suite)}.json")
        tracker.log_file(run_id, job.records_path, "evaluation")
        for file in (WEIGHTS_FILE, CONFIG_FILE, CARD_FILE):  # a folder that a sweep exported holds more
            tracker.log_file(run_id, job.target.folder / file, "model")
    return summary


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
        cells += [_worst(result, protocol) for protocol in ("T0", "T1", "T2")]
        rows.append([*cells, result.basis])
    console.table(
        "test images, worst single attack on all of them under each protocol, 95 % intervals; sentences: worst attack of each image",
        ["model", "clean", "T0 paper", "T1 unknown draw (EOT)", "T2 known draw", "basis"],
        rows,
    )


def _worst(result: EvaluationResult, protocol: str) -> str:
    estimates = [row.estimate for row in result.rows if row.attack != "clean" and row.in_threat_model and protocol in row.protocols]
    if not estimates:
        return ""
    # An attack that a suite runs on a part of the images has another sample: its accuracy is no bound on that of all.
    most = max(estimate.num_samples for estimate in estimates)
    estimates = [estimate for estimate in estimates if estimate.num_samples == most]
    return tables.format_estimate(min(estimates, key=lambda estimate: estimate.value), marked=result.marked)


def protocol_key(label: str) -> str:
    """Return a protocol's label as part of a metric's name."""
    return label.replace(" = ", "_").replace(" ", "_")


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
