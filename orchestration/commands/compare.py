"""`rayndom compare RUN RUN ...`: what differs, and whether it makes a difference."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from orchestration import console
from orchestration.commands.command import Command, Format, add_data_root, add_format, begin, show_frame, workplace_to_read


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="run (16 digits), MLflow run id (32 digits), exported folder, recipe, or a model of your own that was evaluated here",
    )
    parser.add_argument("--all", action="store_true", help="show equal parameters, every metric and, of more than two runs, all pairs too")
    add_format(parser)
    add_data_root(parser)


def _run(arguments: argparse.Namespace) -> int:
    from orchestration.evaluating.run_comparison import find_runs, marks, metric_rows, paired_rows, parameter_rows, standing_rows

    chosen = begin(arguments)
    workplace = workplace_to_read(arguments)
    runs = find_runs(arguments.runs, workplace.home)
    parameters = parameter_rows(runs, everything=arguments.all)
    metrics = metric_rows(runs, everything=arguments.all)
    pairs, notes = paired_rows(runs, workplace)
    notes += [
        f"{run.label} was not built by Rayndom: of its parameters no more is known than how it was named"
        for run in runs
        if run.target.external
    ]
    standing, reasons = standing_rows(runs, pairs)
    warnings = marks(runs)
    if chosen == "json":
        frames = {
            "parameters": parameters,
            "metrics": [_plain(row) for row in metrics],
            "pairs": console.named(_plain(row) for row in pairs),
        }
        frames["standing"] = console.named(_plain(row) for row in standing)
        console.result({"runs": {run.label: str(run.target.folder) for run in runs}} | frames | {"notes": [*warnings, *notes]})
        return 0
    if parameters:
        show_frame("parameters" if arguments.all else "parameters that differ", _in_words(parameters), chosen)
    else:
        console.say("no parameter differs")
    if len(runs) > 2 and not arguments.all:
        show_frame(
            "test images, 95 % intervals; differences sample by sample, Holm's correction over all pairs",
            [_side_by_side(row, chosen) for row in standing],
            chosen,
        )
        for note in [*reasons, *warnings, *notes]:
            console.say(note)
        console.say("`--all` shows every parameter and metric, and all pairs")
        return 0
    show_frame("metrics: accuracy at the selected epoch, and on test images [95 %]", _cells(metrics, chosen), chosen)
    if pairs:
        show_frame(
            "worst attack per sample, unknown draw (T1), sample by sample; Holm's correction over all pairs of a suite", pairs, chosen
        )
    for note in [*warnings, *notes]:
        console.say(note)
    return 0


def _in_words(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{name: str(value) if isinstance(value, bool | list) else value for name, value in row.items()} for row in rows]


def _cells(rows: Sequence[Mapping[str, Any]], chosen: Format) -> list[dict[str, Any]]:
    """Return metrics as a reader or a program wants them: CSV has rows of their own for the ends of intervals."""
    from analysis.reporting.tables import format_estimate
    from analysis.statistics import Estimate

    shown: list[dict[str, Any]] = []
    for row in rows:
        measured = any(isinstance(value, Estimate) for value in row.values())
        if not measured or chosen != "csv":
            shown.append({name: format_estimate(value) if isinstance(value, Estimate) else value for name, value in row.items()})
            continue
        marked = any(value.marked for value in row.values() if isinstance(value, Estimate))
        for part in ("value", "low", "high", "marked") if marked else ("value", "low", "high"):
            suffix = "" if part == "value" else f" {part}"
            cells = {name: getattr(value, part) for name, value in row.items() if isinstance(value, Estimate)}
            shown.append({name: value for name, value in row.items() if value is None or name == "metric"} | cells)
            shown[-1]["metric"] += suffix
    return shown


def _side_by_side(row: Mapping[str, Any], chosen: Format) -> dict[str, Any]:
    """Return a row of the table of runs; in CSV the ends of an interval are columns of their own."""
    from analysis.reporting.tables import format_estimate
    from analysis.statistics import Estimate

    shown: dict[str, Any] = {}
    for name, value in row.items():
        if not isinstance(value, Estimate):
            shown[name] = value
        elif chosen != "csv":
            shown[name] = format_estimate(value)
        else:
            shown |= {name: value.value, f"{name} low": value.low, f"{name} high": value.high, f"{name} marked": value.marked}
    return shown


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    from analysis.reporting.comparison import Difference
    from analysis.statistics import Estimate

    def plain(value: Any) -> Any:
        if isinstance(value, Difference):
            return asdict(value)
        if not isinstance(value, Estimate):
            return value
        shown = {"accuracy": value.value, "low": value.low, "high": value.high, "samples": value.num_samples, "draws": value.num_draws}
        return shown | {"marked": value.marked, "shortage": value.shortage or None}

    return {name: plain(value) for name, value in row.items()}


COMPARE = Command(
    "compare",
    "show what finished runs differ in: parameters, metrics, and whether their robustness can be told apart",
    (
        "rayndom compare ctrw_digits at_digits",
        "rayndom compare 5a632dea00def935 rayndom_home/exports/ctrw_bounds_digits --all",
        "rayndom compare RUN_ID RUN_ID RUN_ID --format latex",
    ),
    _add,
    _run,
)
